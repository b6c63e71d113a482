"""Rotations of the residual stream, and the shapes of a sliced one."""
