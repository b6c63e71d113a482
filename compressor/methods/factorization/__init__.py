"""Low-rank and dense-sparse factors of a matrix."""
