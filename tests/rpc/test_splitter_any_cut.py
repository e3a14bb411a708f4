"""Whatever the stream, and however it is cut, the splitter finds the same values, in linear time."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.rpc.harness import BOUNDS, split
from ublk_trio.rpc.splitter import MalformedError, Splitter

#: Time is measured elsewhere; a busy machine must not fail what is right.
CALM = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=60)

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
values = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)
spaces = st.text(" \t\n\r", max_size=3)


@st.composite
def streams(draw: st.DrawFn) -> tuple[list[Any], bytes]:
    """Values, and their stream: each written in some way, with white space, or with nothing where nothing is needed."""
    wanted = draw(st.lists(values, max_size=6))
    text = draw(spaces)
    for value in wanted:
        written = json.dumps(value, ensure_ascii=draw(st.booleans()), indent=draw(st.sampled_from([None, 0, 2])))
        # Two bare words in a row would be one.
        gap = draw(spaces) or ("" if written[0] in '{["' or text[-1:] in '}]"' else " ")
        text += gap + written
    return wanted, (text + draw(spaces)).encode()


@st.composite
def cut(draw: st.DrawFn, data: bytes) -> list[bytes]:
    """The data in pieces, some of them empty."""
    at = sorted(draw(st.lists(st.integers(0, len(data)), max_size=10)))
    return [data[a:b] for a, b in zip([0, *at], [*at, len(data)], strict=True)]


@CALM
@given(st.data())
def test_any_cut_gives_the_same_values(data: st.DataObject) -> None:
    """However a stream is cut, the values are those that json.loads makes of their texts, in order."""
    wanted, stream = data.draw(streams())
    pieces = data.draw(cut(stream))
    assert [json.loads(value) for value in split(pieces)] == wanted


@CALM
@given(streams())
def test_byte_by_byte(made: tuple[list[Any], bytes]) -> None:
    """A stream that comes byte by byte gives each bracketed value with its last byte, not later."""
    wanted, stream = made
    splitter = Splitter(**BOUNDS)
    seen: list[Any] = []
    for at in range(len(stream)):
        splitter.feed(stream[at : at + 1])
        while (value := splitter.next_value()) is not None:
            seen.append(json.loads(value))
            assert stream[at : at + 1] == value[-1:] or isinstance(seen[-1], int | float | None)
    if (value := splitter.finish()) is not None:
        seen.append(json.loads(value))
    assert seen == wanted


@CALM
@given(st.binary(max_size=200), st.data())
def test_any_bytes(stream: bytes, data: st.DataObject) -> None:
    """Whatever comes, however it is cut: the same values, then the same error or none; and no other exception."""

    def outcome(pieces: Iterable[bytes]) -> tuple[list[bytes], str]:
        seen = []
        try:
            for value in split(pieces):
                seen.append(value)
        except MalformedError as error:
            return seen, str(error)
        return seen, ""

    assert outcome(data.draw(cut(stream))) == outcome([stream])


@CALM
@given(streams(), st.data())
def test_a_cut_off_stream_is_noticed(made: tuple[list[Any], bytes], data: st.DataObject) -> None:
    """A stream that ends within a value in brackets or quotes is an error, and never a shorter value."""
    wanted, stream = made
    end = data.draw(st.integers(0, len(stream)))
    try:
        seen = [json.loads(value) for value in split([stream[:end]])]
    except (MalformedError, ValueError):
        return
    # A number that was cut is a number; all before it are whole.
    assert seen[:-1] == wanted[: max(len(seen) - 1, 0)]
    if seen and isinstance(wanted[len(seen) - 1], str | list | dict):
        assert seen[-1] == wanted[len(seen) - 1]


HOSTILE = {
    "one long string": b'"' + b"a" * 900_000 + b'"',
    "escapes": b'"' + b"\\\\" * 450_000 + b'"',
    "quotes": b"[" + b'"",' * 300_000 + b'""]',
    "brackets": b"[" + b"[]," * 300_000 + b"[]]",
    "multi-byte": b'"' + "é€".encode() * 180_000 + b'"',
    "space": b" " * 900_000 + b"1 ",
    "digits": b"1" * 900_000 + b" ",
    "many": b"{}" * 150_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_time_is_linear(name: str) -> None:
    """No byte is looked at twice, however small the pieces are: looking again at each of them would take minutes."""
    stream = HOSTILE[name]
    begin = time.process_time()
    splitter = Splitter(**BOUNDS)
    for at in range(0, len(stream), 64):
        splitter.feed(stream[at : at + 64])
        while splitter.next_value() is not None:
            pass
        assert time.process_time() - begin < 5.0
