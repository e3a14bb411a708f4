"""The initramfs: busybox, ``overlay.ko`` and the two scripts beside this module, which make this machine's root the guest's."""

from __future__ import annotations

import io
import lzma
import os
import stat
from collections.abc import Mapping
from pathlib import Path

from tests.kernel.guest.ending import Exit, Failure
from tests.kernel.guest.host_tools import BUSYBOX, located
from tests.kernel.guest.kernels import Kernel

HERE = Path(__file__).resolve().parent


class Cpio:
    """A "newc" archive in memory: what the kernel unpacks as its initramfs."""

    def __init__(self) -> None:
        self._data = io.BytesIO()
        self._inode = 0

    def _entry(self, name: str, mode: int, content: bytes) -> None:
        self._inode += 1
        path = os.fsencode(name) + b"\0"
        # inode, mode, uid, gid, links, mtime, size, device (4 words), length of name, checksum
        words = (self._inode, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(path), 0)
        self._data.write(b"070701" + b"".join(b"%08x" % word for word in words) + path)
        self._pad()
        self._data.write(content)
        self._pad()

    def _pad(self) -> None:
        self._data.write(bytes(-self._data.tell() % 4))

    def directory(self, name: str) -> None:
        self._entry(name, stat.S_IFDIR | 0o755, b"")

    def file(self, name: str, content: bytes, permissions: int = 0o644) -> None:
        self._entry(name, stat.S_IFREG | permissions, content)

    def finish(self) -> bytes:
        self._entry("TRAILER!!!", 0, b"")
        return self._data.getvalue()


def module_bytes(kernel: Kernel, name: str) -> bytes:
    """A module's code, uncompressed: busybox's insmod knows no compression."""
    found = next(kernel.modules.rglob(f"{name}.ko*"), None)
    if found is None:
        raise Failure(Exit.HOST_NOT_READY, f"kernel {kernel.release} has no module {name}")
    data = found.read_bytes()
    if found.suffix == ".ko":
        return data
    if found.suffix == ".xz":
        return lzma.decompress(data)
    raise Failure(Exit.HOST_NOT_READY, f"{found} is compressed in a way that cannot be undone here")


def initramfs(kernel: Kernel, job: Mapping[str, bytes]) -> bytes:
    archive = Cpio()
    for name in ("bin", "modules", "job", "proc", "sys", "dev", "host", "writes", "root"):
        archive.directory(name)
    archive.file("bin/busybox", Path(located(BUSYBOX)).read_bytes(), 0o755)
    archive.file("modules/overlay.ko", module_bytes(kernel, "overlay"))
    archive.file("init", (HERE / "initramfs-init").read_bytes(), 0o755)
    archive.file("job/guest-init", (HERE / "guest-init").read_bytes())
    archive.file("job/modules-path", os.fsencode(kernel.modules.resolve()))
    for name, content in job.items():
        archive.file(f"job/{name}", content)
    return archive.finish()
