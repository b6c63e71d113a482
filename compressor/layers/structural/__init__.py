"""Implements layers that change the architecture: a narrower residual stream, removed sub-blocks, token gates."""
