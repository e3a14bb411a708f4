"""The programs that this machine must have, and which Debian package has each."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.kernel.guest.ending import Exit, Failure


@dataclass(frozen=True, kw_only=True)
class Tool:
    """A program of the host: its names, where it may lie besides PATH, the package that has it."""

    names: tuple[str, ...]
    package: str
    directories: tuple[str, ...] = ("/usr/sbin", "/sbin", "/usr/bin", "/bin")

    def find(self) -> Path | None:
        path = os.pathsep.join((os.environ.get("PATH", os.defpath), *self.directories))
        for name in self.names:
            found = shutil.which(name, path=path)
            if found is not None:
                return Path(found)
        return None


QEMU = Tool(names=("qemu-system-x86_64",), package="qemu-system-x86")

BUSYBOX = Tool(names=("busybox",), package="busybox-static", directories=("/bin", "/usr/bin"))

DEPMOD = Tool(names=("depmod",), package="kmod")

DPKG_DEB = Tool(names=("dpkg-deb",), package="dpkg")

SETPRIV = Tool(names=("setpriv",), package="util-linux")

TOOLS = (QEMU, BUSYBOX, DEPMOD, DPKG_DEB, SETPRIV)


def is_static(program: Path) -> bool:
    """Whether an ELF program names no dynamic loader (which stands in its first page)."""
    with program.open("rb") as file:
        return b"/ld-linux" not in file.read(4096)


def missing_tools() -> Iterator[tuple[str, str]]:
    """For each thing that the host lacks: what it is, and the package that mends it."""
    for tool in TOOLS:
        found = tool.find()
        if found is None:
            yield f"{tool.names[0]} is not installed", tool.package
        elif tool is BUSYBOX and not is_static(found):
            why = "is not statically linked, and the initramfs has no libraries"
            yield f"{found} {why}", tool.package


def apt_get_install(packages: Sequence[str]) -> str:
    return "apt-get install --no-install-recommends " + " ".join(dict.fromkeys(packages))


def require_tools() -> None:
    missing = list(missing_tools())
    if missing:
        what = "; ".join(problem for problem, _package in missing)
        mend = apt_get_install([package for _problem, package in missing])
        raise Failure(Exit.HOST_NOT_READY, f"{what}: run `{mend}` as root")


def located(tool: Tool) -> str:
    """The path of a tool that `require_tools` has seen."""
    found = tool.find()
    if found is None:
        raise Failure(Exit.HOST_NOT_READY, f"{tool.names[0]} is gone: install {tool.package}")
    return str(found)
