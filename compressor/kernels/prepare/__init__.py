"""Kernels into a loaded model: which one each layer gets, and the layers that call it."""
