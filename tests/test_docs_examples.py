"""Every example in README.md and docs/ is run, and prints what the page says.

What a page may contain (docs/testing.md tells readers the same):

- A ``python`` or ``toml`` block is a file: its first line is ``# NAME.py``, ``# NAME.toml``. The page's files lie together in an
  empty directory.
- A ``console`` block is a terminal in that directory. ``$ COMMAND`` is run as it stands, and what follows it up to the next
  prompt is what it must print, stdout and stderr as they come. ``…`` stands for any text within a line, and alone on a line for
  any lines. Under ``<!-- numbers vary -->``, any number of two digits or more stands for any number.
- ``# COMMAND`` is a root shell on a machine with ublk. It is run as it stands where this process can serve real disks. The
  programs among them (``# python NAME.py``) are run on the simulator as well: there the word RealKernel in the page's files is
  replaced by SimKernel, and all other ``#`` commands are left out.
- ``COMMAND &`` goes on while the page does; ``kill %1`` sends it SIGTERM, and it must then exit with 0; ``kill -KILL %1``
  kills it. What still runs at the page's end gets SIGINT.
- ``sh`` blocks install or build something and are not run; that what they name exists is looked at in test_docs_reference.py.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest

from tests.both.arms import has_real_kernel
from ublk_trio import RealKernel

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = frozenset({"python", "toml", "console", "sh", "text", "mermaid"})

_FENCE = re.compile(r"^(?P<mark><!-- [^\n]* -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
_NUMBER = re.compile(r"\d+\.\d+|\d{2,}")
_ANY_NUMBER = r"\d+(?:\.\d+)?"
#: Beyond this an example hangs. Generous: an emulated machine is slow.
_SECONDS_MAX = 120.0


@attrs.frozen
class Block:
    """One fenced block of a page."""

    language: str
    text: str
    mark: str

    @property
    def file_name(self) -> str | None:
        """The name that a ``python`` or ``toml`` block gives itself."""
        match = re.match(r"# (\w+\.(?:py|toml))\n", self.text)
        return match[1] if match else None


@attrs.frozen
class Step:
    """One command of a ``console`` block, with the output that the page promises."""

    command: str
    as_root: bool
    output: str
    numbers_vary: bool

    @property
    def in_background(self) -> bool:
        return self.command.endswith(" &")

    @property
    def program(self) -> str | None:
        """NAME.py in ``python NAME.py``, or in ``python -m pytest -OPTIONS NAME.py``."""
        match = re.match(r"python (?:-m pytest (?:-\w+ (?:\w+[:=]\w+ )?)*)?(\w+\.py)\b", self.command)
        return match[1] if match else None

    def expects(self, printed: str, *, so_far: bool = False) -> bool:
        """Whether that is what the page says; ``so_far``: or begins with it."""
        pattern = "".join(map(self._line_pattern, self.output.splitlines(keepends=True)))
        match = re.match if so_far else re.fullmatch
        return match(pattern, printed) is not None

    def _line_pattern(self, line: str) -> str:
        if line == "…\n":
            return r"(?:.*\n)*?"
        pieces = [self._piece_pattern(piece) for piece in line.split("…")]
        return r"[^\n]*".join(pieces)

    def _piece_pattern(self, piece: str) -> str:
        if not self.numbers_vary:
            return re.escape(piece)
        return _ANY_NUMBER.join(map(re.escape, _NUMBER.split(piece)))


def blocks_of(page: Path) -> list[Block]:
    return [Block(m["language"], m["text"], m["mark"] or "") for m in _FENCE.finditer(page.read_text())]


def steps_of(page: Path) -> Iterator[Step]:
    for block in blocks_of(page):
        if block.language != "console":
            continue
        prompted = re.split(r"^([$#]) ", block.text, flags=re.MULTILINE)
        assert not prompted[0], f"{page.name}: a console block starts with a prompt: {block.text}"
        for prompt, text in zip(prompted[1::2], prompted[2::2], strict=True):
            command, _, output = text.partition("\n")
            yield Step(command, prompt == "#", output, "numbers vary" in block.mark)


class Terminal:
    """A page's directory and what runs there."""

    def __init__(self, page: Path, directory: Path, *, real: bool) -> None:
        self._directory = directory
        self._real = real
        self._background: subprocess.Popen[str] | None = None
        self._background_output = directory / ".background"
        for block in blocks_of(page):
            if block.language in ("python", "toml") and block.file_name is not None:
                text = block.text if real else block.text.replace("RealKernel", "SimKernel")
                (directory / block.file_name).write_text(text)

    def run(self, step: Step) -> None:
        """Run a step as far as this machine can, and compare."""
        if step.as_root and not self._real and step.program is None and step.command != "kill %1":
            return
        if not step.as_root and self._real:
            return  # done in the other run
        if step.command == "kill %1":
            if self._background is not None or self._real:
                self._kill(step)
        elif step.command == "kill -KILL %1":
            self._kill(step, signal.SIGKILL)
        elif step.command == "kill -USR2 %1":
            self._kill(step, signal.SIGUSR2)
        elif step.in_background:
            self._start(step)
        else:
            shell = f'python() {{ {shlex.quote(sys.executable)} "$@"; }}\n{step.command}'
            done = subprocess.run(
                ["sh", "-c", shell], cwd=self._directory, env=self._environment(), text=True,
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=_SECONDS_MAX, check=False,
            )  # fmt: skip
            assert step.expects(done.stdout), f"{step.command}\nprinted:\n{done.stdout}\nthe page says:\n{step.output}"

    def _environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "COLUMNS": "80",
            "LC_ALL": "C.UTF-8",
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def _start(self, step: Step) -> None:
        assert self._background is None or self._background.poll() is not None, "one background command at a time"
        python, *arguments = shlex.split(step.command.removesuffix(" &"))
        assert python == "python", step.command
        with self._background_output.open("w") as output:
            self._background = subprocess.Popen(
                [sys.executable, *arguments], cwd=self._directory, env=self._environment(), text=True,
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                # A test run in the background of a script ignores SIGINT, and its children would too.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler) and None,
            )  # fmt: skip
        deadline = time.monotonic() + _SECONDS_MAX
        while not step.expects(printed := self._background_output.read_text(), so_far=True):
            assert self._background.poll() is None, f"{step.command}\nended:\n{printed}"
            assert time.monotonic() < deadline, f"{step.command}\nprinted:\n{printed}\nthe page says:\n{step.output}"
            time.sleep(0.02)

    def _kill(self, step: Step, number: signal.Signals = signal.SIGTERM) -> None:
        assert self._background is not None, "there is nothing to kill"
        before = len(self._background_output.read_text())
        self._background.send_signal(number)
        status = self._background.wait(_SECONDS_MAX)
        printed = self._background_output.read_text()[before:]
        self._background = None
        assert status == (-number if number == signal.SIGKILL else 0), f"exit {status}:\n{printed}"
        assert step.expects(printed), f"{step.command}\nprinted:\n{printed}\nthe page says:\n{step.output}"

    def close(self) -> None:
        """End what still runs; nothing of it may be left."""
        for mounted in filter(Path.is_mount, self._directory.iterdir()):
            subprocess.run(["umount", "--lazy", str(mounted)], check=True)
        process, self._background = self._background, None
        if process is not None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(_SECONDS_MAX)
            finally:
                process.kill()
        if self._real:
            assert RealKernel().device_ids() == []


def _runs() -> Iterator[object]:
    for page in PAGES:
        steps = list(steps_of(page))
        if any(not step.as_root or step.program for step in steps):
            yield pytest.param(page, False, id=f"{page.name}-sim")
        if any(step.as_root for step in steps):
            yield pytest.param(page, True, id=f"{page.name}-real")


def _why_not_real(steps: list[Step]) -> str | None:
    if not has_real_kernel() or os.geteuid() != 0:
        return "needs root, and a kernel with ublk_drv"
    if RealKernel().device_ids():
        return "the pages' device numbers need a machine without other ublk devices"
    programs = {shlex.split(step.command)[0] for step in steps if step.as_root} - {"python", "kill", "echo"}
    missing = sorted(program for program in programs if shutil.which(program) is None)
    return f"needs {', '.join(missing)}" if missing else None


@pytest.mark.any_kernel
@pytest.mark.parametrize(("page", "real"), list(_runs()))
def test_examples(page: Path, real: bool, tmp_path: Path) -> None:
    """What a page has its reader type prints what the page says, in the page's order."""
    steps = list(steps_of(page))
    if real and (why_not := _why_not_real(steps)):
        pytest.skip(why_not)
    terminal = Terminal(page, tmp_path, real=real)
    try:
        for step in steps:
            terminal.run(step)
    finally:
        terminal.close()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_example_escapes(page: Path) -> None:
    """Every block is of a kind that the tests know, and every Python file of a page is run there, or imported by one that is."""
    blocks = blocks_of(page)
    assert page.read_text().count("\n```") == 2 * len(blocks), "a fence is not closed, or has spaces around it"
    assert {block.language for block in blocks} <= LANGUAGES
    files = [block.file_name for block in blocks if block.language == "python"]
    assert None not in files, "the first line of a python block is # NAME.py"
    assert len(files) == len(set(files)), "two blocks are the same file"
    used = {step.program for step in steps_of(page)}
    imported = set(
        re.findall(r"^from (\w+) import", "".join(b.text for b in blocks if b.language == "python"), re.MULTILINE)
    )
    assert set(files) <= used | {f"{name}.py" for name in imported}


def test_a_wrong_page_is_noticed() -> None:
    """The comparison can fail: other text, other small numbers, missing and additional lines are differences."""
    step = Step("x", False, "ok 12 of 3\n… end\n", True)
    assert step.expects("ok 99.5 of 3\nthe end\n")
    assert not step.expects("ok 99.5 of 4\nthe end\n")
    assert not step.expects("ok 99.5 of 3\n")
    assert not step.expects("ok 99.5 of 3\nthe end\nmore\n")
    assert not step.expects("ok x of 3\nthe end\n")
    assert Step("x", False, "a\n…\nb\n", False).expects("a\n1\n2\nb\n")
