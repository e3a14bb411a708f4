"""The way to the native part (`native/`, built as `ublk_trio.real._native`), and what to say when it is not there."""

from __future__ import annotations

import errno
import importlib
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from ublk_trio.errors import KernelError, KernelUnavailableError, UblkError, errno_text

if TYPE_CHECKING:
    from ublk_trio.real._native import _Ffi, _Lib

_MODULE = "ublk_trio.real._native"
_DISABLED = Path("/proc/sys/kernel/io_uring_disabled")

# What the build needs: how to see whether it is there, and the Debian package that has it.
_BUILD_NEEDS: dict[str, Callable[[], bool]] = {
    "gcc": lambda: shutil.which("gcc") is not None or shutil.which("cc") is not None,
    "python3-dev": lambda: Path(sysconfig.get_path("include"), "Python.h").exists(),
    "liburing-dev": lambda: Path("/usr/include/liburing.h").exists() or Path("/usr/local/include/liburing.h").exists(),
}


def load() -> tuple[_Ffi, _Lib]:
    """The native part's ``(ffi, lib)``. Raises `KernelUnavailableError` with the mend when it is missing or broken."""
    try:
        module: ModuleType = importlib.import_module(_MODULE)
    except ModuleNotFoundError as error:
        if error.name == _MODULE:
            raise KernelUnavailableError(_not_built_message()) from None
        # The extension imports cffi's run-time part, _cffi_backend.
        raise KernelUnavailableError(
            f"the native part of ublk_trio needs the Python package cffi: {_MEND_CFFI}"
        ) from None
    except ImportError as error:
        raise KernelUnavailableError(
            f"the native part of ublk_trio does not load ({error}): build it anew: {_MEND_BUILD}"
        ) from None
    return module.ffi, module.lib


_MEND_CFFI = "pip install cffi"
_MEND_BUILD = "pip install --force-reinstall --no-deps --no-cache-dir ublk_trio (in a checkout: pip install -e .)"


def _not_built_message() -> str:
    missing = [package for package, is_there in _BUILD_NEEDS.items() if not is_there()]
    install = f"install {' and '.join(missing)}, then run" if missing else "run"
    return f"the native part of ublk_trio was not built: {install} {_MEND_BUILD}"


def ring_error(number: int, call: str, what: str) -> UblkError:
    """The error for ``what`` (for example ``"queue 0 of device 3"``) when ``call`` failed with an errno while it was opened."""
    if call == "io_uring_setup":
        unavailable = {
            errno.ENOSYS: "this kernel was built without io_uring: boot one that has it",
            errno.EPERM: f"io_uring is disabled here ({_disabled_text()})",
            errno.EINVAL: "this kernel's io_uring is too old: boot Linux 6.0 or newer",
        }.get(abs(number))
        if unavailable is not None:
            return KernelUnavailableError(f"cannot open the ring of {what}: {unavailable}", number)
    mend = {
        errno.ENOMEM: ": free memory, raise the limit on locked memory (ulimit -l), or use fewer or shallower queues",
        errno.EMFILE: ": raise the limit on open files (ulimit -n)",
        errno.ENFILE: ": the whole machine is out of file handles (sysctl fs.file-max)",
    }.get(abs(number), "")
    return KernelError(number, f"cannot open the ring of {what}: {call}: {errno_text(number)}{mend}")


def _disabled_text() -> str:
    try:
        value = _DISABLED.read_text(encoding="ascii").strip()
    except OSError:
        value = "0"
    if value == "0":
        return "by a seccomp filter or a container's policy: allow the io_uring system calls"
    return f"sysctl kernel.io_uring_disabled={value}: set it to 0" + (", or run as root" if value == "1" else "")
