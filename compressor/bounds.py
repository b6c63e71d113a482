"""Largest values of whole numbers in a recipe: beyond any use, and what is computed of them fits in 64 bits."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

MOST = 1 << 24  # tokens or steps; the product of two still leaves room for a width
MOST_SAMPLES = 1 << 20  # each is an object of its own
MOST_BYTES = 1 << 60
Count = Annotated[int, Field(ge=1, le=MOST)]
