"""Errors as programs see them: their class, their place and their values, never their English sentences."""

from __future__ import annotations

from contextlib import contextmanager

import pytest

ANY = object()


@contextmanager
def raises(cls, *, where=ANY, **data):
    """Like `pytest.raises(cls)`, for a `CompressError`.

    where  what its `where` has to be, as text; not looked at if it isn't given
    data   values that its `data` has to hold; it may hold others, too
    """
    with pytest.raises(cls) as caught:
        yield caught
    error = caught.value
    if where is not ANY:
        assert error.where == (None if where is None else str(where)), error
    found = {name: error.data.get(name, "(not there)") for name in data}
    assert found == data, f"{error!r} holds {error.data}"
