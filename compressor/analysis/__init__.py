"""Finds the residual stream, the prunable units and the places of token gates of a model by running it."""
