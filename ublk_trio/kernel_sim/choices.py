"""Every decision that a kernel is free to make, in one place.

Which queue a request goes to, which tag it gets, how many completions a reap finds and in which order, which held
command goes on first, whether a wait wakes up for nothing: all of these ask the kernel's one `Choices` object. A run is
its list of answers, so it replays exactly.

**Supported.** Always 0 (calm), seeded, recorded, drawn through any callable (Hypothesis' ``data.draw`` among them), and
every possible run, one after the other (`exhaust`). Questions can be switched off by name, and all of them at once.
**Rejected.** A number of options below 1; a replay that asks another question than the recording did.
**Differs from Linux.** Only decisions are free: copies, checks and state changes happen at once and in one order.

Option 0 is always what an idle machine would do: in order, at once, everything.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Final

import attrs

if TYPE_CHECKING:
    from ublk_trio.kernel_sim.event_log import EventLog

#: Runs that `exhaust` makes before it says that the scenario is not a tiny one.
RUNS_MAX: Final = 100_000


class ReplayDivergedError(Exception):
    """A replayed run asked something else than the recorded one: the code or its input changed in between."""


@attrs.frozen
class Choice:
    """One decision: what was asked, how many options there were, and which was taken."""

    what: str
    options: int
    chosen: int


class Choices:
    """Base of all sources of decisions. A subclass says how to `pick`; `choose` checks and records.

    ``calm`` promises that every answer is 0 and that no trace is wanted; the simulator then does not ask at all. ``off``
    names the questions that are answered with 0 and not recorded. Both may change during a run, and must then change at
    the same point of its replay. Every recorded decision goes to ``log``, too, if there is one.
    """

    calm: bool = False
    off: frozenset[str] = frozenset()

    def __init__(self) -> None:
        self.trace: list[Choice] = []
        self.log: EventLog | None = None

    def choose(self, what: str, options: int) -> int:
        """A number from 0 to ``options`` - 1. With one option nothing is asked and nothing recorded."""
        if options <= 1 or self.calm or what in self.off:
            assert options >= 1, f"{what}: {options} options"
            return 0
        chosen = self.pick(what, options)
        assert 0 <= chosen < options, f"{what}: option {chosen} of {options}"
        self.trace.append(Choice(what, options, chosen))
        if self.log is not None:
            self.log.append(("choice", what, options, chosen))
        return chosen

    def calm_down(self) -> None:
        """From now on every answer is 0, and nothing is recorded any more. A replay must do so at the same point."""
        self.calm = True

    def pick(self, what: str, options: int) -> int:
        """The decision itself; ``options`` is at least 2."""
        raise NotImplementedError

    def save_trace(self, path: Path) -> None:
        """Write the decisions so far, one a line, for `RecordedChoices.load`."""
        path.write_text("".join(json.dumps(attrs.astuple(choice)) + "\n" for choice in self.trace))


class FirstChoice(Choices):
    """Always the first option: a calm machine. ``record`` makes it keep a trace, which costs speed."""

    def __init__(self, *, record: bool = False) -> None:
        super().__init__()
        self.calm = not record

    def pick(self, what: str, options: int) -> int:
        return 0


class SeededChoices(Choices):
    """A generator of its own, started from ``seed``: the same seed gives the same run.

    ``calm_percent`` is how often, in percent, option 0 is taken without looking further: at 0 every option is equally
    likely.
    """

    def __init__(self, seed: int, *, calm_percent: int = 0) -> None:
        super().__init__()
        assert 0 <= calm_percent <= 100
        self.seed = seed
        self._calm_percent = calm_percent
        self._random = random.Random(seed)

    def pick(self, what: str, options: int) -> int:
        if self._calm_percent and self._random.randrange(100) < self._calm_percent:
            return 0
        return self._random.randrange(options)


class DrawnChoices(Choices):
    """Asks ``draw(what, options)``: how Hypothesis, or an exhaustive search, takes part."""

    def __init__(self, draw: Callable[[str, int], int]) -> None:
        super().__init__()
        self._draw = draw

    def pick(self, what: str, options: int) -> int:
        return self._draw(what, options)


class RecordedChoices(Choices):
    """Replays a trace. Raises `ReplayDivergedError` when the run asks something else, or more, than was recorded.

    ``then`` answers what comes after the trace's end; without it the end is a divergence. ``diverged`` is the first that
    there was: whoever asked may have taken the error for something else.
    """

    def __init__(self, trace: Iterable[Choice], *, then: Choices | None = None) -> None:
        super().__init__()
        self._recorded: Final = list(trace)
        self._position = 0
        self._then = then
        self.diverged: ReplayDivergedError | None = None

    @classmethod
    def load(cls, path: Path) -> RecordedChoices:
        """The trace that `Choices.save_trace` wrote."""
        return cls(Choice(*json.loads(line)) for line in path.read_text().splitlines())

    @property
    def remaining(self) -> int:
        """How many recorded decisions were not asked for yet."""
        return len(self._recorded) - self._position

    def pick(self, what: str, options: int) -> int:
        if not self.remaining:
            if self._then is not None:
                return self._then.pick(what, options)
            raise self._diverge(
                f"the recording ends after {len(self._recorded)} decisions, but the run asks for {what} of {options}"
            )
        recorded = self._recorded[self._position]
        if (recorded.what, recorded.options) != (what, options):
            raise self._diverge(
                f"decision {self._position}: recorded {recorded.what} of {recorded.options}, "
                f"but the run asks for {what} of {options}"
            )
        self._position += 1
        return recorded.chosen

    def _diverge(self, text: str) -> ReplayDivergedError:
        error = ReplayDivergedError(text)
        if self.diverged is None:
            self.diverged = error
        return error


def hypothesis_choices(draw: Callable[[str, int], int]) -> DrawnChoices:
    """Choices drawn by Hypothesis, which this module does not import. In a test with ``data()``::

        hypothesis_choices(lambda what, options: data.draw(integers(0, options - 1), label=what))

    It shrinks towards 0, that is towards calm.
    """
    return DrawnChoices(draw)


def exhaust(run: Callable[[Choices], object], *, runs_max: int = RUNS_MAX) -> int:
    """Call ``run`` once for every list of choices that there is, depth first, and return how often that was.

    Each call gets the choices of the one before, but for the last that has an option left: it takes the next one, and
    what comes after it starts with option 0. So ``run`` must make its whole scenario anew each time, and depend on
    nothing but the choices: `ReplayDivergedError` if it does not. What it raises comes out with a note of the run's
    choices. A scenario of more than ``runs_max`` runs is too large: `ValueError`.
    """
    prefix: list[Choice] | None = []
    runs = 0
    while prefix is not None:
        if runs == runs_max:
            raise ValueError(f"not exhausted after {runs_max} runs: fewer requests, tags or free decisions are needed")
        choices = RecordedChoices(prefix, then=FirstChoice(record=True))
        runs += 1
        try:
            run(choices)
        except BaseException as error:
            taken = [attrs.astuple(choice) for choice in choices.trace]
            error.add_note(f"run {runs} of an exhaustive search, with the choices {taken}")
            raise
        if choices.remaining:
            raise ReplayDivergedError(f"run {runs} asked for {choices.remaining} decisions less than the one before it")
        prefix = _next_prefix(choices.trace)
    return runs


def _next_prefix(trace: list[Choice]) -> list[Choice] | None:
    """The choices up to the last that has an option left, which takes it; None when there is none."""
    for position in reversed(range(len(trace))):
        choice = trace[position]
        if choice.chosen + 1 < choice.options:
            return [*trace[:position], attrs.evolve(choice, chosen=choice.chosen + 1)]
    return None
