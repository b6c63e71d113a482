"""Reads checkpoints, and builds, traces and runs their models block by block."""
