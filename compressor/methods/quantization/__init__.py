"""Grids, codes, second moments and lookup tables."""
