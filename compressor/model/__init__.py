"""Checkpoints and the structure of models: read, built, traced and run block by block."""
