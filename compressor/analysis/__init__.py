"""What is found out about a model by running it: the residual stream, prunable units, token gates."""
