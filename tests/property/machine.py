"""The engine and the simulator, driven together by Hypothesis: the state machine.

Every rule is one thing that a program, an application, a backend or the machine may do next; nothing runs but in the rules
that pump. After each rule that can change anything all of `invariants` are checked. What is found is a `BrokenError` that names the
invariant, under the shortest program that breaks it.

**Swarm.** Each run enables a random subset of the faults (`kernel_sim.faults`) and leaves a random subset of the owner's deeds out;
Hypothesis itself does the same with the rules. A run with everything in it rarely gets anywhere, and some bugs need that
one thing does not happen.

**Safety, then liveness.** The rules are the safety phase: anything may go wrong, nothing wrong may come of it. Then the faults stop
(`EngineRun.live_on`) and everything under way must finish: no tag is stuck, every operation ends, the target can be left.

What is decided while a rule runs comes from its ``tape``; so does which of several things it takes.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import ClassVar, TypeVar

import hypothesis.strategies as st
from hypothesis import note
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from tests.property.disks import Call, Disk
from tests.property.engine_run import EngineRun
from tests.property.model import BrokenError
from tests.property.plans import Ask, DiskPlan, batches, disk_plans, swarms
from tests.property.tape import Tape, tapes
from ublk_trio import SimKernel
from ublk_trio.kernel_sim import DrawnChoices, FirstChoice

#: Disks at a time, and in the life of a target.
DISKS_MAX = 3
STARTS_MAX = 5
#: Rules before a target's block may end: short lives and long ones.
LASTS = (30, 10, 0, 100)
T = TypeVar("T")


class EngineMachine(RuleBasedStateMachine):
    """See the module."""

    #: For reports: how many runs and rules there were, and what the first broken invariant was.
    runs: ClassVar[int] = 0
    steps: ClassVar[int] = 0
    broken: ClassVar[list[tuple[int, BrokenError]]] = []

    #: Where targets have workers; None: they have none.
    cpus: ClassVar[Collection[int] | None] = None

    @classmethod
    def begin_count(cls) -> None:
        """Start counting anew."""
        cls.runs = cls.steps = 0
        cls.broken = []

    def __init__(self) -> None:
        super().__init__()
        EngineMachine.runs += 1
        self.healthy = True
        self.engine: EngineRun | None = None
        self.tape = Tape()

    @initialize(
        tape=tapes,
        swarm=swarms,
        calm_kernel=st.booleans(),
        patient=st.booleans(),
        live=st.booleans(),
        lasts=st.sampled_from(LASTS),
        version=st.sampled_from([(7, 3), (7, 0), (6, 8), (6, 0)]),
        plan=disk_plans,
    )
    def begin(
        self,
        tape: bytes,
        swarm: tuple[frozenset[str], frozenset[str]],
        calm_kernel: bool,
        patient: bool,
        live: bool,
        lasts: int,
        version: tuple[int, int],
        plan: DiskPlan,
    ) -> None:
        self.faults, self.deeds = swarm
        self.patient = patient
        choices = FirstChoice() if calm_kernel else DrawnChoices(self.tape.choose)
        late = frozenset() if self.cpus is None else frozenset({"worker-late"})
        self.kernel = SimKernel(choices, version=version, faults=self.faults | late)
        with self._step(tape):
            engine = self._open(lasts)
            if not engine.killed:
                engine.start_disk(plan)
            if live:
                engine.run_until_idle()
            engine.check()

    def _open(self, lasts: int) -> EngineRun:
        self.may_leave_after = EngineMachine.steps + lasts
        self.engine = EngineRun(self.kernel, self.tape, self.faults, self.cpus)
        return self.engine

    @contextmanager
    def _step(self, tape: bytes = b"") -> Iterator[None]:
        """A rule's frame: what it finds broken keeps `teardown` from looking on."""
        EngineMachine.steps += 1
        self.tape.load(tape)
        self.healthy = False
        try:
            yield
        except BrokenError as broken:
            EngineMachine.broken.append((EngineMachine.runs, broken))
            raise
        self.healthy = True

    @property
    def running(self) -> EngineRun:
        assert self.engine is not None
        return self.engine

    def _pick(self, things: list[T]) -> T:
        return things[self.tape.choose("which", len(things))]

    # What a program does

    def _may_start(self) -> bool:
        engine = self.running
        if engine.ended:
            return True
        # With a limit, or most of a run would be starts; but something must always be possible.
        return (
            engine.inside
            and len(engine.present()) < DISKS_MAX
            and (len(engine.served) < STARTS_MAX or not engine.live())
            and ("start" in self.deeds or not engine.served)
        )

    @precondition(_may_start)
    @rule(tape=tapes, plan=disk_plans)
    def start_disk(self, tape: bytes, plan: DiskPlan) -> None:
        """Another disk; in another life of the server if this one is over."""
        with self._step(tape):
            if self.running.ended:
                self._open(LASTS[self.tape.choose("lasts", len(LASTS))])
            if not self.running.killed:
                self.running.start_disk(plan)
            self.running.check()

    def _possible(self) -> list[str]:
        engine = self.running
        if not engine.inside:
            return ["kill"] if "kill" in self.deeds and not engine.ended else []
        possible = {
            "stop": bool(engine.live()),
            "leave": EngineMachine.steps >= self.may_leave_after,
            "cancel start": bool(engine.starting()),
            "cancel stop": bool(engine.stop_scopes()),
            "kill": EngineMachine.steps >= self.may_leave_after,
        }
        return [deed for deed, is_possible in possible.items() if is_possible and deed in self.deeds]

    @precondition(lambda self: bool(self._possible()))
    @rule(tape=tapes)
    def interfere(self, tape: bytes) -> None:
        """The owner stops a disk, gives up waiting for one, leaves the target's block; or the process is killed."""
        with self._step(tape):
            deed = self._pick(self._possible())
            note(f"    # {deed}")
            engine = self.running
            if deed == "stop":
                engine.stop(self._pick(engine.live()), wait=bool(self.tape.choose("wait", 2)))
            elif deed == "leave":
                engine.leave(("return", "raise", "cancel")[self.tape.choose("how", 3)])
            elif deed == "cancel start":
                self._pick(engine.starting()).start_scope.cancel()
            elif deed == "cancel stop":
                self._pick(engine.stop_scopes()).cancel()
            else:
                engine.kill()
            engine.check()

    # What an application does

    @precondition(lambda self: bool(self.running.there()))
    @rule(tape=tapes, batch=batches)
    def submit(self, tape: bytes, batch: list[Ask]) -> None:
        with self._step(tape):
            engine = self.running
            for ask in batch:
                engine.submit(self._pick(engine.there()), ask)

    # What a backend and the machine do

    # Without preconditions: Hypothesis leaves rules out at random, and a run in which none is left is wasted.
    @rule(tape=tapes)
    def run_passes(self, tape: bytes) -> None:
        with self._step(tape):
            self.running.run_passes(1 + self.tape.choose("passes", 4))
            self.running.check()

    @rule(tape=tapes)
    def run_until_idle(self, tape: bytes) -> None:
        with self._step(tape):
            self.running.run_until_idle()
            self.running.check()

    def _outside(self) -> list[tuple[Disk, Call] | float]:
        """What can happen outside of the program: a call of a backend goes on, or time passes."""
        engine = self.running
        possible: list[tuple[Disk, Call] | float] = [*engine.waiting()]
        # Time only while nothing else can happen: a program that is not run for seconds is not what this is about.
        if engine.pumped.idle and (seconds := engine.pumped.seconds_to_next_deadline) < math.inf:
            possible.append(seconds)
        return possible

    @precondition(lambda self: bool(self._outside()))
    @rule(tape=tapes)
    def world_goes_on(self, tape: bytes) -> None:
        with self._step(tape):
            happens = self._pick(self._outside())
            if isinstance(happens, float):
                note(f"    # {happens} seconds pass, or half of them")
                self.running.let_time_pass((1.0, 0.5)[self.tape.choose("share", 2)] * happens)
                self.running.check()
            else:
                disk, call = happens
                note(f"    # {call} goes on")
                disk.release(call)

    # The end

    def teardown(self) -> None:
        if self.engine is None:
            return
        self.tape.calm = True
        try:
            if self.healthy:
                with self._step():
                    EngineMachine.steps -= 1
                    self.kernel.faults.clear()
                    self.engine.live_on(patient=self.patient)
        finally:
            self.engine.pumped.abandon()
