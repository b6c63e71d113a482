"""Chooses heads and neurons to remove, and computes the pruned model."""
