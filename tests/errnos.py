"""What a backend's user gets: an error with its errno, in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from ublk_trio import BackendError


@contextmanager
def raises(number: int) -> Iterator[None]:
    """Its block must raise `BackendError` with that errno."""
    with pytest.raises(BackendError) as raised:
        yield
    assert raised.value.errno == number, raised.value
    assert len(str(raised.value).splitlines()) == 1
