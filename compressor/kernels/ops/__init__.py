"""One operation, one file: what it computes in plain torch, and the compiled code for it."""
