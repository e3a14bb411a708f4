"""Kernels: Debian's cloud kernels, unpacked into the cache.

They have ``ublk_drv`` and ``overlay`` and ``virtio_blk`` as modules, and ``virtiofs``, ``virtio_console`` and ``virtio_pci``
built in. Up to 7.2 one package ``linux-image-RELEASE`` holds all; 7.3 splits it into ``linux-binary-``, ``linux-modules-`` and
``linux-base-RELEASE``.
"""

from __future__ import annotations

import functools
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.kernel.guest.cache import cache_directory, fill_cache
from tests.kernel.guest.ending import Exit, Failure
from tests.kernel.guest.host_tools import DEPMOD, located
from tests.kernel.guest.packages import Package, package_of, suite_packages, unpack

SUITES = {"6.12": "trixie", "7.3": "trixie-backports"}
"""Kernel series that can be asked for, and the Debian suite that has it."""


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A kernel in the cache: `modules` is its /usr/lib/modules/RELEASE."""

    release: str
    image: Path
    modules: Path


def cached_kernel(series: str) -> Kernel | None:
    root = cache_directory() / f"linux-{series}"
    try:
        release = (root / "release").read_text(encoding="ascii").strip()
    except FileNotFoundError:
        return None
    modules = root / "usr" / "lib" / "modules" / release
    return Kernel(release=release, image=root / "vmlinuz", modules=modules)


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
        mend = f"keep a cache that has it, or put a newer series into SUITES in {__file__}"
        raise Failure(Exit.HOST_NOT_READY, f"{why}: {mend}")
    newest = max(complete, key=lambda name: [int(part) for part in re.findall(r"\d+", name)])
    return newest, complete[newest]


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
