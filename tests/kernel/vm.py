#!/usr/bin/env python3
"""Run a command as root under a real kernel that has ``ublk_drv``, in a throw-away virtual machine.

    python3 tests/kernel/vm.py run --kernel 6.12 -- COMMAND ARG...
    python3 tests/kernel/vm.py fetch --kernel 6.12 --kernel 7.3
    python3 tests/kernel/vm.py check

The guest's root is this machine's own root, read-only, under an overlay in memory: the command
sees the checkout and its virtual environment at the paths that they have here, and nothing that it
does lasts. The exit code is the command's own, or one of ``Exit`` below, with one line on stderr
that says what, why and how to mend it.

Facts that this rests on, and what they mean for it
---------------------------------------------------
*Kernels.* Debian's cloud kernels have ``ublk_drv`` and ``overlay`` and ``virtio_blk`` as modules,
and ``virtiofs``, ``virtio_console`` and ``virtio_pci`` built in: the initramfs needs busybox and
``overlay.ko`` only. Up to 7.2 one package ``linux-image-RELEASE`` holds all; 7.3 splits it into
``linux-binary-``, ``linux-modules-`` and ``linux-base-RELEASE``. They are unpacked into a cache
with ``dpkg-deb -x`` and never installed. The mirror is the one that apt uses here.

*Trust.* InRelease is signed, names the SHA-256 of the package index, which names that of each
package. All three are checked (the signature by ``gpgv`` or ``sqv``, whichever apt brought along).

*virtiofsd.* An installed one of the Rust kind is used, or else Debian 13's, unpacked into the
cache with its libraries and run by its own dynamic loader. Debian 12's own (C, part of QEMU) will
not do: overlayfs opens every file with O_NOATIME, which the kernel grants to a file's owner only;
the Rust one drops that flag, so an ordinary user can serve root's files. It runs unsandboxed: what
it shares is the whole root, and it has just the rights of who calls it. A mount point in there
must not be announced as such to the guest, because overlayfs refuses to enter it then.

*Output.* A virtio-serial port carries the command's output (stdout and stderr in one, as on a
terminal), so the kernel's console, on a serial port, never mixes with it. In it, ``\\x01NONCE
WORD...\\n`` is a message of the guest's init: ``start``, ``exit STATUS`` or ``failed REASON``. The
port keeps order, so who has read ``exit`` has all the output: the machine is killed then, and
there is no shutdown in which the end could get lost.

*Nothing is left.* All sockets are pairs or of the abstract kind, the initramfs is a memfd and the
scratch disk a file without a name, so there are no names to remove; the two child processes are
killed on the way out, and die with this process (PR_SET_PDEATHSIG) if it is itself killed.

*A wrong clock.* The guest measures the processor's clock against an emulated timer while it boots; on an
overloaded machine it can get that wrong by a factor of two and more. Its time-outs are then worth
nothing, so its clock is compared with ours before the command starts, and a boot with a fast one
is tried again.

*Early death.* Under QEMU 7.2 (Debian 12) 3 of the first 17 boots of 6.12 died within two seconds,
by a double fault or a NULL pointer, with what looks like the low bits of a pointer in EFLAGS, in
two of them on the instruction behind a ``cmpxchg16b`` of the kernel's allocator. Likely that
instruction's emulation leaves wrong flags for an interrupt to save, and the `Oops: int3` that
others saw in one boot of ten is the same fault. A CPU without it (``-cx16``) makes the kernel do
without: none of 40 boots of it died since. Should `Oops: int3` still come before the command has
started, exactly that is tried again, at most twice. Nothing else ever is.
"""

from __future__ import annotations

import argparse
import fcntl
import functools
import hashlib
import io
import lzma
import os
import re
import resource
import secrets
import selectors
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from types import FrameType
from typing import NoReturn

HERE = Path(__file__).resolve().parent

SUITES = {"6.12": "trixie", "7.3": "trixie-backports"}
"""Kernel series that can be asked for, and the Debian suite that has it."""

VIRTIOFSD_SUITE = "trixie"
VIRTIOFSD_PACKAGES = ("virtiofsd", "libc6", "libgcc-s1", "libcap-ng0", "libseccomp2")

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
SCRATCH_DEVICE = "/dev/vda"

EMULATED_CPU = "max,-cx16"
"""Everything that QEMU can emulate but ``cmpxchg16b``: see *Early death* above."""

BOOT_SECONDS_MAX = 300.0
"""An emulated boot takes 6 to 10 s on an idle machine; beyond this it hangs."""

BOOTS_MAX = 3
"""The first, and two more after a boot that emulation spoilt."""

CLOCK_RATIO_MAX = 1.25
"""By how much the guest's clock may run faster than ours."""

CONSOLE_BYTES_MAX = 4 << 20
NETWORK_SECONDS_MAX = 60.0
CONSOLE_SYNC_SECONDS_MAX = 5.0
COMPLAINT_LINES_MAX = 200
CONSOLE_TAIL_LINES = 40

EARLY_DEATH = re.compile(r"Oops: int3\b")
COMPLAINT = re.compile(
    r"\bBUG:|\bOops\b|\bWARNING:|\bKernel panic\b|\bhung[ _]task|blocked for more than \d+ seconds"
    r"|\bUBSAN:|\bgeneral protection fault\b|\bdetected stalls?\b"
)


class Exit(IntEnum):
    """Exit codes that are not the command's."""

    USAGE = 2
    GUEST_DIED = 120
    KERNEL_COMPLAINED = 121
    TIMED_OUT = 124
    HOST_NOT_READY = 125


class Failure(Exception):
    """The run cannot go on; `code` is the exit code, the message one line with the mend."""

    def __init__(self, code: Exit, message: str) -> None:
        super().__init__(message)
        self.code = code


class Stopped(BaseException):
    """A signal asked this process to end. Not an Exception: nothing but `main` may catch it."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number


def note(message: str) -> None:
    print(f"vm.py: {message}", file=sys.stderr, flush=True)


# -------------------------------------------- what the host must have


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

VIRTIOFSD = Tool(names=("virtiofsd",), package="virtiofsd", directories=("/usr/libexec",))
"""Not in TOOLS: where it is missing, it is fetched."""


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


# -------------------------------------------- kernels: from the mirror into the cache


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A kernel in the cache: `modules` is its /usr/lib/modules/RELEASE."""

    release: str
    image: Path
    modules: Path


@dataclass(frozen=True, kw_only=True)
class Package:
    """What the index says of one .deb: its place under the mirror, and the digest it must have."""

    name: str
    filename: str
    sha256: str


def cache_directory() -> Path:
    own = os.environ.get("UBLK_TRIO_CACHE")
    if own:
        return Path(own).absolute()
    shared = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(shared).absolute() / "ublk_trio"


def cached_kernel(series: str) -> Kernel | None:
    root = cache_directory() / f"linux-{series}"
    try:
        release = (root / "release").read_text(encoding="ascii").strip()
    except FileNotFoundError:
        return None
    modules = root / "usr" / "lib" / "modules" / release
    return Kernel(release=release, image=root / "vmlinuz", modules=modules)


def apt_source_files() -> Iterator[Path]:
    """apt's own source files, where apt's configuration says that they are."""
    answer = subprocess.run(
        ["apt-config", "shell", "F", "Dir::Etc::sourcelist/f", "D", "Dir::Etc::sourceparts/d"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for assignment in shlex.split(answer):
        name, _, value = assignment.partition("=")
        if name == "F":
            yield Path(value)
        else:
            yield from sorted(Path(value).glob("*.list"))
            yield from sorted(Path(value).glob("*.sources"))


def one_line_uris(text: str) -> Iterator[str]:
    """The URIs of a .list file: ``deb [options] URI suite component...``."""
    for line in text.splitlines():
        match = re.match(r"\s*deb\s+(?:\[[^]]*\]\s*)?(\S+)\s", line)
        if match:
            yield match[1]


def deb822_uris(text: str) -> Iterator[str]:
    """The URIs of a .sources file: stanzas of fields, which may go on over indented lines."""
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    for stanza in re.split(r"\n[ \t]*\n", "\n".join(lines)):
        fields = {
            match[1].lower(): match[2].split() for match in re.finditer(r"(?m)^([\w-]+):((?:.*)(?:\n[ \t].*)*)", stanza)
        }
        enabled = "".join(fields.get("enabled", ["yes"])).lower() not in ("no", "false", "0")
        if enabled and "deb" in fields.get("types", []):
            yield from fields.get("uris", [])


def mirrors() -> list[str]:
    """Base URIs of the mirrors that apt uses, those that look like Debian's main archive first."""
    uris: list[str] = []
    try:
        for path in apt_source_files():
            parse = deb822_uris if path.suffix == ".sources" else one_line_uris
            if path.is_file():
                uris += parse(path.read_text(encoding="utf-8"))
    except (OSError, subprocess.CalledProcessError) as error:
        raise Failure(Exit.HOST_NOT_READY, f"apt's sources cannot be read ({error})") from error
    usable = [uri.rstrip("/") for uri in uris if re.match(r"https?://", uri)]
    return sorted(dict.fromkeys(usable), key=lambda uri: not uri.endswith("/debian"))


def download(uri: str, sha256: str | None = None) -> bytes:
    """The bytes at `uri`, of that digest if one is given."""
    with urllib.request.urlopen(uri, timeout=NETWORK_SECONDS_MAX) as response:
        data: bytes = response.read()
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        why = "its SHA-256 is not the one that the signed index gives: run it again"
        raise Failure(Exit.HOST_NOT_READY, f"{uri} was damaged on the way, {why}")
    return data


def find_mirror(suite: str) -> tuple[str, bytes]:
    """The first mirror that has `suite`, and the suite's InRelease."""
    tried = []
    for mirror in mirrors():
        try:
            return mirror, download(f"{mirror}/dists/{suite}/InRelease")
        except OSError as error:
            tried.append(f"{mirror}: {error}")
    why = "; ".join(tried) or "apt has no http or https source of type deb"
    mend = "check the network, the proxy settings and apt's sources"
    raise Failure(Exit.HOST_NOT_READY, f"no mirror gives the suite {suite} ({why}): {mend}")


def signed_text(in_release: bytes, suite: str) -> str:
    """The text of InRelease, as far as one of Debian's archive keys has signed it."""
    gpgv, sqv = shutil.which("gpgv"), shutil.which("sqv")
    if not KEYRING.exists() or (gpgv is None and sqv is None):
        mend = apt_get_install(["gpgv", "debian-archive-keyring"])
        raise Failure(Exit.HOST_NOT_READY, f"nothing here can check a signature: run `{mend}`")
    with tempfile.TemporaryDirectory(prefix="ublk_trio-") as directory:
        message, text = Path(directory) / "InRelease", Path(directory) / "Release"
        message.write_bytes(in_release)
        if gpgv is not None:
            command = [gpgv, "--status-fd", "1", "--keyring", str(KEYRING)]
            command += ["--output", str(text), str(message)]
        else:
            command = [str(sqv), "--keyring", str(KEYRING), "--output", str(text)]
            command += ["--cleartext", str(message)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        # gpgv also fails when just one of several signatures is by a key that is newer than the
        # keyring of this release.
        good = result.returncode == 0
        if gpgv is not None:
            good = "[GNUPG:] VALIDSIG" in result.stdout and "BADSIG" not in result.stdout
        if not good or not text.exists():
            why = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
            mend = "update the package debian-archive-keyring, or mistrust the mirror"
            raise Failure(Exit.HOST_NOT_READY, f"{suite}'s signature is not good ({why}): {mend}")
        return text.read_text(encoding="utf-8")


@functools.cache
def suite_packages(suite: str) -> tuple[str, str]:
    """A mirror, and the text of the suite's package index."""
    mirror, in_release = find_mirror(suite)
    release = signed_text(in_release, suite)
    match = re.search(r"(?m)^ ([0-9a-f]{64}) +\d+ main/binary-amd64/Packages\.xz$", release)
    if match is None:
        raise Failure(Exit.HOST_NOT_READY, f"{mirror} has no amd64 package index for {suite}")
    # By digest and not by name: a mirror that changes between two requests still matches.
    place = f"{mirror}/dists/{suite}/main/binary-amd64/by-hash/SHA256/{match[1]}"
    return mirror, lzma.decompress(download(place, match[1])).decode("utf-8")


def package_of(name: str, stanza: str) -> Package:
    fields = dict(re.findall(r"(?m)^(Filename|SHA256): (\S+)$", stanza))
    return Package(name=name, filename=fields["Filename"], sha256=fields["SHA256"])


def cloud_packages(index: str, series: str) -> dict[str, dict[str, Package]]:
    """The packages of each release of `series`' cloud kernel: release -> kind -> package."""
    pattern = rf"linux-(image|binary|modules|base)-({re.escape(series)}\.[\w.+~]+-cloud-amd64)"
    releases: dict[str, dict[str, Package]] = {}
    for stanza in index.split("\n\n"):
        match = re.match(rf"Package: {pattern}\n", stanza)
        if match is None:
            continue
        package = package_of(f"linux-{match[1]}-{match[2]}", stanza)
        releases.setdefault(match[2], {})[match[1]] = package
    return releases


def newest_kernel(index: str, series: str) -> tuple[str, list[Package]]:
    """The newest release of `series` and the packages to unpack for it."""
    releases = cloud_packages(index, series)
    split = {"binary", "modules", "base"}
    complete = {
        release: [package for kind, package in kinds.items() if kind in split]
        if split <= kinds.keys()
        else [kinds["image"]]
        for release, kinds in releases.items()
        if split <= kinds.keys() or ("image" in kinds and "binary" not in kinds)
    }
    if not complete:
        why = f"the suite {SUITES[series]} has no cloud kernel {series} (any more?)"
        mend = f"keep a cache that has it, or put a newer series into SUITES in {HERE / 'vm.py'}"
        raise Failure(Exit.HOST_NOT_READY, f"{why}: {mend}")
    newest = max(complete, key=lambda name: [int(part) for part in re.findall(r"\d+", name)])
    return newest, complete[newest]


def unpack(mirror: str, package: Package, root: Path) -> None:
    note(f"fetching {package.name}")
    archive = root / "package.deb"
    archive.write_bytes(download(f"{mirror}/{package.filename}", package.sha256))
    subprocess.run([located(DPKG_DEB), "-x", archive, root], check=True, capture_output=True)
    archive.unlink()


def settle(root: Path, release: str) -> None:
    """Give an unpacked kernel the shape that `cached_kernel` expects."""
    # depmod -b looks under lib/modules or usr/lib/modules, as it was built: let both lead there.
    if not (root / "usr" / "lib").exists():
        (root / "usr").mkdir(exist_ok=True)
        (root / "usr" / "lib").symlink_to("../lib")
    if not (root / "lib").exists():
        (root / "lib").symlink_to("usr/lib")
    modules = root / "usr" / "lib" / "modules" / release
    images = [root / "boot" / f"vmlinuz-{release}", modules / "vmlinuz"]
    image = next(path for path in images if path.exists())
    image.rename(root / "vmlinuz")
    subprocess.run([located(DEPMOD), "-b", root, release], check=True, capture_output=True, text=True)
    if "/ublk_drv.ko" not in (modules / "modules.dep").read_text(encoding="utf-8"):
        raise Failure(Exit.HOST_NOT_READY, f"the packages of {release} have no module ublk_drv")
    (root / "release").write_text(release + "\n", encoding="ascii")


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Only one process at a time; the lock goes with the process, however it ends."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "lock").open("w", encoding="ascii") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def fill_cache(name: str, fill: Callable[[Path], None]) -> Path:
    """The tree `name` of the cache, made by `fill` if it is not there; never half of it."""
    cache = cache_directory()
    final = cache / name
    try:
        with locked(cache):
            if final.exists():  # another process was faster
                return final
            for leftover in cache.glob("*.partial"):  # of one that was killed: we hold the lock
                shutil.rmtree(leftover)
            with tempfile.TemporaryDirectory(suffix=".partial", dir=cache) as directory:
                root = Path(directory) / "root"
                root.mkdir()
                fill(root)
                root.rename(final)
    except subprocess.CalledProcessError as error:
        why = (str(error.stderr or "") or str(error)).strip().splitlines()[-1]
        raise Failure(Exit.HOST_NOT_READY, f"{error.cmd[0]} failed: {why}") from error
    except (OSError, EOFError, lzma.LZMAError) as error:
        mend = f"see to the network and to {cache}, and run it again"
        raise Failure(Exit.HOST_NOT_READY, f"{name} was not fetched ({error}): {mend}") from error
    return final


def fill_kernel(series: str, root: Path) -> None:
    mirror, index = suite_packages(SUITES[series])
    release, packages = newest_kernel(index, series)
    for package in packages:
        unpack(mirror, package, root)
    settle(root, release)


def get_kernel(series: str) -> Kernel:
    """A kernel from the cache, or else from the mirror."""
    kernel = cached_kernel(series)
    if kernel is None:
        fill_cache(f"linux-{series}", functools.partial(fill_kernel, series))
        kernel = cached_kernel(series)
    assert kernel is not None, "it was just put there"
    return kernel


def fill_virtiofsd(root: Path) -> None:
    mirror, index = suite_packages(VIRTIOFSD_SUITE)
    for name in VIRTIOFSD_PACKAGES:
        stanza = re.search(rf"(?ms)^Package: {re.escape(name)}\n.*?(?=^$)", index)
        if stanza is None:
            raise Failure(Exit.HOST_NOT_READY, f"{VIRTIOFSD_SUITE} has no package {name}")
        unpack(mirror, package_of(name, stanza[0]), root)


def get_virtiofsd() -> list[str]:
    """The command that starts a virtiofsd of the Rust kind: the host's, or the cache's."""
    found = VIRTIOFSD.find()
    if found is not None:
        answer = subprocess.run([found, "--help"], capture_output=True, text=True, check=False)
        if "--readonly" in answer.stdout:  # the C one has not got it
            return [str(found)]
    root = cache_directory() / "virtiofsd"
    if not root.exists():
        fill_cache("virtiofsd", fill_virtiofsd)
    libraries = root / "usr" / "lib" / "x86_64-linux-gnu"
    loader = libraries / "ld-linux-x86-64.so.2"
    program = root / "usr" / "libexec" / "virtiofsd"
    return [str(loader), "--library-path", str(libraries), str(program)]


# -------------------------------------------- the initramfs


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
    raise Failure(Exit.HOST_NOT_READY, f"{found} is compressed in a way that vm.py cannot undo")


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


# -------------------------------------------- what is asked for


@dataclass(frozen=True, kw_only=True)
class Options:
    """One `run`."""

    series: str
    cpus: int
    memory: str
    timeout_seconds: float
    icount: bool
    kvm: bool
    udev: bool
    console: bool
    scratch_bytes: int | None
    fail_on_kernel_warning: bool
    directory: Path
    environment: Mapping[str, str]
    command: Sequence[str]

    def touches_tmp(self) -> bool:
        """Whether the command needs something under /tmp, which a tmpfs there would hide."""
        words = [str(self.directory), *self.command, *self.environment.values()]
        paths = [path for word in words for path in re.split("[:=]", word)]
        return any(path == "/tmp" or path.startswith("/tmp/") for path in paths)

    def guest_environment(self) -> dict[str, str]:
        scratch = {} if self.scratch_bytes is None else {"UBLK_TRIO_SCRATCH": SCRATCH_DEVICE}
        return {**self.environment, **scratch}

    def job(self, nonce: str) -> dict[str, bytes]:
        """The two files that the guest's init reads."""
        settings = {
            "nonce": nonce,
            "udev": "yes" if self.udev else "no",
            "scratch": "" if self.scratch_bytes is None else SCRATCH_DEVICE,
            "tmp_on_tmpfs": "no" if self.touches_tmp() else "yes",
        }
        lines = [
            *(f"export {name}={shlex.quote(v)}" for name, v in self.guest_environment().items()),
            f"cd {shlex.quote(str(self.directory))} || exit 126",
            f"exec {shlex.join(self.command)}",
        ]
        assignments = [f"{name}={shlex.quote(value)}" for name, value in settings.items()]
        texts = {"settings": assignments, "command": lines}
        return {name: os.fsencode("\n".join(text) + "\n") for name, text in texts.items()}


def accelerator_arguments(options: Options) -> list[str]:
    if options.kvm:
        return ["-accel", "kvm", "-cpu", "host", "-smp", str(options.cpus)]
    if options.icount:
        # The guest's clock counts instructions, 2 ns each. String moves are grossly slow in that.
        clock = ["-icount", "shift=1,sleep=off", "-smp", "1"]
        return ["-accel", "tcg,thread=single", "-cpu", f"{EMULATED_CPU},-erms,-fsrm", *clock]
    return ["-accel", "tcg,thread=multi", "-cpu", EMULATED_CPU, "-smp", str(options.cpus)]


KERNEL_ARGUMENTS = (
    "console=ttyS0",
    "loglevel=5",  # not `quiet`: a WARNING is of level 4, and `quiet` shows only what is below that
    "printk.devkmsg=on",
    "panic=-1",
    "mitigations=off",
    "nokaslr",
    "tsc=reliable",
    "random.trust_cpu=on",
)


# -------------------------------------------- reading the guest


@dataclass(kw_only=True)
class Messages:
    """Parts the port's bytes into the command's output and the messages of the guest's init."""

    nonce: str
    _pending: bytes = b""

    def feed(self, data: bytes) -> Iterator[bytes | str]:
        """Output as bytes, messages as str, in order."""
        marker = b"\x01" + self.nonce.encode("ascii") + b" "
        self._pending += data
        while (start := self._pending.find(marker)) >= 0:
            end = self._pending.find(b"\n", start)
            if start > 0:
                yield self._pending[:start]
            if end < 0:
                self._pending = self._pending[start:]
                return
            message = self._pending[start + len(marker) : end]
            self._pending = self._pending[end + 1 :]
            yield message.decode("utf-8", "replace")
        end = len(self._pending) - self._held_back(marker)
        if end > 0:
            yield self._pending[:end]
        self._pending = self._pending[end:]

    def _held_back(self, marker: bytes) -> int:
        """How many bytes at the end may be the beginning of a marker."""
        longest = min(len(marker) - 1, len(self._pending))
        return next((n for n in range(longest, 0, -1) if self._pending.endswith(marker[:n])), 0)


class Console:
    """The kernel's console: its end, bounded, as text."""

    def __init__(self, nonce: str, *, live: bool = False) -> None:
        self._nonce = nonce
        self._live = live
        self._data = bytearray()

    def feed(self, data: bytes) -> None:
        if self._live:
            write_all(sys.stderr.fileno(), data.replace(b"\r", b""))
        self._data += data
        if len(self._data) > CONSOLE_BYTES_MAX:
            del self._data[: CONSOLE_BYTES_MAX // 2]

    def text(self) -> str:
        return self._data.decode("utf-8", "replace").replace("\r", "")

    def ended(self) -> bool:
        """Whether all that the kernel said up to the command's end has arrived."""
        return f"{self._nonce} exit".encode() in self._data

    def tail(self) -> str:
        return "\n".join(self.text().splitlines()[-CONSOLE_TAIL_LINES:])

    def complaints(self) -> str:
        """What the kernel said while the command ran, from its first complaint on; or ""."""
        begun = self.text().rpartition(f"{self._nonce} start\n")[2]
        lines = begun.partition(f"ublk_trio-vm: {self._nonce} exit")[0].splitlines()
        first = next((n for n, line in enumerate(lines) if COMPLAINT.search(line)), None)
        return "" if first is None else "\n".join(lines[first:][:COMPLAINT_LINES_MAX])


def write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


# -------------------------------------------- the machine


def virtiofsd_command(virtiofsd: Sequence[str], listener: int) -> list[str]:
    return [
        *virtiofsd,
        *(f"--fd={listener}", "--shared-dir=/", "--readonly", "--cache=always"),
        *("--sandbox=none", "--no-announce-submounts", "--rlimit-nofile=0", "--log-level=warn"),
    ]


def raise_descriptor_limit() -> None:
    """virtiofsd keeps a descriptor for each file that the guest knows, up to the hard limit."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class Machine:
    """One boot: the two processes and the streams between them and us. `close` ends all of it."""

    def __init__(self, kernel: Kernel, virtiofsd: Sequence[str], options: Options) -> None:
        self.nonce = secrets.token_hex(16)
        self.console = Console(self.nonce, live=options.console)
        # What QEMU and virtiofsd say themselves.
        self.diagnostics = Console(self.nonce, live=options.console)
        self.started = False
        # Ours and the guest's, in seconds, when its init began.
        self.clocks = (0.0, 0.0)
        self._kernel = kernel
        self._virtiofsd = virtiofsd
        self._options = options
        self._stack = ExitStack()
        self._selector = self._stack.enter_context(selectors.DefaultSelector())
        self._messages = Messages(nonce=self.nonce)

    def __enter__(self) -> Machine:
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_exception: object) -> None:
        self._stack.close()

    # -- starting

    def _spawn(self, command: Sequence[str], descriptors: Collection[int]) -> None:
        # A session of its own: Ctrl-C on the terminal reaches us only, and we end the rest.
        errors, errors_end = self._pair()
        process = subprocess.Popen(
            [located(SETPRIV), "--pdeathsig", "KILL", "--", *command],
            stdin=subprocess.DEVNULL,
            stdout=errors_end.fileno(),
            stderr=errors_end.fileno(),
            pass_fds=descriptors,
            start_new_session=True,
        )
        self._stack.callback(end_process, process)
        errors_end.close()
        self._selector.register(errors, selectors.EVENT_READ, self.diagnostics.feed)

    def _pair(self) -> tuple[socket.socket, socket.socket]:
        ours, theirs = socket.socketpair()
        self._stack.enter_context(ours)
        self._stack.enter_context(theirs)
        return ours, theirs

    def _start(self) -> None:
        raise_descriptor_limit()
        filesystem = self._start_virtiofsd()
        output, output_end = self._pair()
        console, console_end = self._pair()
        self._output = output
        self._selector.register(console, selectors.EVENT_READ, self.console.feed)
        self._selector.register(output, selectors.EVENT_READ, None)
        image = self._initramfs()
        ends = [filesystem, output_end, console_end]
        descriptors = [image, *(end.fileno() for end in ends)]
        command = self._qemu_command(*descriptors)
        if self._options.scratch_bytes is not None:
            scratch = self._scratch(self._options.scratch_bytes)
            descriptors.append(scratch)
            command += scratch_arguments(scratch)
        self._spawn(command, descriptors)
        # Ours must go, or the end of the machine would not be seen as the end of the streams.
        for end in ends:
            end.close()

    def _start_virtiofsd(self) -> socket.socket:
        """Start the file server; returns QEMU's end of the connection to it.

        The listener has a name of the abstract kind, and we connect before the server exists: it
        accepts one connection, the first, which is ours.
        """
        listener = self._stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind("")
        listener.listen(1)
        connection = self._stack.enter_context(socket.socket(socket.AF_UNIX))
        connection.connect(listener.getsockname())
        command = virtiofsd_command(self._virtiofsd, listener.fileno())
        self._spawn(command, [listener.fileno()])
        listener.close()
        return connection

    def _initramfs(self) -> int:
        descriptor = os.memfd_create("initramfs")
        self._stack.callback(os.close, descriptor)
        write_all(descriptor, initramfs(self._kernel, self._options.job(self.nonce)))
        return descriptor

    def _scratch(self, size_bytes: int) -> int:
        file = tempfile.TemporaryFile()  # noqa: SIM115 - the stack closes it
        self._stack.enter_context(file)
        file.truncate(size_bytes)
        return file.fileno()

    def _qemu_command(self, image: int, filesystem: int, output: int, console: int) -> list[str]:
        options = self._options
        return [
            located(QEMU),
            *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"),
            *("-machine", "q35,memory-backend=memory", "-m", options.memory),
            # virtiofsd reads and writes the guest's memory, so it must be shareable.
            *("-object", f"memory-backend-memfd,id=memory,size={options.memory},share=on"),
            *accelerator_arguments(options),
            *("-kernel", str(self._kernel.image), "-initrd", f"/proc/self/fd/{image}"),
            *("-append", " ".join(KERNEL_ARGUMENTS)),
            *("-chardev", f"socket,id=filesystem,fd={filesystem}"),
            *("-device", "vhost-user-fs-pci,queue-size=1024,chardev=filesystem,tag=host"),
            *("-chardev", f"socket,id=console,fd={console}", "-serial", "chardev:console"),
            *("-chardev", f"socket,id=output,fd={output}", "-device", "virtio-serial-pci"),
            *("-device", "virtserialport,nr=1,chardev=output,name=ublk_trio.output"),
        ]

    # -- running

    def events(self, deadline: float) -> Iterator[bytes | str | None]:
        """Output (bytes) and messages (str) as they come, None for news on the console.

        Ends when QEMU does. Raises TimeoutError at `deadline` (of the monotonic clock).
        """
        while True:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise TimeoutError
            ready = self._selector.select(remaining)
            gone = False
            for key, _events in ready:
                stream = key.fileobj
                assert isinstance(stream, socket.socket)
                data = receive(stream)
                if not data:
                    self._selector.unregister(stream)
                    gone = gone or stream is self._output
                elif key.data is not None:
                    key.data(data)
                    yield None
                else:
                    yield from self._messages.feed(data)
            if gone:
                self._read_last_words()
                return

    def _read_last_words(self) -> None:
        """QEMU is gone: read what it and virtiofsd still said, which is in the sockets."""
        while ready := self._selector.select(0.2):
            for key, _events in ready:
                assert isinstance(key.fileobj, socket.socket)
                if data := receive(key.fileobj):
                    key.data(data)
                else:
                    self._selector.unregister(key.fileobj)
            if not self._selector.get_map():
                return


def receive(stream: socket.socket) -> bytes:
    try:
        return stream.recv(1 << 16)
    except ConnectionResetError:
        return b""


def scratch_arguments(descriptor: int) -> list[str]:
    # cache=unsafe: nobody needs this disk after a crash, and the host's fsync is slow.
    drive = f"file=/proc/self/fd/{descriptor},format=raw,if=none,id=scratch"
    device = "virtio-blk-pci,drive=scratch,serial=ublk_trio-scratch"
    return ["-drive", f"{drive},cache=unsafe,discard=unmap", "-device", device]


def end_process(process: subprocess.Popen[bytes]) -> None:
    """Kill a child's whole session and wait for it."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


# -------------------------------------------- one run


class BadBoot(Exception):
    """A boot that emulation is known to spoil now and then, noticed before the command has started."""


def report_console(machine: Machine) -> None:
    said = machine.diagnostics.tail()
    text = machine.console.tail() + (f"\n-- QEMU and virtiofsd say:\n{said}" if said else "")
    print(f"-- the end of the guest's console:\n{text}\n--", file=sys.stderr, flush=True)


def guest_died(machine: Machine, why: str) -> Failure:
    report_console(machine)
    when = "after the command had started" if machine.started else "before the command started"
    return Failure(Exit.GUEST_DIED, f"the guest failed {when}: {why}")


def check_clock(machine: Machine, guest_now: float) -> None:
    """Raise `BadBoot` if the guest's clock runs fast: every time-out of the command would then come too early."""
    host_then, guest_then = machine.clocks
    host_seconds, guest_seconds = time.monotonic() - host_then, guest_now - guest_then
    # Slow is harmless, and seems so here whenever a message is late.
    if guest_seconds > CLOCK_RATIO_MAX * host_seconds + 0.1:
        raise BadBoot(f"the guest's clock is wrong: it counted {guest_seconds:.1f} s in {host_seconds:.1f} s")


def handle_message(machine: Machine, message: str, began: float) -> int | None:
    """Act on a message of the guest's init; the command's exit status if that is what it was."""
    word, _, rest = message.partition(" ")
    if word == "clock":
        machine.clocks = time.monotonic(), float(rest)
    elif word == "start":
        check_clock(machine, float(rest))
        machine.started = True
        note(f"the guest is up after {time.monotonic() - began:.1f} s, the command starts")
    elif word == "exit":
        return int(rest)
    elif word == "failed":
        raise guest_died(machine, rest)
    return None


def follow(machine: Machine, deadline: float) -> int:
    """Pass the command's output on until it ends; its exit status."""
    began = time.monotonic()
    boot_deadline = min(began + BOOT_SECONDS_MAX, deadline)
    events = machine.events(boot_deadline)
    while True:
        try:
            for event in events:
                if isinstance(event, bytes):
                    write_all(sys.stdout.fileno(), event)
                elif isinstance(event, str):
                    status = handle_message(machine, event, began)
                    if status is not None:
                        return status
                    events = machine.events(deadline)
                    break
                elif not machine.started and EARLY_DEATH.search(machine.console.text()):
                    raise BadBoot("the boot died of the known `Oops: int3` of emulation")
            else:
                where = "its console is above"
                raise guest_died(machine, f"the virtual machine ended by itself, {where}")
        except TimeoutError:
            if machine.started or deadline <= boot_deadline:
                raise
            why = f"it was not up within {BOOT_SECONDS_MAX:.0f} s: is this machine overloaded?"
            raise guest_died(machine, why) from None


def await_console(machine: Machine) -> None:
    """Let what the kernel said up to the command's end arrive: the port is faster."""
    try:
        for _event in machine.events(time.monotonic() + CONSOLE_SYNC_SECONDS_MAX):
            if machine.console.ended():
                return
    except TimeoutError:
        note("the console lags behind; complaints of the kernel may be incomplete")


def boot_once(kernel: Kernel, virtiofsd: Sequence[str], options: Options, deadline: float) -> int:
    with Machine(kernel, virtiofsd, options) as machine:
        try:
            status = follow(machine, deadline)
            if not machine.console.ended():
                await_console(machine)
        except TimeoutError:
            what = "the command was not done" if machine.started else "the guest was not up"
            mend = "a longer --timeout, or look why it hangs"
            limit = f"{options.timeout_seconds:g} s"
            raise Failure(Exit.TIMED_OUT, f"{what} within {limit}: it needs {mend}") from None
        finally:
            complaints = machine.console.complaints() if machine.started else ""
            if complaints:
                note("the kernel complained while the command ran:")
                print(complaints, file=sys.stderr, flush=True)
        if complaints and options.fail_on_kernel_warning and status == 0:
            return Exit.KERNEL_COMPLAINED
        return status


def run(options: Options) -> int:
    """Boot, run the command, and return the exit code for this process."""
    require_tools()
    kernel, virtiofsd = get_kernel(options.series), get_virtiofsd()
    how = "KVM" if options.kvm else "counted instructions" if options.icount else "emulation"
    cpus = 1 if options.icount else options.cpus
    note(f"kernel {kernel.release}, {cpus} CPUs, {how}")
    deadline = time.monotonic() + options.timeout_seconds
    why = ""
    for _attempt in range(BOOTS_MAX):
        try:
            return boot_once(kernel, virtiofsd, options, deadline)
        except BadBoot as bad:
            why = str(bad)
            note(why)
    raise Failure(Exit.GUEST_DIED, f"{BOOTS_MAX} bad boots, the last: {why}: try --cpus 1, or --kvm where there is one")


# -------------------------------------------- the command line


def size_in_bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+)([KMGT]?)", text)
    if match is None or int(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write for example 512M or 4G")
    return int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}[match[2]]


def memory_size(text: str) -> str:
    size_in_bytes(text)
    return text


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def existing_directory(text: str) -> Path:
    path = Path(text).absolute()
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is not a directory")
    return path


def assignment(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII) is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vm.py",
        description="Run a command as root under a real kernel that has ublk_drv.",
        epilog="exit codes besides the command's own: "
        + ", ".join(f"{code.value} {code.name.lower().replace('_', ' ')}" for code in Exit),
    )
    commands = parser.add_subparsers(dest="action", required=True)
    run_parser = commands.add_parser("run", help="boot, run COMMAND, exit with its exit code")
    add = run_parser.add_argument
    add("--kernel", choices=SUITES, required=True)
    add("--cpus", type=positive, default=2, metavar="N")
    add("--memory", type=memory_size, default="4G", metavar="SIZE")
    add("--timeout", type=positive, default=900, metavar="SECONDS", help="boot and command")
    add("--icount", action="store_true", help="a clock that counts instructions; one CPU")
    add("--kvm", action="store_true", help="use KVM instead of emulation")
    add("--udev", action="store_true", help="run systemd-udevd in the guest")
    add("--console", action="store_true", help="the guest's console on stderr, as it comes")
    add("--scratch", type=size_in_bytes, metavar="SIZE", help="a disk: $UBLK_TRIO_SCRATCH")
    add("--fail-on-kernel-warning", action="store_true", help="exit 121 if the kernel complains")
    add("--cwd", type=existing_directory, metavar="DIR", help="default: where you are")
    add("--env", type=assignment, action="append", default=[], metavar="NAME=VALUE")
    run_parser.usage = "vm.py run --kernel VERSION [option]... -- COMMAND [ARG]..."
    fetch_parser = commands.add_parser("fetch", help="only bring kernels into the cache")
    fetch_parser.add_argument("--kernel", choices=SUITES, action="append", required=True)
    commands.add_parser("check", help="say what this machine lacks, and how to mend it")
    return parser


def run_options(parser: argparse.ArgumentParser, asked: argparse.Namespace, command: list[str]) -> Options:
    if not command:
        parser.error("run needs -- and a COMMAND after it")
    if asked.icount and asked.kvm:
        parser.error("--icount counts emulated instructions: it cannot go with --kvm")
    passed = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return Options(
        series=asked.kernel,
        cpus=asked.cpus,
        memory=asked.memory,
        timeout_seconds=asked.timeout,
        icount=asked.icount,
        kvm=asked.kvm,
        udev=asked.udev,
        console=asked.console,
        scratch_bytes=asked.scratch,
        fail_on_kernel_warning=asked.fail_on_kernel_warning,
        directory=asked.cwd or Path.cwd(),
        environment={**passed, **dict(asked.env)},
        command=command,
    )


def check() -> int:
    missing = list(missing_tools())
    for problem, _package in missing:
        print(problem)
    if missing:
        print("mend: " + apt_get_install([package for _problem, package in missing]))
    return Exit.HOST_NOT_READY if missing else 0


def fetch(series: Sequence[str]) -> int:
    require_tools()
    for one in series:
        print(f"{one}: {get_kernel(one).release}")
    print("virtiofsd: " + get_virtiofsd()[-1])
    return 0


def act(arguments: list[str]) -> int:
    own, command = arguments, []
    if "--" in arguments:
        split = arguments.index("--")
        own, command = arguments[:split], arguments[split + 1 :]
    parser = build_parser()
    asked = parser.parse_args(own)
    if asked.action == "check":
        return check()
    if asked.action == "fetch":
        return fetch(asked.kernel)
    return run(run_options(parser, asked, command))


def stop(signal_number: int, _frame: FrameType | None) -> NoReturn:
    for number in STOP_SIGNALS:  # from here on only the way out, which is short
        signal.signal(number, signal.SIG_IGN)
    raise Stopped(signal_number)


STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main(arguments: list[str]) -> int:
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, stop)
    try:
        return act(arguments)
    except Failure as failure:
        note(str(failure))
        return failure.code
    except Stopped as stopped:
        note(f"stopped by {signal.Signals(stopped.signal_number).name}")
        return 128 + stopped.signal_number
    except BrokenPipeError:
        return 128 + signal.SIGPIPE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
