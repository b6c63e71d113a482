"""Writes, loads, verifies and inspects artifacts."""
