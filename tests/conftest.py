"""Runs before anything imports torch."""

import os

# Tiny models: a second thread costs more than it gives, most where the tests share the cores with each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
