"""The mathematics of the passes, on tensors; it knows no model and no engine."""
