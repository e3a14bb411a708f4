"""The splitter, case by case: quick, and the same at every run, so that mutants can be judged by it."""

from __future__ import annotations

import json

import pytest

from tests.rpc.harness import BOUNDS, split
from ublk_trio.rpc.splitter import MalformedError, Splitter

TRICKY = r' {"a\\": "}]\"{", "\u00e9": ["é\\\"", {}, [[]], "\\"], "": -1.5e3}[]"]\\"true null{"[":"]"} 12 '.encode()


def test_every_cut_of_a_tricky_stream() -> None:
    """Brackets, quotation marks and backslashes within strings, and whatever a cut leaves of them, change nothing."""
    whole = list(split([TRICKY]))
    assert len(whole) == 7
    assert [json.loads(value) for value in whole][2:6] == ["]\\", True, None, {"[": "]"}]

    def found(pieces: list[bytes]) -> list[bytes] | str:
        try:
            return list(split(pieces))
        except MalformedError as error:
            return str(error)

    for first in range(len(TRICKY)):
        assert found([TRICKY[:first], TRICKY[first:]]) == whole
        for second in range(first, len(TRICKY), 7):
            assert found([TRICKY[:first], TRICKY[first:second], TRICKY[second:]]) == whole
    assert found([TRICKY[at : at + 1] for at in range(len(TRICKY))]) == whole


def is_partial(splitter: Splitter) -> bool:
    return splitter.partial


def test_nothing_is_partial_after_a_value() -> None:
    """White space behind a value is no beginning of another."""
    splitter = Splitter(**BOUNDS)
    splitter.feed(b"{} \n")
    assert splitter.next_value() == b"{}"
    assert not is_partial(splitter)


@pytest.mark.parametrize("stream", ["[1, 22", '["abc', '{"a": 1, "b": 22', '"abc', "[[], 1"])
def test_what_was_looked_at_is_not_looked_at_again(stream: str) -> None:
    """A value that is not whole has been looked at up to its last byte; the next piece goes on from there."""
    splitter = Splitter(**BOUNDS)
    splitter.feed(stream.encode())
    assert splitter.next_value() is None
    assert splitter._scanned == len(stream)


@pytest.mark.parametrize("stream", ["{", "[", '"', '{"a": 1', '["', '{"a', '[1, "]', '"\\\\\\"'])
def test_the_end_within_a_value(stream: str) -> None:
    """A stream that ends within brackets or quotation marks is an error; until then the value is partial."""
    splitter = Splitter(**BOUNDS)
    assert not is_partial(splitter)
    splitter.feed(stream.encode())
    assert splitter.next_value() is None
    assert is_partial(splitter) is True
    with pytest.raises(MalformedError, match="ended in the middle of a request"):
        splitter.finish()


@pytest.mark.parametrize("stream", ["12", "true", "-1.5e3", " null"])
def test_the_end_of_a_bare_word(stream: str) -> None:
    """A number or a word is whole when something else follows, or the stream ends; then nothing is left."""
    splitter = Splitter(**BOUNDS)
    splitter.feed(stream.encode())
    assert splitter.next_value() is None
    assert is_partial(splitter) is True
    assert splitter.finish() == stream.strip().encode()
    assert not is_partial(splitter)
    assert splitter.finish() is None
    assert list(split([f"{stream} {stream}{{}}".encode()])) == [stream.strip().encode()] * 2 + [b"{}"]


@pytest.mark.parametrize("text", ["[" * 65 + "]" * 65, '{"a":' * 65 + "1" + "}" * 65, "[" * 65])
def test_nesting_is_bounded(text: str) -> None:
    """The 65th level is refused as soon as it opens; 64 are fine, and brackets within strings are no levels."""
    with pytest.raises(MalformedError, match="nested deeper than 64 levels"):
        list(split([text.encode()]))
    assert list(split([b"[" * 64 + b"]" * 64]))
    assert list(split([b'["' + b"[" * 200 + b'"]']))


@pytest.mark.parametrize("text", ['"%s"', '{"a": "%s"}', "[%s", '"%s'])
def test_length_is_bounded(text: str) -> None:
    """A value of more bytes than the bound is refused, whole or not; one of as many is not."""
    fitting = (text % "1").encode()
    with pytest.raises(MalformedError, match="longer than 100 bytes"):
        list(split([(text % ("1" * 100)).encode()], bytes_max=100))
    with pytest.raises(MalformedError, match=r"longer than|in the middle"):
        list(split([fitting], bytes_max=len(fitting) - 1))
    if fitting[-1:] in b'"}' and fitting != b'"1':
        assert list(split([fitting], bytes_max=len(fitting))) == [fitting]


def test_space_is_not_kept() -> None:
    """White space between values is no request: it has no bound, and nothing of it is kept."""
    splitter = Splitter(bytes_max=10, depth_max=1)
    for _ in range(100):
        splitter.feed(b" \n" * 100)
        assert splitter.next_value() is None
        assert not is_partial(splitter)


@pytest.mark.parametrize(
    "stream", ["]", "}", ",", ":", "{]", "[}", "[[1}", '{"a": [1}', "\ufeff{}", "'a'", "x", "=", "\0", "\x0b"]
)
def test_what_can_be_known_is_said_at_once(stream: str) -> None:
    """A byte that begins no value, and a bracket that closes another kind, are errors before the stream ends."""
    splitter = Splitter(**BOUNDS)
    splitter.feed(stream.encode())
    with pytest.raises(MalformedError):
        splitter.next_value()
