"""The plan of a run and its sweeps: one part of the model at a time."""
