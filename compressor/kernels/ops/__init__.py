"""Defines the operations, one per file: their arithmetic in plain torch, and calls of the compiled code."""
