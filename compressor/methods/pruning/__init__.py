"""Which heads and neurons can be removed, and what is left then."""
