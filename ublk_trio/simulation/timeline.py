"""A run as one page for a browser: a lane for each device, queue and tag, over the events of its log.

Everything is worked out here, from the log; the page, `timeline.html`, only draws. What of a log goes where is in the
tables below.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import Final

import attrs

from ublk_trio.errors import errno_name
from ublk_trio.kernel_sim import EventLog
from ublk_trio.kernel_sim.event_log import NO_DEVICE, as_record
from ublk_trio.simulation.run import Report
from ublk_trio.uapi import ANY_DEVICE_ID, IO_RES_ABORT, IO_RES_NEED_GET_DATA, MAX_NR_QUEUES, DeviceState, IoCommand

#: What a lane's span can mean, with words for the legend. The page has a colour for each.
STATES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "FETCHING": "the kernel has the tag, nothing is on it",
        "QUEUED": "a request is on the tag, not delivered yet",
        "SERVING": "the server has the request",
        "ANNOUNCED": "a WRITE was announced, its data not asked for yet",
        "GETTING_DATA": "the data is on its way",
        "DEAD": "device added, not live",
        "LIVE": "device live",
        "QUIESCED": "device without a server, requests held",
        "FAIL_IO": "device without a server, requests fail",
        "COMMAND": "a control command is with the kernel",
    }
)
#: How an event is marked in its lane, with words for the legend.
MARKS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "command": "command, from the server to the kernel",
        "completion": "completion, from the kernel to the server",
        "refused": "completion with an errno",
        "point": "any other event",
        "choice": "decision, as high as it is far from calm",
        "fault": "injected fault, killed server, breach of the contract",
    }
)
_COMMAND_STATE: Final[Mapping[int, str]] = {
    IoCommand.FETCH_REQ: "FETCHING",
    IoCommand.COMMIT_AND_FETCH_REQ: "FETCHING",
    IoCommand.NEED_GET_DATA: "GETTING_DATA",
}
_FAULTS: Final = frozenset({"fault", "crash", "violation"})
_RUN: Final = frozenset({"phase", "step", "time"})
_TAG_EVENTS: Final = frozenset({"request", "command", "event"})
_DEVICE_EVENTS: Final = frozenset({"control-sent", "control", "state", "deleted", "ring-opened", "ring-closed"})


@attrs.define
class Lane:
    """A row of the page: a label, its spans ``[first event, event after the last, state, text]``, and whose it is."""

    label: str
    device: int | None
    kind: str
    spans: list[list[int | str]] = attrs.Factory(list)

    def begin(self, number: int, state: str | None, text: str = "") -> None:
        """From this event on the lane is in that state, or in none."""
        self.end(number)
        if state is not None:
            self.spans.append([number, -1, state, text])

    def end(self, number: int) -> None:
        if self.spans and self.spans[-1][1] == -1:
            self.spans[-1][1] = number


class _Lanes:
    """The lanes of a log; made on demand, in the order in which they are shown."""

    def __init__(self) -> None:
        self._lanes: dict[tuple[int, ...], Lane] = {}

    def run(self, row: int) -> Lane:
        label, kind = (("faults", "faults"), ("choices", "choices"), ("run", "run"), ("operations", "run"))[row]
        return self._lane((-1, row), label, None, kind)

    def device(self, device: int) -> Lane:
        return self._lane((device, -2), f"device {device}", device, "device")

    def commands(self, device: int) -> Lane:
        if device == ANY_DEVICE_ID:
            return self._lane((-1, 4), "driver", None, "commands")
        self.device(device)  # it has a heading, even if it was refused
        return self._lane((device, -1), "  commands", device, "commands")

    def tag(self, device: int, queue: int, tag: int) -> Lane:
        return self._lane((device, queue, tag), f"  queue {queue} tag {tag}", device, "tag")

    def other_tags(self, device: int) -> Lane:
        return self._lane((device, MAX_NR_QUEUES), "  other tags", device, "tag")

    def tags_of(self, device: int, queue: int) -> list[Lane]:
        return [lane for key, lane in self._lanes.items() if len(key) == 3 and key[:2] == (device, queue)]

    def _lane(self, key: tuple[int, ...], label: str, device: int | None, kind: str) -> Lane:
        if key not in self._lanes:
            self._lanes[key] = Lane(label, device, kind)
        return self._lanes[key]

    def ordered(self) -> list[Lane]:
        return [self._lanes[key] for key in sorted(self._lanes)]


def lanes_of(log: EventLog) -> tuple[list[Lane], list[Lane], list[str]]:
    """The lanes in the order of the page; each event's lane; each event's mark.

    The tags of a device that never got a request share a lane.
    """
    lanes = _Lanes()
    used = {event[1:4] for event in log if event[0] == "request"}
    for row in range(4):
        lanes.run(row)
    owners: list[Lane] = []
    marks: list[str] = []
    for number, event in enumerate(log):
        kind = event[0]
        mark = "point"
        if kind == "choice":
            owner, mark = lanes.run(1), "choice"
        elif kind in _FAULTS:
            owner, mark = lanes.run(0), "fault"
        elif kind in _RUN:
            owner = lanes.run(2)
        elif kind in _DEVICE_EVENTS:
            owner, mark = _device_event(lanes, number, event)
        elif kind in _TAG_EVENTS:
            if event[1:4] in used:
                owner = lanes.tag(*event[1:4])
                mark = _tag_event(owner, number, event)
            else:
                owner = lanes.other_tags(event[1])
        else:
            owner = lanes.run(3)
            mark = "refused" if kind == "bio-done" and event[2] < 0 else "point"
        owners.append(owner)
        marks.append(mark)
    ordered = lanes.ordered()
    for lane in ordered:
        lane.end(len(log))
    return ordered, owners, marks


def _device_event(lanes: _Lanes, number: int, event: tuple[object, ...]) -> tuple[Lane, str]:
    kind, *fields = event
    if kind in ("control-sent", "control"):
        name, device, *results = fields
        assert isinstance(name, str)
        assert isinstance(device, int)
        lane = lanes.commands(device)
        if kind == "control-sent":
            lane.spans.append([number, -1, "COMMAND", name])
            return lane, "command"
        result = results[0]
        assert isinstance(result, int)
        # The oldest of that name: two callers may have sent the same.
        for span in lane.spans:
            if span[1] == -1 and span[3] == name:
                span[1] = number
                break
        if name == "ADD_DEV" and result >= 0 and device != ANY_DEVICE_ID:
            lanes.device(device).begin(number, DeviceState.DEAD.name)
        return lane, "refused" if result < 0 else "completion"
    device = fields[0]
    assert isinstance(device, int)
    lane = lanes.device(device)
    if kind == "state":
        state = fields[1]
        assert isinstance(state, str)
        lane.begin(number, state)
    elif kind == "deleted":
        lane.begin(number, None)
    elif kind == "ring-closed":
        queue = fields[1]
        assert isinstance(queue, int)
        for tag in lanes.tags_of(device, queue):
            tag.begin(number, None)
    return lane, "point"


def _tag_event(lane: Lane, number: int, event: tuple[object, ...]) -> str:
    kind = event[0]
    if kind == "request":
        lane.begin(number, "QUEUED", f"operation {event[4]}")
        return "point"
    if kind == "command":
        command = event[4]
        assert isinstance(command, int)
        state = _COMMAND_STATE.get(command)
        if state is not None:
            lane.begin(number, state)
        return "command"
    result = event[4]
    assert isinstance(result, int)
    if result < 0:
        if result == IO_RES_ABORT:
            lane.begin(number, None)
        return "refused"
    lane.begin(number, "ANNOUNCED" if result == IO_RES_NEED_GET_DATA else "SERVING")
    return "completion"


def page_data(report: Report) -> dict[str, object]:
    """What the page draws, as JSON has it."""
    log = report.log
    lanes, owners, marks = lanes_of(log)
    index = {id(lane): number for number, lane in enumerate(lanes)}
    mark_names = list(MARKS)
    return {
        "title": report.options.command_line(),
        "digest": log.digest(),
        "problems": list(report.problems),
        "states": [[name, text] for name, text in STATES.items()],
        "marks": [[name, text] for name, text in MARKS.items()],
        "lanes": [attrs.astuple(lane) for lane in lanes],
        "events": [
            [index[id(owner)], mark_names.index(mark), *_words(event)]
            for event, owner, mark in zip(log, owners, marks, strict=True)
        ],
    }


def _words(event: tuple[object, ...]) -> tuple[str, str]:
    """An event's kind and its fields, in words."""
    record = as_record(event)
    kind = str(record.pop("event"))
    if kind == "choice":
        return kind, f"{record['what']}: {record['chosen']} of {record['options']}"
    if record.get("device") in (ANY_DEVICE_ID, NO_DEVICE):
        record["device"] = "any"
    result = record.get("result")
    if isinstance(result, int) and result < 0:
        record["result"] = errno_name(result)
    unnamed = (kind, "name", "text")
    words = (str(value) if name in unnamed else f"{name} {value}" for name, value in record.items())
    return kind, " ".join(filter(None, words))


def write_timeline(path: Path, report: Report) -> None:
    """Write the page; one file, which needs no other. Raises `OSError`."""
    data = json.dumps(page_data(report), separators=(",", ":"))
    # In a script element only "<" could end it or begin a comment.
    page = files(__package__).joinpath("timeline.html").read_text(encoding="utf-8")
    page = page.replace("@TITLE@", html.escape(report.options.command_line()))
    path.write_text(page.replace("@RUN@", data.replace("<", "\\u003c")), encoding="utf-8")
