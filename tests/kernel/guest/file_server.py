"""virtiofsd, which serves this machine's root to the guest.

An installed one of the Rust kind is used, or else Debian 13's, unpacked into the
cache with its libraries and run by its own dynamic loader. Debian 12's own (C, part of QEMU) will
not do: overlayfs opens every file with O_NOATIME, which the kernel grants to a file's owner only;
the Rust one drops that flag, so an ordinary user can serve root's files. It runs unsandboxed: what
it shares is the whole root, and it has just the rights of who calls it. A mount point in there
must not be announced as such to the guest, because overlayfs refuses to enter it then.
"""

from __future__ import annotations

import re
import resource
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.kernel.guest.cache import cache_directory, fill_cache
from tests.kernel.guest.ending import Exit, Failure
from tests.kernel.guest.host_tools import Tool
from tests.kernel.guest.packages import package_of, suite_packages, unpack

VIRTIOFSD_SUITE = "trixie"
VIRTIOFSD_PACKAGES = ("virtiofsd", "libc6", "libgcc-s1", "libcap-ng0", "libseccomp2")

VIRTIOFSD = Tool(names=("virtiofsd",), package="virtiofsd", directories=("/usr/libexec",))
"""Not in TOOLS: where it is missing, it is fetched."""


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
