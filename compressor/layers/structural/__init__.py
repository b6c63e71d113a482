"""Layers that change the architecture: narrower streams, removed parts, gated tokens."""
