"""Measures what compression costs in quality and gains in speed, and writes the report."""
