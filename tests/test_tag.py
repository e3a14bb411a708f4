"""The tag state machine: the table is the whole truth, and what it forbids changes nothing."""

from __future__ import annotations

import itertools
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ublk_trio.errors import IllegalTagEventError
from ublk_trio.tag import (
    ENDED,
    EVENT_MEANING,
    KERNEL_OWNS,
    SERVER_OWES,
    STATE_MEANING,
    TRANSITIONS,
    TagEvent,
    Tags,
    TagState,
)

#: The shortest legal way to each state.
PATHS: dict[TagState, list[TagEvent]] = {
    TagState.UNFETCHED: [],
    TagState.FETCHING: [TagEvent.FETCH],
    TagState.ANNOUNCED: [TagEvent.FETCH, TagEvent.WRITE_ANNOUNCED],
    TagState.GETTING_DATA: [TagEvent.FETCH, TagEvent.WRITE_ANNOUNCED, TagEvent.GET_DATA],
    TagState.SERVING: [TagEvent.FETCH, TagEvent.DELIVERED],
    TagState.CLOSED: [TagEvent.FETCH, TagEvent.ABORTED],
    TagState.LOST: [TagEvent.FETCH, TagEvent.REFUSED],
}

#: Every legal step besides RING_CLOSED, spelt out a second time, so that an edit of the table must be meant.
LEGAL = {
    (TagState.UNFETCHED, TagEvent.FETCH, TagState.FETCHING),
    (TagState.FETCHING, TagEvent.DELIVERED, TagState.SERVING),
    (TagState.FETCHING, TagEvent.WRITE_ANNOUNCED, TagState.ANNOUNCED),
    (TagState.FETCHING, TagEvent.ABORTED, TagState.CLOSED),
    (TagState.FETCHING, TagEvent.REFUSED, TagState.LOST),
    (TagState.ANNOUNCED, TagEvent.GET_DATA, TagState.GETTING_DATA),
    (TagState.GETTING_DATA, TagEvent.DELIVERED, TagState.SERVING),
    (TagState.GETTING_DATA, TagEvent.ABORTED, TagState.CLOSED),
    (TagState.GETTING_DATA, TagEvent.REFUSED, TagState.LOST),
    (TagState.SERVING, TagEvent.COMMIT, TagState.FETCHING),
} | {(state, TagEvent.RING_CLOSED, TagState.CLOSED) for state in TagState}


def in_state(state: TagState, *, depth: int = 2, tag: int = 1) -> Tags:
    tags = Tags(queue_id=3, depth=depth)
    for event in PATHS[state]:
        tags.step(tag, event)
    return tags


@pytest.mark.parametrize(("state", "event"), list(itertools.product(TagState, TagEvent)))
def test_every_cell(state: TagState, event: TagEvent) -> None:
    """Each event in each state does what is spelt out, or raises with queue, tag, state and event and changes nothing."""
    tags = in_state(state)
    after = {new for old, happened, new in LEGAL if (old, happened) == (state, event)}
    if after:
        assert tags.step(1, event) is after.pop() is tags[1]
    else:
        with pytest.raises(IllegalTagEventError, match=rf"queue 3 tag 1 is {state.name} .*{event.name}"):
            tags.step(1, event)
        assert tags[1] is state
    assert tags[0] is TagState.UNFETCHED


def test_table_is_what_is_spelt_out() -> None:
    """The exported table, from which the documentation is drawn, has exactly the legal steps."""
    assert {(state, event, after) for state, row in TRANSITIONS.items() for event, after in row.items()} == LEGAL


def test_states_and_events_are_what_they_are_called() -> None:
    """No two are the same number, the numbers are indices, and each has its meaning in words."""
    for kind, meaning in ((TagState, STATE_MEANING), (TagEvent, EVENT_MEANING)):
        assert [member.value for member in kind] == list(range(len(kind.__members__)))
        assert set(meaning) == set(kind)


def test_every_state_has_one_owner() -> None:
    """No state is both the kernel's and the server's, and the server owes nothing for a tag that has ended."""
    assert not KERNEL_OWNS & SERVER_OWES
    assert not ENDED & (KERNEL_OWNS | SERVER_OWES)
    assert frozenset(TagState) == KERNEL_OWNS | SERVER_OWES | ENDED | {TagState.UNFETCHED}


@pytest.mark.parametrize("tag", [-1, 2, 65535])
def test_unknown_tag(tag: int) -> None:
    """A tag outside the queue is refused by number, and never wraps around to another one."""
    tags = Tags(queue_id=0, depth=2)
    with pytest.raises(IllegalTagEventError, match=f"has no tag {tag} "):
        tags.step(tag, TagEvent.FETCH)
    assert [tags[0], tags[1]] == [TagState.UNFETCHED, TagState.UNFETCHED]


@pytest.mark.parametrize("tag", range(3))
def test_every_tag_of_the_queue_can_step(tag: int) -> None:
    """From the first to the last; and none but the one that was meant."""
    tags = Tags(queue_id=0, depth=3)
    tags.step(tag, TagEvent.FETCH)
    assert [tags[other] for other in range(3)] == [
        TagState.FETCHING if other == tag else TagState.UNFETCHED for other in range(3)
    ]


@pytest.mark.parametrize("end", [TagEvent.ABORTED, TagEvent.REFUSED, TagEvent.RING_CLOSED])
def test_all_have_ended_when_the_last_has(end: TagEvent) -> None:
    """A tag ends once, however often it is told that the ring is gone; and none but a tag's end counts."""
    tags = Tags(queue_id=0, depth=3)
    for tag in range(3):
        assert not tags.all_ended
        tags.step(tag, TagEvent.FETCH)
        assert not tags.all_ended
        tags.step(tag, end)
        assert tags.all_ended == (tag == 2)
        tags.step(tag, TagEvent.RING_CLOSED)
        assert tags.all_ended == (tag == 2)


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(TagEvent)), max_size=60))
def test_counts_agree_with_states(steps: list[tuple[int, TagEvent]]) -> None:
    """`all_ended` and `count` say after any history what the states themselves say."""
    tags = Tags(queue_id=0, depth=4)
    for tag, event in steps:
        try:
            tags.step(tag, event)
        except IllegalTagEventError:
            continue
    states = [tags[tag] for tag in range(4)]
    assert tags.all_ended == all(state in ENDED for state in states)
    assert tags.count(SERVER_OWES) == sum(state in SERVER_OWES for state in states)
    assert list(tags.in_states(KERNEL_OWNS)) == [tag for tag in range(4) if states[tag] in KERNEL_OWNS]


def test_core_is_sans_io() -> None:
    """The state machine can be used, and read, without an event loop or a kernel: it imports neither trio nor cffi."""
    import subprocess

    code = (
        "import sys, importlib.util as u\n"
        "sys.modules['ublk_trio'] = type(sys)('ublk_trio'); sys.modules['ublk_trio'].__path__ = [sys.argv[1]]\n"
        "import ublk_trio.tag\n"
        "assert not {'trio', 'cffi', '_cffi_backend'} & set(sys.modules), sorted(sys.modules)\n"
    )
    package = __import__("ublk_trio").__path__[0]
    subprocess.run([sys.executable, "-c", code, package], check=True)
