"""Without the native part everything but opening a real ring works, and that says what is missing, in one line."""

from __future__ import annotations

import errno
import importlib
import os
import sys
from pathlib import Path

import pytest

from ublk_trio import uapi
from ublk_trio.errors import KernelError, KernelUnavailableError
from ublk_trio.real import RealKernel, control, native

NATIVE = "ublk_trio.real._native"


@pytest.fixture
def without_native(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the extension had not been built: importing it raises ModuleNotFoundError, its own name in it."""
    monkeypatch.delitem(sys.modules, NATIVE, raising=False)
    real_import = importlib.import_module

    def refuse(name: str, package: str | None = None) -> object:
        if name == NATIVE:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real_import(name, package)

    monkeypatch.setattr(importlib, "import_module", refuse)


@pytest.mark.usefixtures("without_native")
async def test_opening_the_control_ring_names_the_mend() -> None:
    """No native part: KernelUnavailableError, one line, what to run."""
    with pytest.raises(KernelUnavailableError) as caught:
        async with RealKernel().open_control():
            pass
    message = str(caught.value)
    assert message.startswith("the native part of ublk_trio was not built: ")
    assert "pip install" in message
    assert "\n" not in message


@pytest.mark.usefixtures("without_native")
@pytest.mark.parametrize("missing", ["gcc", "python3-dev", "liburing-dev"])
def test_the_message_names_the_package_that_is_missing(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    """What the build lacks is named, and what it has is not."""
    needs = {package: (lambda package=package: package != missing) for package in native._BUILD_NEEDS}
    monkeypatch.setattr(native, "_BUILD_NEEDS", needs)
    with pytest.raises(KernelUnavailableError, match=f"install {missing}, then run pip install"):
        native.load()


def test_importing_loads_no_native_code() -> None:
    """`import ublk_trio.real` must work where nothing was built, so it may not import the extension."""
    code = f"import sys, ublk_trio.real; sys.exit({NATIVE!r} in sys.modules)"
    assert os.spawnl(os.P_WAIT, sys.executable, sys.executable, "-c", code) == 0


@pytest.mark.parametrize("module", ["_cffi_backend", NATIVE])
def test_a_broken_native_part_is_said_to_be_broken(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    """cffi's run-time part gone, or an extension that does not load: never a bare ImportError."""

    def fail(name: str, package: str | None = None) -> object:
        if module == NATIVE:
            raise ImportError("undefined symbol: PyFoo")
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(KernelUnavailableError, match="does not load" if module == NATIVE else "pip install cffi"):
        native.load()


@pytest.mark.parametrize(
    ("number", "mend"),
    [
        (errno.ENOENT, "modprobe ublk_drv"),
        (errno.EACCES, "run as root"),
        (errno.EPERM, "run as root"),
        (errno.EIO, "see dmesg"),
    ],
)
def test_a_control_device_that_does_not_open_names_the_mend(
    monkeypatch: pytest.MonkeyPatch, number: int, mend: str
) -> None:
    """Every way in which the control device can fail to open gives the path, the errno's name and the mend."""

    def fail(path: str, flags: int) -> int:
        raise OSError(number, os.strerror(number), path)

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(KernelUnavailableError, match=mend) as caught:
        control._open_control_device()
    assert uapi.CONTROL_PATH in str(caught.value)
    assert errno.errorcode[number] in str(caught.value)


@pytest.mark.parametrize(
    ("setting", "mend"),
    [
        ("0", "seccomp"),
        ("1", "set it to 0, or run as root"),
        ("2", "io_uring_disabled=2: set it to 0"),
        (None, "seccomp"),
    ],
)
def test_disabled_io_uring_is_said_to_be_disabled(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, setting: str | None, mend: str
) -> None:
    """EPERM from the ring's set-up means a sysctl or a sandbox: which of them, and what to do."""
    path = tmp_path / "io_uring_disabled"
    if setting is not None:
        path.write_text(setting + "\n", encoding="ascii")
    monkeypatch.setattr(native, "_DISABLED", path)
    error = native.ring_error(-errno.EPERM, "io_uring_setup", "the control device")
    assert isinstance(error, KernelUnavailableError)
    assert mend in str(error)


def test_an_ordinary_failure_to_open_a_ring_is_the_kernels() -> None:
    """What is no lack of io_uring is a KernelError with its errno."""
    error = native.ring_error(-errno.ENOMEM, "io_uring_setup", "queue 1 of device 2")
    assert isinstance(error, KernelError)
    assert error.errno == errno.ENOMEM
    assert "queue 1 of device 2" in str(error)
    assert "ulimit -l" in str(error)
