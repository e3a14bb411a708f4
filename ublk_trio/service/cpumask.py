"""Sets of CPUs as operators write them: ``0x3``, ``3``, or ``[0,2-4]``."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from typing import Final

from ublk_trio.errors import UsageError

_HEX: Final = re.compile(r"(0[xX])?[0-9a-fA-F,]*[0-9a-fA-F][0-9a-fA-F,]*", re.ASCII)
_LIST: Final = re.compile(r"\[(.*)\]", re.ASCII)
_RANGE: Final = re.compile(r"\s*([0-9]{1,5})\s*(?:-\s*([0-9]{1,5})\s*)?", re.ASCII)
#: More digits than any machine has CPUs: a longer mask is a mistake, and would cost time.
_HEX_DIGITS_MAX: Final = 4096


def parse_cpumask(text: str, *, allowed: Collection[int] | None = None) -> frozenset[int]:
    """The CPUs of a mask: hexadecimal digits, with or without ``0x``, commas ignored; or a list in brackets.

    ``allowed``: those that may be used; by default the ones that this process may run on. Raises `UsageError`, one line,
    for text that is no mask, an empty one, and CPUs that are not allowed.
    """
    usable = frozenset(os.sched_getaffinity(0) if allowed is None else allowed)
    cpus = _parse(text.strip())
    if not cpus:
        raise UsageError(f"cpumask {text!r} holds no CPU: give one such as 0x3 or [0-1]")
    missing = cpus - usable
    if missing:
        raise UsageError(
            f"cpumask {text!r} holds CPUs that this process cannot use ({format_list(missing)}): "
            f"choose from {format_list(usable)}"
        )
    return cpus


def _parse(text: str) -> frozenset[int]:
    listed = _LIST.fullmatch(text)
    if listed is not None:
        return frozenset(cpu for part in listed.group(1).split(",") for cpu in _parse_range(text, part))
    digits = _HEX.fullmatch(text)
    if digits is None or len(text) > _HEX_DIGITS_MAX:
        raise UsageError(f"{text[:80]!r} is not a cpumask: write hexadecimal such as 0x3, or a list such as [0,2-4]")
    mask = int(text.removeprefix(digits.group(1) or "").replace(",", ""), 16)
    return frozenset(cpu for cpu in range(mask.bit_length()) if mask >> cpu & 1)


def _parse_range(text: str, part: str) -> range:
    found = _RANGE.fullmatch(part)
    if found is None:
        raise UsageError(f"{text[:80]!r} is not a cpumask: in {part[:20]!r}, write CPUs as in [0,2-4]")
    first = int(found.group(1))
    last = int(found.group(2) or first)
    if last < first:
        raise UsageError(f"{text[:80]!r} is not a cpumask: {first}-{last} runs backwards")
    return range(first, last + 1)


def format_cpumask(cpus: Collection[int]) -> str:
    """The mask as hexadecimal with ``0x``, which `parse_cpumask` reads back."""
    return f"{sum(1 << cpu for cpu in frozenset(cpus)):#x}"


def format_list(cpus: Collection[int]) -> str:
    """The CPUs as a list, ``[0,2-4]``."""
    parts: list[list[int]] = []
    for cpu in sorted(cpus):
        if parts and parts[-1][-1] == cpu - 1:
            parts[-1][1:] = [cpu]
        else:
            parts.append([cpu])
    return "[" + ",".join("-".join(map(str, part)) for part in parts) + "]"
