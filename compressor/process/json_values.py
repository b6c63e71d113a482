"""Makes values that JSON has: it has no NaN and no Inf."""

from __future__ import annotations

import math
from typing import Any, TypeVar

Tree = TypeVar("Tree")


def finite(value: Tree, *, sort: bool = False) -> Tree:
    """The same tree with NaN and Inf as null, and with sort its keys in order."""
    tree: Any = value
    if isinstance(tree, dict):
        tree = {key: finite(tree[key], sort=sort) for key in (sorted(tree) if sort else tree)}
    elif isinstance(tree, (list, tuple)):
        tree = [finite(item, sort=sort) for item in tree]
    elif isinstance(tree, float) and not math.isfinite(tree):
        tree = None
    return tree
