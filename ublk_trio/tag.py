"""The tag state machine: what the server may do with each tag, as a table.

**Theory of operation.** A queue has ``depth`` tags. A tag is a slot through which one request at a time passes. Seen
from the server, the kernel and the server take turns in owning it, and each turn ends with exactly one message:

- The server owns a tag until it sends a command for it (FETCH_REQ, COMMIT_AND_FETCH_REQ, NEED_GET_DATA).
- The kernel owns it from then until the command's completion. The buffer that the command named belongs to the kernel
  for
  as long: the server must neither read nor write it.
- A completion with result 0 delivers a request; with 1 (NEED_GET_DATA mode) it announces a WRITE whose data is
  still to be fetched; with -ENODEV (ABORT) it ends the tag's life: it is never fetched again. Any other result is a
  refusal: the kernel did not accept the command, and the tag is lost to this server.
- A delivered request must be committed, on every path. One that is not hangs the disk, and then whoever removes it.

So: every state has an owner, and the only states in which the server owes the kernel something are ANNOUNCED and
SERVING. An event that the table does not list is a bug in the engine (or a kernel that breaks its contract):
`Tags.step` raises `IllegalTagEventError` with queue, tag, state and event, and changes nothing.

Sans-IO: imports neither trio nor cffi. `docs/tag.md` is drawn from these tables (`make docs`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import IntEnum
from types import MappingProxyType

from ublk_trio.errors import IllegalTagEventError


class TagState(IntEnum):
    """Where a tag is, seen from the server."""

    UNFETCHED = 0
    FETCHING = 1
    ANNOUNCED = 2
    GETTING_DATA = 3
    SERVING = 4
    CLOSED = 5
    LOST = 6


class TagEvent(IntEnum):
    """What can happen to a tag: the first three are the server's commands, the rest completions."""

    FETCH = 0
    GET_DATA = 1
    COMMIT = 2
    DELIVERED = 3
    WRITE_ANNOUNCED = 4
    ABORTED = 5
    REFUSED = 6
    RING_CLOSED = 7


STATE_MEANING: Mapping[TagState, str] = MappingProxyType(
    {
        TagState.UNFETCHED: "the server has not sent FETCH_REQ yet",
        TagState.FETCHING: "the kernel owns it, idle or with a request on its way",
        TagState.ANNOUNCED: "a WRITE is here without its data; the server owes NEED_GET_DATA",
        TagState.GETTING_DATA: "the kernel is copying the WRITE's data",
        TagState.SERVING: "a request is here; the server owes a commit",
        TagState.CLOSED: "ended, never to be fetched again",
        TagState.LOST: "the kernel refused a command; only closing the ring helps",
    }
)

EVENT_MEANING: Mapping[TagEvent, str] = MappingProxyType(
    {
        TagEvent.FETCH: "the server sends FETCH_REQ",
        TagEvent.GET_DATA: "the server sends NEED_GET_DATA",
        TagEvent.COMMIT: "the server sends COMMIT_AND_FETCH_REQ",
        TagEvent.DELIVERED: "completion with result 0",
        TagEvent.WRITE_ANNOUNCED: "completion with result 1 (NEED_GET_DATA)",
        TagEvent.ABORTED: "completion with -ENODEV (ABORT)",
        TagEvent.REFUSED: "completion with any other result",
        TagEvent.RING_CLOSED: "the ring is gone; the kernel took the tag back",
    }
)

#: The states in which the kernel owns the tag and its buffer.
KERNEL_OWNS = frozenset({TagState.FETCHING, TagState.GETTING_DATA})
#: The states in which the server owes the kernel an answer.
SERVER_OWES = frozenset({TagState.ANNOUNCED, TagState.SERVING})
#: The states that a tag never leaves by a completion.
ENDED = frozenset({TagState.CLOSED, TagState.LOST})

TRANSITIONS: Mapping[TagState, Mapping[TagEvent, TagState]] = MappingProxyType(
    {
        TagState.UNFETCHED: {
            TagEvent.FETCH: TagState.FETCHING,
            TagEvent.RING_CLOSED: TagState.CLOSED,
        },
        TagState.FETCHING: {
            TagEvent.DELIVERED: TagState.SERVING,
            TagEvent.WRITE_ANNOUNCED: TagState.ANNOUNCED,
            TagEvent.ABORTED: TagState.CLOSED,
            TagEvent.REFUSED: TagState.LOST,
            TagEvent.RING_CLOSED: TagState.CLOSED,
        },
        TagState.ANNOUNCED: {
            TagEvent.GET_DATA: TagState.GETTING_DATA,
            TagEvent.RING_CLOSED: TagState.CLOSED,
        },
        TagState.GETTING_DATA: {
            TagEvent.DELIVERED: TagState.SERVING,
            TagEvent.ABORTED: TagState.CLOSED,
            TagEvent.REFUSED: TagState.LOST,
            TagEvent.RING_CLOSED: TagState.CLOSED,
        },
        TagState.SERVING: {
            TagEvent.COMMIT: TagState.FETCHING,
            TagEvent.RING_CLOSED: TagState.CLOSED,
        },
        TagState.CLOSED: {
            TagEvent.RING_CLOSED: TagState.CLOSED,
        },
        TagState.LOST: {
            TagEvent.RING_CLOSED: TagState.CLOSED,
        },
    }
)
assert set(TRANSITIONS) == set(TagState), "every state has its row"
assert not any(TagEvent.COMMIT in row for state, row in TRANSITIONS.items() if state is not TagState.SERVING)

# The same table, indexed by state and event: `step` runs twice a request.
_NEXT: tuple[tuple[TagState | None, ...], ...] = tuple(
    tuple(TRANSITIONS[state].get(event) for event in TagEvent) for state in TagState
)
_ENDED = tuple(state in ENDED for state in TagState)


class Tags:
    """The tags of one queue. All of their state changes go through `step`."""

    __slots__ = ("_open", "_states", "depth", "queue_id")

    def __init__(self, *, queue_id: int, depth: int) -> None:
        self.queue_id = queue_id
        self.depth = depth
        self._states = [TagState.UNFETCHED] * depth
        self._open = depth

    def __getitem__(self, tag: int) -> TagState:
        return self._states[tag]

    def step(self, tag: int, event: TagEvent) -> TagState:
        """Apply an event and return the new state; raises `IllegalTagEventError` and changes nothing if it is not
        allowed."""
        if not 0 <= tag < self.depth:
            raise IllegalTagEventError(
                f"queue {self.queue_id} has no tag {tag} (depth {self.depth}), but it got {event.name}"
            )
        state = self._states[tag]
        after = _NEXT[state][event]
        if after is None:
            raise IllegalTagEventError(
                f"queue {self.queue_id} tag {tag} is {state.name} ({STATE_MEANING[state]}) "
                f"and cannot take {event.name} ({EVENT_MEANING[event]})"
            )
        self._states[tag] = after
        if _ENDED[after] and not _ENDED[state]:
            self._open -= 1
        return after

    @property
    def all_ended(self) -> bool:
        """Whether no tag can ever carry a request again."""
        return self._open == 0

    def in_states(self, states: frozenset[TagState]) -> Iterator[int]:
        """The tags that are in one of the states, ascending."""
        return (tag for tag, state in enumerate(self._states) if state in states)

    def count(self, states: frozenset[TagState]) -> int:
        """How many tags are in one of the states."""
        return sum(1 for state in self._states if state in states)
