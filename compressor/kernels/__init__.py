"""Arithmetic on stored forms. `reference` is plain torch; faster kernels have to agree with it."""
