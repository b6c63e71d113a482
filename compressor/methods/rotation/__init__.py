"""Rotates the residual stream, and computes the shapes of a sliced one."""
