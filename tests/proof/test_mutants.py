"""The mutation tool itself: the mistakes that it makes, that it tells found from not found, and what it says."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.proof.forked import run_pytest
from tests.proof.mutants import mutants_of

ROOT = Path(__file__).resolve().parents[2]


def texts(source: str) -> set[str]:
    return {str(mutant) for mutant in mutants_of(textwrap.dedent(source))}


@pytest.mark.parametrize(
    ("statement", "mutants"),
    [
        ("x = a < b", {"x = a <= b"}),
        ("x = a is b", {"x = a is not b"}),
        ("x = 5", {"x = 6", "x = 4"}),
        ("x = True", {"x = False"}),
        ("x = a and b", {"x = a or b", "x = a", "x = b"}),
        ("x = not a", {"x = a"}),
        ("x = a + b", {"x = a - b"}),
        ("x = a & ~b", {"x = a | ~b", "x = a & b"}),
        ("x = a if b else c", {"x = a if not b else c"}),
        ("x = errno.EIO", {"x = errno.EINVAL"}),
        ("x = TagState.SERVING", {"x = TagState.CLOSED"}),
        ("x = {a: b, c: d}", set()),
        ("self.x = a", {"pass"}),
        ("x[0] = a", {"x[1] = a", "x[-1] = a", "pass"}),
        ("self.x += a", {"pass"}),
        ("f(a)", {"pass"}),
        ("return a", {"return 0"}),
        ("return 0", {"return 1", "return -1"}),
        ("raise a", {"pass"}),
        ("assert a < 5", set()),
        ("x: int = 5", {"x: int = 6", "x: int = 4"}),
        ("'a text'", set()),
        ("x = f'{a + b}'", set()),
        ("yield (a < b)", {"yield (a <= b)"}),
    ],
)
def test_mutants_of_a_statement(statement: str, mutants: set[str]) -> None:
    """Each kind of mistake is made, and no other."""
    assert texts(f"def f():\n    {statement}") == {f"f: {statement} -> {mutant}" for mutant in mutants}


def test_where_a_mutant_is() -> None:
    """It knows the function, and the lines of its statement: of a compound one the head only."""
    source = """
        class A:
            def f(self):
                if (a <
                        b):
                    g()
                else:
                    h()
        """
    assert [(str(mutant), mutant.lines) for mutant in mutants_of(textwrap.dedent(source))] == [
        ("A.f: if a < b -> if not a < b", range(4, 6)),
        ("A.f: if a < b -> if a <= b", range(4, 6)),
        ("A.f: g() -> pass", range(6, 7)),
        ("A.f: h() -> pass", range(8, 9)),
    ]


def test_mutants_of_a_table() -> None:
    """At module level every entry of a table is left out once; nothing there has lines, because it runs at import."""
    found = mutants_of("T = {a: {b: 1}, c: d}\nS = {a, b}\n")
    assert {str(mutant) for mutant in found} == {
        "module: T = {a: {b: 1}, c: d} -> T = {c: d}",
        "module: T = {a: {b: 1}, c: d} -> T = {a: {b: 1}}",
        "module: T = {a: {b: 1}, c: d} -> T = {a: {}, c: d}",
        "module: T = {a: {b: 1}, c: d} -> T = {a: {b: 2}, c: d}",
        "module: T = {a: {b: 1}, c: d} -> T = {a: {b: 0}, c: d}",
        "module: S = {a, b} -> S = {b}",
        "module: S = {a, b} -> S = {a}",
    }
    assert {mutant.lines for mutant in found} == {None}


def test_long_statements_are_cut() -> None:
    """What is shown is where the two differ."""
    numbers = ", ".join(f"number_{index}" for index in range(100))
    (mutant,) = mutants_of(f"x = ({numbers}, True, {numbers})")
    assert "True" in str(mutant)
    assert "False" in str(mutant)
    assert len(str(mutant)) < 400


def test_what_is_left_alone() -> None:
    """Imports, type checking, slots and representations are no behaviour."""
    source = """
        import a
        if TYPE_CHECKING:
            b = 1
        class C:
            __slots__ = ("a",) + b
            x: int
            def __repr__(self):
                return f(1)
        """
    assert texts(source) == set()


def write_program(tmp_path: Path, name: str, module: str, tests: str) -> Path:
    """A module and its tests, in folders as the project's."""
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(module))
    path = tmp_path / f"test_{name}.py"
    path.write_text(f"import {name}\n{textwrap.dedent(tests)}")
    return path


def test_survivors_are_told_from_the_killed(tmp_path: Path) -> None:
    """Through the whole tool: a mutant that a test notices is killed, whether it fails or loops, and whether
    what is broken runs at import, in a function or in a closure; the others are printed."""
    write_program(
        tmp_path,
        "target",
        """
        import time

        LIMIT = 7
        UNREAD = True

        def wait(steps):
            while steps > 0:
                steps -= 1
            return steps

        def tested(a, b):
            if a < b:
                return LIMIT
            return time

        def untested():
            return time

        def closure(place):
            def inner():
                return place
            return inner

        seven = closure(7)
        """,
        """
        import time

        def test_tested():
            assert target.tested(1, 2) == 7
            assert target.tested(2, 2) is target.tested(3, 2) is time

        def test_wait():
            assert target.wait(3) == 0

        def test_closure():
            assert target.seven() == target.closure(7)() == 7
        """,
    )
    program = f"""
        import sys, types
        from pathlib import Path
        from tests.proof import mutate
        mutate.ROOT = Path({str(tmp_path)!r})
        mutate._CPU_SECONDS_LEAST = 1
        mutate.TESTS = {{"target": ["test_target.py"]}}
        mutate.EXPLAINED = {{"target": {{
            "untested: return time -> return 0": "nobody calls it",
            "tested: return time -> return 0": "not true: it is found",
        }}}}
        sys.exit(mutate.main([]))
        """
    path = os.pathsep.join([str(ROOT), str(tmp_path)])
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.stdout.splitlines() == [
        "target: 20 mutants, 3 tests",
        "  survived: module: UNREAD = True -> UNREAD = False",
        "  survived: line 10: wait: return steps -> return 0",
        "  explained, but there is none such, or it is found: tested: return time -> return 0",
        "target: done",
        "| module | mutants | killed | survived, explained | survived |",
        "|---|---|---|---|---|",
        "| `target` | 20 | 17 | 1 | 2 |",
        "| `all` | 20 | 17 | 1 | 2 |",
    ], ended.stdout + ended.stderr
    assert ended.returncode == 1


def test_how_a_forked_run_ends(tmp_path: Path) -> None:
    """Passing, failing, hanging, looping, not to be imported and not to be run are six different ends."""
    ways = {
        "passed": "def test_it(): pass",
        "failed": "def test_it(): assert 1 == 2",
        "hung": "import threading\ndef test_it(): threading.Event().wait()",
        "looped": "def test_it():\n    while True: pass",
        "unimportable": "import there_is_no_such_module",
        "broken": "",
    }
    for verdict, source in ways.items():
        path = tmp_path / f"test_way_{verdict}.py"
        path.write_text(source)
        ended = run_pytest([str(path), "--rootdir", str(tmp_path)], cpu_seconds_max=2)
        assert ended.verdict == verdict, ended
        assert ended.by_assertion == (verdict == "failed")


def test_a_crash_is_no_assertion(tmp_path: Path) -> None:
    """A test that failed because the code crashed did not judge anything; one that failed in a group of errors did."""
    for name, source, by_assertion in (
        ("crash", "def test_it(): {}[1]", False),
        ("group", "def test_it(): raise ExceptionGroup('', [KeyError(), AssertionError()])", True),
    ):
        path = tmp_path / f"test_end_{name}.py"
        path.write_text(source)
        ended = run_pytest([str(path), "--rootdir", str(tmp_path)])
        assert ended.verdict == "failed"
        assert ended.by_assertion == by_assertion
