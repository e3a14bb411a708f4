"""Runs of a mirror that chance takes long to come upon; each with what it is about."""

from __future__ import annotations

import errno

import attrs

from tests.backends.raid1_run import Ask, Cancel, Change, Fail, Name, Pass, Program, Step
from tests.backends.raid_members import SECTOR, When
from ublk_trio.kernel_sim import Choices
from ublk_trio.testing import Operation

ALL = Pass(until="all")
#: For a crash: nothing survives that was not settled.
LOSES_ALL = 2
#: For a call: it suspends for one pass; for a second.
PASS, SLEEP = 1, 3


class Planned(Choices):
    """The calls of backends suspend as listed, and then not any more; a crash loses all that it may; all else is calm."""

    def __init__(self, suspensions: tuple[int, ...]) -> None:
        super().__init__()
        self.suspensions = list(suspensions)

    def pick(self, what: str, options: int) -> int:
        if what == "crash keeps":
            return LOSES_ALL
        return self.suspensions.pop(0) if what == "suspend" and self.suspensions else 0


@attrs.frozen(kw_only=True)
class PlannedRun:
    """A program with its decisions."""

    about: str
    program: Program
    suspensions: tuple[int, ...] = ()


def ask(name: Name, first: int = 0, count: int = 0, *, failing: tuple[int, ...] = (), fua: bool = False) -> Ask:
    """Sectors from `first` on; these backends fail half way."""
    operation = Operation(name=name, offset=first * SECTOR, length=count * SECTOR, fua=fua)
    return Ask(operation=operation, failing=frozenset(failing), when="middle")


def planned(about: str, members: int, *steps: Step, suspensions: tuple[int, ...] = ()) -> PlannedRun:
    return PlannedRun(about=about, program=Program(members=members, steps=list(steps)), suspensions=suspensions)


def fail(backend: int, when: When, *, number: int = errno.EIO) -> Fail:
    """Its next write fails."""
    return Fail(backend=backend, call="write", number=number, when=when, times=1)


def passes(number: int) -> Pass:
    return Pass(until="passes", passes=number)


CORPUS = [
    planned("flush, then a crash", 3, ask("write", 3, 4), ALL, ask("flush"), ALL),
    planned("a flush fails on one", 2, ask("write", 0, 2), ALL, ask("flush", failing=(0,)), ALL),
    planned("a flush fails on all", 2, ask("write", 0, 2), ALL, ask("flush", failing=(0, 1)), ALL, ask("flush"), ALL),
    planned("a write fails on all", 3, ask("write", 0, 4, failing=(0, 1, 2)), ALL, ask("read", 0, 4), ALL),
    planned("FUA, then a crash", 2, ask("write", 5, 2, fua=True), ALL),
    planned(
        "overlapping writes, one late on each member", 2, ask("write", 0, 4), ask("write", 2, 4), ALL,
        suspensions=(SLEEP, 0, 0, SLEEP),
    ),
    planned(
        "the last member in sync fails a write while another is rebuilt", 1,
        Change(what="rebuild", backend=1), passes(3), ask("write", 0, 2, failing=(0,)), ALL,
        suspensions=(PASS,) * 20,
    ),
    planned(
        "written where a rebuild has been, and where it is", 1,
        Change(what="rebuild", backend=1), passes(4), ask("write", 0, 3), ask("write", 3, 4), passes(3),
        ask("write_zeroes", 6, 4), ALL,
        suspensions=(PASS,) * 40,
    ),
    planned("a rebuild, then a crash of the other", 1, Change(what="rebuild", backend=1), ALL),
    planned(
        "overwritten while a failed read is mended", 2,
        ask("read", 0, 2, failing=(0,)), passes(2), ask("write", 0, 2), ALL,
        suspensions=(0, 0, SLEEP),
    ),
    planned(
        "cancelled between two members", 2, ask("write", 0, 4), Cancel(what="operation"), ALL, ask("read", 0, 4), ALL,
        suspensions=(0, SLEEP),
    ),
    planned(
        "removed under a flush, and rebuilt", 2,
        ask("flush"), Change(what="remove", backend=0), ask("write", 0, 2), ALL, Change(what="rebuild", backend=0), ALL,
        suspensions=(SLEEP,),
    ),
    planned(
        "a write fails on all, at different places", 2,
        fail(0, "before"), fail(1, "middle"), ask("write", 0, 4), ALL, ask("read", 0, 4), ALL,
    ),
    planned(
        "written while its window is copied", 1,
        Change(what="rebuild", backend=1), passes(3), ask("write", 2, 1), ALL,
        suspensions=(0, SLEEP),
    ),
    planned(
        "read while another is rebuilt", 1,
        Change(what="rebuild", backend=1), passes(2), ask("read", 8, 1), ask("read", 9, 1), ask("read", 10, 1), ALL,
        suspensions=(SLEEP,),
    ),
    planned(
        "short of resources for a moment", 2,
        fail(0, "before", number=errno.ENOMEM), fail(1, "middle", number=errno.ENOMEM), ask("write", 0, 4), ALL,
    ),
]  # fmt: skip
