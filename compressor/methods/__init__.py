"""Implements the mathematics of the passes on tensors, without knowledge of models and the engine."""
