"""Mutation testing: ``python -m tests.proof.mutate [MODULE...]``, or ``make mutants`` for all modules of `TESTS`.

For each mutant of a module (`mutants`), a forked child imports the mutant in the module's place and runs the tests that touch the
mutated line, quickest first, up to the first that fails. A mutant that no test notices survives: a test is missing, or the mutant is as good
as the original; then `survivors.EXPLAINED` says why. Prints the survivors; the exit code is 0 when all of them are explained.

This process never imports what it mutates: each child does, afresh.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import CodeType, FrameType, MappingProxyType, ModuleType
from typing import Any

import attrs
import hypothesis
import pytest

from tests.proof.forked import Ended, Plugin, run_pytest
from tests.proof.mutants import Mutant, mutants_of
from tests.proof.survivors import EXPLAINED

#: What every child would import otherwise: a third of a second each time.
for _name in ("hypothesis.stateful", "trio.testing", "pytest_trio.plugin", "_hypothesis_pytestplugin"):
    importlib.import_module(_name)

ROOT = Path(__file__).resolve().parents[2]
_SIMULATOR = ("tests/sim",)
#: What is mutated, and the tests that must notice. They must be quick, and the same at every run.
TESTS: Mapping[str, Sequence[str]] = MappingProxyType(
    {
        "ublk_trio.tag": ("tests/test_tag.py",),
        "ublk_trio.kernel_sim.tag": _SIMULATOR,
        "ublk_trio.kernel_sim.queue": _SIMULATOR,
        "ublk_trio.kernel_sim.device": _SIMULATOR,
        "ublk_trio.kernel_sim.control": _SIMULATOR,
    }
)
#: Seconds of CPU time that a mutant's tests get, for what they need on the original.
_CPU_SECONDS_LEAST = 5
_CPU_FACTOR = 3


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


class _InPlace(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from given code."""

    def __init__(self, name: str, path: Path, code: CodeType) -> None:
        self._name = name
        self._path = path
        self._code = code

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._name:
            return None
        return importlib.util.spec_from_file_location(fullname, self._path, loader=self)

    def exec_module(self, module: ModuleType) -> None:
        exec(self._code, module.__dict__)


class _Tracer:
    """A plugin that notes the lines of one file that each test runs."""

    def __init__(self, plugin: Plugin, path: Path) -> None:
        self._plugin = plugin
        self._path = str(path)
        self._lines: set[int] = set()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self._lines.clear()
        began = time.process_time()
        sys.settrace(self._trace_call)
        try:
            return (yield)
        finally:
            sys.settrace(None)
            seconds = time.process_time() - began
            self._plugin.note(json.dumps([item.nodeid, sorted(self._lines), seconds]))

    def _trace_call(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._trace_line if frame.f_code.co_filename == self._path else None

    def _trace_line(self, frame: FrameType, event: str, argument: Any) -> Any:
        self._lines.add(frame.f_lineno)
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


def path_of(module: str) -> Path:
    """The module's file in this checkout."""
    return ROOT.joinpath(*module.split(".")).with_suffix(".py")


def run_tests(
    module: str, code: CodeType, tests: Sequence[str], *, select: Sequence[str] | None, cpu_seconds_max: int = 300
) -> Ended:
    """Run tests on ``code`` in the module's place: all of ``tests``, traced, or only those of them that are selected."""
    path = path_of(module)

    def prepare() -> None:
        assert module not in sys.modules, f"{module} was imported before it could be mutated"
        sys.meta_path.insert(0, _InPlace(module, path, code))
        # The same examples for every mutant, and none that is kept for the real suite.
        hypothesis.settings.register_profile("mutants", derandomize=True, database=None)
        hypothesis.settings.load_profile("mutants")

    def plugins(plugin: Plugin) -> Sequence[object]:
        return [_Tracer(plugin, path) if select is None else _Selection(select)]

    files = tests if select is None else sorted({test.partition("::")[0] for test in select})
    # The parent has imported pytest's plugins already, for speed; their own asserts need no rewriting.
    quiet = ["-W", "ignore:Module already imported so cannot be rewritten:pytest.PytestAssertRewriteWarning"]
    return run_pytest([*quiet, *files], prepare=prepare, plugins=plugins, cpu_seconds_max=cpu_seconds_max)


def measure(module: str, tests: Sequence[str]) -> Baseline:
    """Run all the tests on the module as it is."""
    path = path_of(module)
    ended = run_tests(module, compile(path.read_text(), path, "exec"), tests, select=None)
    if ended.verdict != "passed":
        raise SystemExit(f"{module}: its tests must pass before anything can be learnt from mutants: {ended}")
    records = [json.loads(note) for note in ended.notes]
    return Baseline(
        lines={test: frozenset(lines) for test, lines, _ in records},
        seconds={test: seconds for test, _, seconds in records},
    )


def survives(module: str, mutant: Mutant, baseline: Baseline, tests: Sequence[str]) -> bool:
    """Whether no test notices the mutant."""
    select = baseline.tests_for(mutant)
    if not select:
        return True
    cpu_seconds = _CPU_SECONDS_LEAST + int(_CPU_FACTOR * sum(baseline.seconds[test] for test in select))
    code = compile(mutant.module, path_of(module), "exec")
    ended = run_tests(module, code, tests, select=select, cpu_seconds_max=cpu_seconds)
    if ended.verdict == "broken":
        raise SystemExit(f"{module}: {mutant}: the tests could not be run: {ended}")
    return ended.verdict == "passed"


def mutate(module: str) -> bool:
    """Try every mutant of a module and print what survives. True when all of that is explained."""
    tests = TESTS[module]
    baseline = measure(module, tests)
    mutants = mutants_of(path_of(module).read_text())
    explained = dict(EXPLAINED.get(module, {}))
    counts = Counter(killed=0, explained=0, unexplained=0)
    print(f"{module}: {len(mutants)} mutants, {len(baseline.seconds)} tests", flush=True)
    for mutant in mutants:
        if not survives(module, mutant, baseline, tests):
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
    print(
        f"{module}: {counts['killed']} killed, {counts['explained']} survivors explained, "
        f"{counts['unexplained']} not; {100 * counts['killed'] / len(mutants):.1f} % killed",
        flush=True,
    )
    return not counts["unexplained"] and not stale


def main(modules: Sequence[str]) -> int:
    unknown = set(modules) - set(TESTS)
    if unknown:
        raise SystemExit(f"{', '.join(sorted(unknown))}: not in {__name__}.TESTS: choose {', '.join(TESTS)}")
    fine = [mutate(module) for module in modules or TESTS]
    return 0 if all(fine) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
