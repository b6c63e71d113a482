"""Which variants of a test run every day."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def every_day(names: Iterable[str], *few: str) -> list[Any]:
    """These names as parameters of a test: `few` of them run every day, the others in CI alone (`slow`)."""
    names = list(names)
    assert set(few) <= set(names), set(few) - set(names)
    return [name if name in few else pytest.param(name, marks=pytest.mark.slow) for name in names]
