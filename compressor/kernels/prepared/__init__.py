"""Chooses a kernel for each layer of a loaded model, and implements the layers that call it."""
