"""Factorizes a matrix into low-rank or dense-sparse factors."""
