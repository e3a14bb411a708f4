"""Builds the native part: `ublk_trio.real._native`, by cffi in API mode, with liburing linked statically.

`setup.py` uses it, so ``pip install .`` and ``pip install -e .`` build it along. To build only this, in place::

    python native/build_native.py

Statically, because then there is no run-time library to find: the wheel built on one Debian runs on the next.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

MODULE = "ublk_trio.real._native"
HERE = Path(__file__).resolve().parent
#: Those that declare what Python calls, in the order in which they need each other.
HEADERS = [HERE / "ring.h", HERE / "worker.h"]
MEND = "install gcc, python3-dev and liburing-dev (Debian's names), then: pip install --force-reinstall --no-deps ublk_trio"

COMPILE_ARGS = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-pthread"]


class NotBuildableError(Exception):
    """The native part can't be built here; the message says what is missing."""


def declarations() -> str:
    """What cffi is told: the part of each header between its two markers, as it stands."""
    wanted = []
    for header in HEADERS:
        _, begin, rest = header.read_text(encoding="utf-8").partition("/* ---- cffi begins ---- */")
        part, end, _ = rest.partition("/* ---- cffi ends ---- */")
        assert begin, f"{header.name} lost the marker before what cffi reads"
        assert end, f"{header.name} lost the marker after what cffi reads"
        wanted.append(part)
    return "".join(wanted)


def generate(target: Path) -> None:
    """Write the extension module's C source."""
    try:
        import cffi
    except ImportError:
        raise NotBuildableError("the Python package cffi is missing") from None
    builder = cffi.FFI()
    builder.cdef(declarations())
    builder.set_source(MODULE, "\n".join(f'#include "{header.name}"' for header in HEADERS))
    target.parent.mkdir(parents=True, exist_ok=True)
    builder.emit_c_code(str(target))


def check(compiler: list[str]) -> None:
    """Raise `NotBuildableError` for the first thing that is missing."""
    if shutil.which(compiler[0]) is None:
        raise NotBuildableError(f"the C compiler {compiler[0]} is missing")
    if not _compiles(compiler, f'#include "{sysconfig.get_path("include")}/Python.h"\nint main(void) {{ return 0; }}'):
        raise NotBuildableError("Python.h is missing or unusable")
    if not _compiles(compiler, "#include <liburing.h>\nint main(void) { return 0; }"):
        raise NotBuildableError("liburing.h is missing or unusable")
    try:
        link_args(compiler)
    except FileNotFoundError:
        raise NotBuildableError("liburing.a is missing") from None


def link_args(compiler: list[str]) -> list[str]:
    """The linker's arguments for the static liburing that this compiler finds. Raises FileNotFoundError."""
    answer = subprocess.run(
        [*compiler, "-print-file-name=liburing.a"], capture_output=True, text=True, check=False
    ).stdout.strip()
    # A compiler that doesn't find the file answers with the bare name.
    if not os.path.isabs(answer) or not os.path.exists(answer):
        raise FileNotFoundError("liburing.a")
    return [answer]


def _compiles(compiler: list[str], text: str) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.c")
        source.write_text(text, encoding="utf-8")
        command = [
            *compiler,
            f"-I{sysconfig.get_path('include')}",
            "-c",
            str(source),
            "-o",
            str(Path(folder, "probe.o")),
        ]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0


def main() -> None:
    subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=HERE.parent, check=True)


if __name__ == "__main__":
    main()
