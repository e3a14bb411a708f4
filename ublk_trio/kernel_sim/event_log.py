"""What happened in a run, in the order in which it happened, as numbers and names only.

**Supported.** Every control command and its end, every per-tag command and completion, every request that gets a tag,
every operation and its end, states of devices, rings, decisions by name, breaches, injected faults; as tuples while the
run goes on, as lines of JSON and a digest afterwards. The same run gives the same lines on every machine: no clock, no
address, no process id, no order of a set.
**Rejected.** A kind of event that `EVENTS` does not name, or fields of another number or type: when the lines are made.
**Differs from Linux.** Nothing here acts. Data is left out: what was moved shows in the lengths, not in the bytes.

A module that has something to say does so in one line, ``if log is not None: log.append((kind, field, …))``. That costs
an attribute where there is no log, and where there is one a tuple.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Final, TypeAlias

from ublk_trio.uapi import IoCommand, IoFlag, IoOp

#: A kind of `EVENTS`, then its fields.
Event: TypeAlias = tuple[Any, ...]

#: In a fault's event: it is nobody's device.
NO_DEVICE: Final = -1
#: The hexadecimal digits of the running digest that `EventLog.marks` keeps of every event.
MARK_DIGITS: Final = 4


def _text(value: str) -> str:
    assert isinstance(value, str), f"{value!r} is not a text"
    return value


def _number(value: int) -> int:
    assert isinstance(value, int), f"{value!r} is not a whole number"
    return int(value)


def _seconds(value: float) -> float:
    assert isinstance(value, int | float), f"{value!r} is not a number"
    return value


def _command(value: int) -> str:
    return IoCommand(value).name if value in IoCommand._value2member_map_ else f"command {value:#x}"


def _operation(value: int) -> str:
    """``WRITE`` or ``WRITE|FUA`` of a descriptor's op_flags, or of an operation alone."""
    op = value & 0xFF
    name = IoOp(op).name if op in IoOp._value2member_map_ else f"operation {op}"
    return "|".join([name, *(str(flag.name) for flag in IoFlag if flag & value)])


_Fields: TypeAlias = tuple[tuple[str, Callable[[Any], str | int | float]], ...]
_DEVICE: Final[_Fields] = (("device", _number),)
_QUEUE: Final[_Fields] = (*_DEVICE, ("queue", _number))
_TAG: Final[_Fields] = (*_QUEUE, ("tag", _number))

#: Each kind of event with its fields, in order: their names, and what makes text or a number of them.
EVENTS: Final[Mapping[str, _Fields]] = MappingProxyType(
    {
        # Decisions, and what is not the kernel's doing.
        "choice": (("what", _text), ("options", _number), ("chosen", _number)),
        "fault": (("name", _text), *_DEVICE, ("text", _text)),
        "phase": (("name", _text),),
        "step": (("number", _number), ("text", _text)),
        "time": (("seconds", _seconds),),
        # Control commands: when they are sent, and their results.
        "control-sent": (("command", _text), *_DEVICE),
        "control": (("command", _text), *_DEVICE, ("result", _number)),
        # Devices and rings.
        "state": (*_DEVICE, ("state", _text)),
        "deleted": _DEVICE,
        "crash": _DEVICE,
        "ring-opened": (*_QUEUE, ("depth", _number)),
        "ring-closed": _QUEUE,
        # Operations of applications, in bytes, and the requests that they become.
        "bio": (("bio", _number), ("op", _operation), ("offset", _number), ("length", _number)),
        "bio-done": (("bio", _number), ("result", _number)),
        "request": (*_TAG, ("bio", _number)),
        # Per-tag commands, as they are sent, and completions, as they are reaped. A descriptor comes with a request only.
        "command": (*_TAG, ("command", _command), ("result", _number)),
        "event": (
            *_TAG,
            ("result", _number),
            ("op", _operation),
            ("sectors", _number),
            ("start_sector", _number),
        ),
        "sqe": (("opcode", _text), ("user_data", _number), ("command", _number)),
        "batch": (*_QUEUE, ("command", _number), ("elements", _number)),
        "violation": (("kind", _text), *_TAG),
    }
)
#: How many of a kind's last fields may be left out: an event without a request has no descriptor.
_OPTIONAL: Final[Mapping[str, int]] = MappingProxyType({"event": 3})


def as_record(event: Event) -> dict[str, str | int | float]:
    """The event's fields by name, ``event`` (its kind) first. Raises `ValueError` for what is not in `EVENTS`."""
    kind, *values = event
    fields = EVENTS.get(kind)
    if fields is None or not len(fields) - _OPTIONAL.get(kind, 0) <= len(values) <= len(fields):
        raise ValueError(f"no such event: {event}; EVENTS in event_log.py says which there are")
    record: dict[str, str | int | float] = {"event": kind}
    for (name, convert), value in zip(fields, values, strict=False):
        record[name] = convert(value)
    return record


class EventLog(list[Event]):
    """The events of one run, oldest first: a list of tuples, for its speed. Made by ``SimKernel(log=True)``."""

    __slots__ = ()

    def records(self) -> Iterator[dict[str, str | int | float]]:
        """Each event as a dictionary, see `as_record`."""
        return map(as_record, self)

    def lines(self) -> Iterator[str]:
        """Each event as one line of JSON, without the line's end."""
        for record in self.records():
            yield json.dumps(record, separators=(",", ":"))

    def digest(self) -> str:
        """SHA-256 of the lines, in hexadecimal: equal for equal runs, in every process and on every Python."""
        return self._summary()[0]

    def marks(self) -> str:
        """`MARK_DIGITS` digits per event, of the digest up to and with it: two runs' first difference shows in them."""
        return self._summary()[1]

    def _summary(self) -> tuple[str, str]:
        running = hashlib.sha256()
        marks = []
        for line in self.lines():
            running.update(line.encode() + b"\n")
            marks.append(running.hexdigest()[:MARK_DIGITS])
        return running.hexdigest(), "".join(marks)
