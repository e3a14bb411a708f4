"""Finds where one JSON value ends and the next begins, in a stream that comes in pieces.

Facts:

- Requests follow each other without any framing; between them there may be white space, or nothing.
- Outside of strings only brackets matter, within them only the quotation mark and the backslash. All of these are ASCII, and no
  byte of a longer UTF-8 sequence is; so a stream may be cut at any byte, and no character has to be decoded here.
- A number or a bare word (`true`) has no end of its own: what follows it, or the end of the stream, ends it.

So every byte is looked at once, however it arrives. What comes out is balanced, not yet known to be JSON: that is the
decoder's to say. What can be known here is said at once: a wrong closing bracket, a byte that begins no value, a bound.
"""

from __future__ import annotations

import re
from typing import Final

_SPACE: Final = re.compile(rb"[ \t\n\r]*+")
_BRACKET_OR_QUOTE: Final = re.compile(rb'["{}\[\]]')
_IN_STRING: Final = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)
_WORD: Final = re.compile(rb"[-+.0-9A-Za-z]*+")
_WORD_BEGINS: Final = frozenset(b"-0123456789tfn")
_CLOSER: Final = {ord("{"): ord("}"), ord("["): ord("]")}
_QUOTE: Final = ord('"')


class MalformedError(Exception):
    """What came cannot become a JSON value; the text says why. The rest of the stream has no meaning."""


class Splitter:
    """Takes pieces of a stream with `feed`, gives whole values with `next_value`.

    It keeps at most ``bytes_max`` bytes beyond what `feed` brought last, if values are taken until there are none.
    """

    def __init__(self, *, bytes_max: int, depth_max: int) -> None:
        self._bytes_max = bytes_max
        self._depth_max = depth_max
        self._buffer = bytearray()
        #: Of the value that the buffer begins with: how far it was looked at, the brackets it waits for, where we are.
        self._scanned = 0
        self._closers = bytearray()
        self._in_string = False

    @property
    def partial(self) -> bool:
        """Whether a value has begun and not ended."""
        return bool(self._buffer)

    def feed(self, data: bytes) -> None:
        """Append the stream's next piece."""
        self._buffer += data

    def next_value(self) -> bytes | None:
        """The next whole value, or None if there is none yet. Raises `MalformedError`; then there is no next."""
        if not self._scanned:
            self._skip_space()
            if not self._buffer:
                return None
        end = self._find_end()
        if (end if end is not None else len(self._buffer)) > self._bytes_max:
            raise MalformedError(f"the request is longer than {self._bytes_max} bytes")
        return None if end is None else self._take(end)

    def finish(self) -> bytes | None:
        """The stream has ended: the last value, if it is one that only the end could end."""
        if not self._buffer:
            return None
        if self._closers or self._in_string:
            raise MalformedError("the stream ended in the middle of a request")
        return self._take(len(self._buffer))

    def _take(self, end: int) -> bytes:
        value = bytes(self._buffer[:end])
        del self._buffer[:end]
        self._scanned = 0
        self._skip_space()
        return value

    def _skip_space(self) -> None:
        del self._buffer[: _end(_SPACE, self._buffer, 0)]

    def _find_end(self) -> int | None:
        """Look at what is new. The end of the value, or None."""
        if not self._scanned:
            first = self._buffer[0]
            if first == _QUOTE:
                self._in_string, self._scanned = True, 1
            elif first in _CLOSER:
                self._open(first)
                self._scanned = 1
            elif first not in _WORD_BEGINS:
                raise MalformedError(f"no JSON value begins with {bytes([first])!r}")
        if self._closers or self._in_string:
            return self._find_bracket()
        self._scanned = _end(_WORD, self._buffer, self._scanned)
        return self._scanned if self._scanned < len(self._buffer) else None

    def _find_bracket(self) -> int | None:
        buffer, length = self._buffer, len(self._buffer)
        while self._scanned < length:
            if self._in_string:
                self._scanned = _end(_IN_STRING, buffer, self._scanned)
                if self._scanned == length or buffer[self._scanned] != _QUOTE:
                    return None  # nothing is left but perhaps a backslash, whose escaped byte is still to come
                self._in_string = False
                self._scanned += 1
            else:
                found = _BRACKET_OR_QUOTE.search(buffer, self._scanned)
                if found is None:
                    self._scanned = length
                    return None
                self._scanned = found.end()
                self._step(buffer[found.start()])
            if not self._closers:
                return self._scanned
        return None

    def _step(self, byte: int) -> None:
        if byte == _QUOTE:
            self._in_string = True
        elif byte in _CLOSER:
            self._open(byte)
        elif byte != self._closers.pop():
            raise MalformedError(f"{chr(byte)!r} closes what it did not open")

    def _open(self, byte: int) -> None:
        if len(self._closers) == self._depth_max:
            raise MalformedError(f"the request is nested deeper than {self._depth_max} levels")
        self._closers.append(_CLOSER[byte])


def _end(pattern: re.Pattern[bytes], buffer: bytearray, start: int) -> int:
    match = pattern.match(buffer, start)
    assert match is not None, "the pattern matches nothing as well"
    return match.end()
