"""Sizes as people write them: `parse_size` and `format_size`. Units are powers of 1024, always."""

from __future__ import annotations

import re

from ublk_trio.errors import UsageError

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SIZE = re.compile(r"([0-9]{1,20})\s*([KMGT]?)(i?B)?", re.IGNORECASE | re.ASCII)


def parse_size(text: str) -> int:
    """Bytes for ``512``, ``64K``, ``1G``, ``1GiB``; case does not matter.

    ``1GB`` is refused: half of its readers take it for 1000³. Fractions are refused too: ``1536M`` says ``1.5G``
    exactly.

    Raises `UsageError` with one line that says how to write it.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UsageError(
            f"{text!r} is not a size: write a whole number of bytes, or one with K, M, G or T, such as 64K or 1G"
        )
    number, unit, suffix = match.group(1), match.group(2).upper(), (match.group(3) or "").lower()
    if (suffix == "b" and unit) or (suffix == "ib" and not unit):
        mend = f"{number}{unit or 'K'} (a power of 1024)"
        raise UsageError(f"{text!r} is not a size: units are K, M, G, T or KiB, MiB, GiB, TiB; did you mean {mend}?")
    return int(number) * _UNITS[unit]


def format_size(size: int) -> str:
    """The shortest exact text that `parse_size` turns back into `size`: ``1G``, ``1536M``, ``1000``."""
    for unit in ("T", "G", "M", "K"):
        if size and size % _UNITS[unit] == 0:
            return f"{size // _UNITS[unit]}{unit}"
    return str(size)
