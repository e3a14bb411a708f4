"""Mutation testing: ``python -m tests.proof.mutate [MODULE...]``, or ``make mutants`` for all modules of `TESTS`.

For each mutant of a module (`mutants`), a forked child runs the tests that touch the mutated line, up to the first that fails: those
that found others come first, then the quickest. A mutant of a function is tried in a fork of one process that has collected the tests: there
the function gets the mutant's code. One of what runs when the module is imported needs an import of its own, in the module's place.

A mutant that no test notices survives: a test is missing, or the mutant is as good as the original; then `survivors.EXPLAINED` says why.
Prints the survivors, and a table; the exit code is 0 when all survivors are explained.

This process never imports what it mutates: each child does, afresh.
"""

from __future__ import annotations

import gc
import importlib.abc
import importlib.machinery
import importlib.util
import itertools
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import CodeType, FrameType, FunctionType, MappingProxyType, ModuleType
from typing import Any

import attrs
import hypothesis
import pytest

from tests.proof.forked import Ended, Plugin, run_items, run_pytest
from tests.proof.mutants import Mutant, mutants_of
from tests.proof.survivors import EXPLAINED

#: What every child would import otherwise: a third of a second each time.
for _name in ("hypothesis.stateful", "trio.testing", "pytest_trio.plugin", "_hypothesis_pytestplugin"):
    importlib.import_module(_name)

ROOT = Path(__file__).resolve().parents[2]
#: The simulator's transition code: what changes the state of tags, commands, rings and devices: a tag's or a device's step, a control
#: command, a server's end, a ring's entry of the driver, and the checks that decide on it. Left out: what only carries, counts, chooses,
#: records or looks up (`ring`, `uring`, `process`, `kernel`, `call`, `waits`, `clock`, `choices`, `faults`, `event_log`, `version`, `params`,
#: the getters), the block layer (all of `block`: it gives requests to the driver, and tags to requests, but changes nothing of the
#: driver's), and the data paths (`user_copy`, `shmem`: they move or find a request's bytes, which changes no state).
_TRANSITIONS = (
    "tag",
    "registered",
    "checks",
    "server_end",
    "control_recovery",
    "control_params",
    "uring_commands",
    "char_device",
    "control_start",
    "control",
    "control_add",
    "device",
    "batch",
    "queue",
)
#: What is mutated, and the tests that must notice. They must be quick, and the same at every run.
TESTS: Mapping[str, Sequence[str]] = MappingProxyType(
    {
        "ublk_trio.tag": ("tests/test_tag.py",),
        "ublk_trio.rpc.splitter": ("tests/rpc/test_splitter.py",),
    }
    | {f"ublk_trio.kernel_sim.{name}": ("tests/sim",) for name in _TRANSITIONS}
)
#: Seconds of CPU time that a mutant's tests get: for what they need on the original, for themselves, and to import them.
_CPU_FACTOR = 3
_CPU_SECONDS_LEAST = 2
_CPU_SECONDS_IMPORTING = 5
#: What the module's own tests get, and the process that tries its mutants in forks: they end by themselves.
_CPU_SECONDS_ORIGINAL = 600


@attrs.frozen(kw_only=True)
class Baseline:
    """What the tests do with the module as it is: which lines each of them runs, and how long it takes."""

    lines: dict[str, frozenset[int]]
    seconds: dict[str, float]

    def tests_for(self, mutant: Mutant) -> list[str]:
        """The tests that run the mutated lines, quickest first. What runs at import is every test's."""
        if mutant.lines is None:
            touching = set(self.seconds)
        else:
            touching = {test for test, lines in self.lines.items() if not lines.isdisjoint(mutant.lines)}
        return sorted(touching, key=lambda test: (self.seconds[test], test))

    def cpu_seconds_max(self, tests: Sequence[str], *, importing: bool) -> int:
        """What these tests get on a mutant. Much more than they need: a mutant that loops wastes it all."""
        least = _CPU_SECONDS_IMPORTING if importing else _CPU_SECONDS_LEAST
        return least + int(_CPU_FACTOR * sum(self.seconds[test] for test in tests))


@attrs.frozen(kw_only=True)
class Score:
    """How many of a module's mutants came to what, and how many explanations are about none that survived."""

    module: str
    killed: int
    explained: int
    unexplained: int
    stale: int

    @property
    def mutants(self) -> int:
        return self.killed + self.explained + self.unexplained


class _InPlace(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports modules from given code."""

    def __init__(self, codes: Mapping[str, CodeType]) -> None:
        self._codes = codes

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self._codes:
            return None
        return importlib.util.spec_from_file_location(fullname, path_of(fullname), loader=self)

    def exec_module(self, module: ModuleType) -> None:
        exec(self._codes[module.__name__], module.__dict__)


class _Tracer:
    """A plugin that notes the lines of some modules that each test runs."""

    def __init__(self, plugin: Plugin, modules: Iterable[str]) -> None:
        self._plugin = plugin
        self._modules = {str(path_of(module)): module for module in modules}
        self._lines: dict[str, set[int]] = {path: set() for path in self._modules}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        for lines in self._lines.values():
            lines.clear()
        began = time.process_time()
        sys.settrace(self._trace_call)
        try:
            return (yield)
        finally:
            sys.settrace(None)
            seconds = time.process_time() - began
            ran = {self._modules[path]: sorted(lines) for path, lines in self._lines.items() if lines}
            self._plugin.note(json.dumps([item.nodeid, ran, seconds]))

    def _trace_call(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._trace_line if frame.f_code.co_filename in self._lines else None

    def _trace_line(self, frame: FrameType, event: str, argument: Any) -> Any:
        self._lines[frame.f_code.co_filename].add(frame.f_lineno)
        return self._trace_line


class _Selection:
    """A plugin that runs these tests only, in this order."""

    def __init__(self, tests: Sequence[str]) -> None:
        self._order = {test: index for index, test in enumerate(tests)}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted(
            (item for item in items if item.nodeid in self._order), key=lambda item: self._order[item.nodeid]
        )


class _Swaps:
    """A plugin that tries mutants of functions on the collected tests: each in a fork, where functions get the mutant's code."""

    def __init__(self, plugin: Plugin, path: Path, mutants: Sequence[Mutant], baseline: Baseline) -> None:
        self._plugin = plugin
        self._path = path
        self._mutants = mutants
        self._baseline = baseline

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items = {item.nodeid: item for item in session.items}
        functions = [
            thing
            for thing in gc.get_objects()
            if isinstance(thing, FunctionType) and thing.__code__.co_filename == str(self._path)
        ]
        # A test that found one mutant finds others: those come first.
        found: Counter[str] = Counter()
        for mutant in self._mutants:
            select = sorted(self._baseline.tests_for(mutant), key=lambda test: -found[test])
            ended = run_items(
                session,
                [items[test] for test in select],
                prepare=partial(self._swap, functions, mutant),
                cpu_seconds_max=self._baseline.cpu_seconds_max(select, importing=False),
            )
            found[ended.test] += ended.verdict == "failed"
            self._plugin.note(ended.verdict)
        return True

    def _swap(self, functions: Sequence[FunctionType], mutant: Mutant) -> None:
        """Give the module's live functions the code that they have in the mutant."""
        codes = {}
        unread = [compile(mutant.module, self._path, "exec")]
        while unread:
            inner = [constant for constant in unread.pop().co_consts if isinstance(constant, CodeType)]
            codes.update({(one.co_qualname, one.co_firstlineno): one for one in inner})
            unread += inner
        for function in functions:
            old = function.__code__
            function.__code__ = codes[old.co_qualname, old.co_firstlineno]


def path_of(module: str) -> Path:
    """The module's file in this checkout."""
    return ROOT.joinpath(*module.split(".")).with_suffix(".py")


def run_tests(
    codes: Mapping[str, CodeType],
    tests: Sequence[str],
    *,
    plugins: Callable[[Plugin], Sequence[object]],
    cpu_seconds_max: int,
) -> Ended:
    """Run tests in a fork that imports these modules from this code."""

    def prepare() -> None:
        assert codes.keys().isdisjoint(sys.modules), f"{', '.join(codes)}: imported before it could be mutated"
        sys.meta_path.insert(0, _InPlace(codes))
        # The same examples for every mutant, and none that is kept for the real suite.
        hypothesis.settings.register_profile("mutants", derandomize=True, database=None)
        hypothesis.settings.load_profile("mutants")

    # The parent has imported pytest's plugins already, for speed; their own asserts need no rewriting.
    quiet = ["-W", "ignore:Module already imported so cannot be rewritten:pytest.PytestAssertRewriteWarning"]
    return run_pytest([*quiet, *tests], prepare=prepare, plugins=plugins, cpu_seconds_max=cpu_seconds_max)


def measure(modules: Sequence[str], tests: Sequence[str]) -> dict[str, Baseline]:
    """Run all the tests on the modules as they are."""
    ended = run_tests(
        {module: _original(module) for module in modules},
        tests,
        plugins=lambda plugin: [_Tracer(plugin, modules)],
        cpu_seconds_max=_CPU_SECONDS_ORIGINAL,
    )
    if ended.verdict != "passed":
        raise SystemExit(f"the tests must pass before anything can be learnt from mutants: {ended}")
    records = [json.loads(note) for note in ended.notes]
    seconds = {test: seconds for test, _, seconds in records}
    return {
        module: Baseline(lines={test: frozenset(lines.get(module, ())) for test, lines, _ in records}, seconds=seconds)
        for module in modules
    }


def verdicts(module: str, mutants: Sequence[Mutant], baseline: Baseline, tests: Sequence[str]) -> list[str]:
    """How the tests end on each mutant, as `Ended.verdict` says it."""
    swapped = [mutant for mutant in mutants if mutant.lines is not None]
    ended = run_tests(
        {module: _original(module)},
        tests,
        plugins=lambda plugin: [_Swaps(plugin, path_of(module), swapped, baseline)],
        cpu_seconds_max=_CPU_SECONDS_ORIGINAL,
    )
    if len(ended.notes) != len(swapped):
        raise SystemExit(f"{module}: the tests could not be run: {ended}")
    found = dict(zip(map(id, swapped), ended.notes, strict=True))
    return [
        verdict
        if (verdict := found.get(id(mutant), "broken")) != "broken"
        else _verdict_importing(module, mutant, baseline, tests)
        for mutant in mutants
    ]


def _verdict_importing(module: str, mutant: Mutant, baseline: Baseline, tests: Sequence[str]) -> str:
    """As `verdicts`, for a mutant of what runs at import, or of a function that cannot be changed in place."""
    select = baseline.tests_for(mutant)
    ended = run_tests(
        {module: compile(mutant.module, path_of(module), "exec")},
        sorted({test.partition("::")[0] for test in select}) or tests,
        plugins=lambda plugin: [_Selection(select)],
        cpu_seconds_max=baseline.cpu_seconds_max(select, importing=True),
    )
    if ended.verdict == "broken":
        raise SystemExit(f"{module}: {mutant}: the tests could not be run: {ended}")
    return ended.verdict


def _original(module: str) -> CodeType:
    path = path_of(module)
    return compile(path.read_text(), path, "exec")


def mutate(module: str, baseline: Baseline) -> Score:
    """Try every mutant of a module and print what survives."""
    tests = TESTS[module]
    mutants = mutants_of(path_of(module).read_text())
    explained = dict(EXPLAINED.get(module, {}))
    counts = Counter(killed=0, explained=0, unexplained=0)
    print(f"{module}: {len(mutants)} mutants, {len(baseline.seconds)} tests", flush=True)
    for mutant, verdict in zip(mutants, verdicts(module, mutants, baseline, tests), strict=True):
        if verdict != "passed":
            counts["killed"] += 1
        elif str(mutant) in explained:
            counts["explained"] += 1
            explained[str(mutant)] = ""
        else:
            counts["unexplained"] += 1
            line = mutant.lines.start if mutant.lines is not None else 0
            print(f"  survived: {f'line {line}: ' if line else ''}{mutant}", flush=True)
    stale = [mutant for mutant, why in explained.items() if why]
    for name in stale:
        print(f"  explained, but there is none such, or it is found: {name}")
    print(f"{module}: done", flush=True)
    return Score(module=module, stale=len(stale), **counts)


def table(scores: Sequence[Score]) -> list[str]:
    """Lines for people, as they stand in docs/testing.md."""
    total = Score(
        module="all",
        killed=sum(score.killed for score in scores),
        explained=sum(score.explained for score in scores),
        unexplained=sum(score.unexplained for score in scores),
        stale=0,
    )
    return [
        "| module | mutants | killed | survived, explained | survived |",
        "|---|---|---|---|---|",
        *(
            f"| `{score.module}` | {score.mutants} | {score.killed} | {score.explained} | {score.unexplained} |"
            for score in (*scores, total)
        ),
    ]


def main(modules: Sequence[str]) -> int:
    unknown = set(modules) - set(TESTS)
    if unknown:
        raise SystemExit(f"{', '.join(sorted(unknown))}: not in {__name__}.TESTS: choose {', '.join(TESTS)}")
    scores = []
    for tests, group in itertools.groupby(modules or TESTS, TESTS.__getitem__):
        for module, baseline in measure(list(group), tests).items():
            scores.append(mutate(module, baseline))
    print("\n".join(table(scores)))
    return 0 if all(not score.unexplained and not score.stale for score in scores) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
