"""Defines the largest integers in a recipe: larger than any use, and small enough for results in 64 bits."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

MOST = 1 << 24  # tokens or steps; the product of two and a width still fits
MOST_SAMPLES = 1 << 20  # each sample is a Python object
MOST_BYTES = 1 << 60
Count = Annotated[int, Field(ge=1, le=MOST)]
