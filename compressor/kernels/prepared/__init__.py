"""Kernels in a loaded model: which one each layer gets, and the layers that call it."""
