"""The simulator shows what this kernel's driver shows, step by step. `make conformance` plays all scripts, this a part of them."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Any

import pytest

from tests.conformance.__main__ import Comparison, corpus
from tests.conformance.divergences import DIVERGENCES
from tests.conformance.features import sample
from tests.conformance.lockstep import Script
from tests.conformance.real_arm import RealArm
from ublk_trio.kernel_sim.queue import SimQueue

#: One script of so many, and what it takes to reach every feature: about a minute and a half in an emulated guest.
_EVERY = 10


@pytest.fixture
def comparison() -> Iterator[Comparison]:
    arm = RealArm()
    yield Comparison(arm)
    arm.close()


def test_sample_of_the_corpus(comparison: Comparison, capsys: pytest.CaptureFixture[str]) -> None:
    """Results, errnos, states and data are equal, or the difference is explained; and no explanation is superfluous."""
    scripts = [script for script in corpus() if script.since <= comparison.arm.release]
    some = sample(scripts, every=_EVERY, besides=[divergence.example for divergence in DIVERGENCES])
    status = comparison.run(some, whole=True)
    said = capsys.readouterr().out
    assert status == 0, said
    with capsys.disabled():
        print("", said.splitlines()[-1], end=" ")


def test_planted_difference(comparison: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    """A simulator that refuses with another errno than the driver is found out, at the very step."""
    script = Script(name="planted", steps=("up d0", "io p0.a FETCH t=0", "down d0"))
    assert comparison.compare(script) is None
    original = SimQueue.command

    def planted(self: SimQueue, *arguments: Any, **options: Any) -> Any:
        result = original(self, *arguments, **options)
        return -errno.ENOENT if result == -errno.EBUSY else result

    monkeypatch.setattr(SimQueue, "command", planted)
    difference = comparison.compare(script)
    assert difference is not None
    assert difference.step == "io p0.a FETCH t=0"
    assert (difference.expected, difference.shown) == (("p0.a FETCH = ENOENT",), ("p0.a FETCH = EBUSY",))
