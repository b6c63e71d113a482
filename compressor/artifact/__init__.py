"""Artifacts: written, loaded, verified and inspected."""
