"""The search for a planted bug: it is found by an invariant that breaks, and by nothing else.

A run that ends with any other error shows a mistake in the test, or in the bug: such an error is not accepted, but raised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import pytest
import trio
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from ublk_trio import StuckError

T = TypeVar("T")

#: How it shows: something that is not so, that should have been refused, or that does not end in its time.
BROKEN = (AssertionError, pytest.fail.Exception, trio.TooSlowError, StuckError)


def leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for each in error.exceptions:
            yield from leaves(each)
    else:
        yield error


def is_broken(error: BaseException) -> bool:
    """Whether an invariant broke, and nothing else went wrong."""
    return all(isinstance(leaf, BROKEN) for leaf in leaves(error))


@contextmanager
def broken_invariant() -> Iterator[None]:
    """Its block must break one."""
    try:
        yield
    except BaseException as error:
        if not is_broken(error):
            raise
    else:
        pytest.fail("nothing noticed it")


def check_noticed(run: Callable[[T], None], cases: st.SearchStrategy[T], *, examples: int) -> None:
    """Fails unless an invariant breaks in one of so many runs. The same runs every time: it is no matter of luck."""
    broken: list[BaseException] = []

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(cases)
    def search(case: T) -> None:
        if broken:
            return
        try:
            run(case)
        except BaseException as error:
            if not is_broken(error):
                raise
            broken.append(error)

    search()
    assert broken, f"none of {examples} runs noticed it"
