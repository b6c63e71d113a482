"""Implements quantization grids, packed codes, Hessians and lookup tables."""
