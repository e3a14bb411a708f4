"""Every run of a tiny scenario, one after the other."""

from __future__ import annotations

import math

import pytest
import trio

from tests.sim.mini import COMMIT, Started, basic_params, live, machine
from ublk_trio.kernel_sim import Choices, ReplayDivergedError, SimKernel, exhaust
from ublk_trio.ring import pack_answer
from ublk_trio.uapi import IO_RES_ABORT, IoOp


def test_every_list_of_choices_once() -> None:
    """Each combination of answers is seen exactly once, also where an answer decides what is asked next."""
    seen = []

    def run(choices: Choices) -> None:
        first = choices.choose("first", 3)
        seen.append((first, *(choices.choose(f"then {i}", 2) for i in range(first))))

    assert exhaust(run) == 1 + 2 + 4
    assert seen == sorted(set(seen))
    assert len(seen) == 7


def test_every_order() -> None:
    """Picking from what is left, n times, gives all n! orders."""

    def run(choices: Choices) -> None:
        left = list("abcd")
        orders.add("".join(left.pop(choices.choose("next", len(left))) for _ in range(4)))

    orders: set[str] = set()
    assert exhaust(run) == len(orders) == math.factorial(4)


def test_without_a_choice_there_is_one_run() -> None:
    assert exhaust(lambda choices: choices.choose("only", 1)) == 1


def test_a_failure_names_its_choices() -> None:
    """What fails in one of the runs comes out as it is, and says which choices led there."""

    def run(choices: Choices) -> None:
        assert (choices.choose("a", 2), choices.choose("b", 2)) != (1, 0)

    with pytest.raises(AssertionError) as caught:
        exhaust(run)
    assert caught.value.__notes__ == ["run 3 of an exhaustive search, with the choices [('a', 2, 1), ('b', 2, 0)]"]


def test_a_run_that_depends_on_more_than_its_choices() -> None:
    """A scenario that another run changes is found out, whether it asks something else or less than before."""
    counts = iter(range(2, 9))
    with pytest.raises(ReplayDivergedError, match="recorded what of 2"):
        exhaust(lambda choices: choices.choose("what", next(counts)))
    asks = iter([2, 1])
    with pytest.raises(ReplayDivergedError, match="1 decisions less"):
        exhaust(lambda choices: [choices.choose("what", 2) for _ in range(next(asks))])


def test_too_many_runs() -> None:
    """A scenario that is not tiny is given up, and not silently."""
    with pytest.raises(ValueError, match="not exhausted after 10 runs"):
        exhaust(lambda choices: [choices.choose("what", 2) for _ in range(9)], runs_max=10)


# ---------------------------------------------------------------------- the simulator, exhaustively


class _Server:
    """One queue served a step at a time, from a bytearray, until every tag was aborted."""

    def __init__(self, device: Started) -> None:
        self.device = device
        self.data = bytearray(4096)
        self.held: list[int] = []
        self.aborted = 0

    def step(self, choices: Choices) -> None:
        """Reap once, and answer one of the requests that are held, if the choices say so."""
        queue = self.device.queue
        for event in queue.events():
            if event.result == IO_RES_ABORT:
                self.aborted += 1
                continue
            assert event.result == 0
            start = event.start_sector * 512
            if event.op is IoOp.WRITE:
                self.data[start : start + event.length] = queue.buffer(event.tag)[: event.length]
            elif event.op is IoOp.READ:
                queue.buffer(event.tag)[: event.length] = self.data[start : start + event.length]
            self.held.append(pack_answer(COMMIT, event.tag, event.length))
        if self.held and not choices.choose("keep", 2):
            queue.ring.commit([self.held.pop(choices.choose("answer", len(self.held)))])


def _explore(choices: Choices, *, depth: int, seen: set[tuple[object, ...]]) -> None:
    """Two writes to one block; STOP_DEV comes before, between or after any of the steps."""
    # Nobody cancels a command here: whether it comes before that is no question.
    choices.off = frozenset({"command-before-cancel"})
    kernel = SimKernel(choices, partition_scan=False)

    async def main() -> None:
        async with machine(kernel) as m, live(m, params=basic_params(size=4096), depth=depth) as device:
            server = _Server(device)
            stop_before = choices.choose("stop before step", 4)
            bios = []
            async with trio.open_nursery() as nursery:
                for step in range(4):
                    if step == stop_before:
                        nursery.start_soon(m.stop)
                        await trio.testing.wait_all_tasks_blocked()
                    if step < 2:
                        bios.append(device.disk.submit(IoOp.WRITE, 0, bytes([step + 1]) * 512))
                    server.step(choices)
                choices.calm_down()
                while server.aborted < depth:
                    server.step(choices)
                    await trio.testing.wait_all_tasks_blocked()
            assert all(bio.done for bio in bios)
            written = [bytes([number + 1]) * 512 for number, bio in enumerate(bios) if bio.result == 512]
            assert server.data[:512] in (written or [bytes(512)])
            seen.add((stop_before, *(bio.result for bio in bios), server.data[0]))
        kernel.check()

    trio.run(main)
    assert kernel.leftovers() == []


@pytest.mark.parametrize("depth", [1, 2])
def test_every_interleaving_of_two_writes_and_a_stop(depth: int) -> None:
    """One queue, two requests, a stop at any moment: in every run each request ends once, and nothing is left."""
    seen: set[tuple[object, ...]] = set()
    runs = exhaust(lambda choices: _explore(choices, depth=depth, seen=seen))
    # A stop before the first request, before the second, and after both.
    assert {results[1:3] for results in seen} == {(-6, -6), (512, -5), (512, 512)}
    # With two tags the writes may be carried out in either order.
    assert {results[3] for results in seen if results[1:3] == (512, 512)} == ({2} if depth == 1 else {1, 2})
    assert runs > len(seen)
