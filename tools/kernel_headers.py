"""Prints a directory with the C headers of the newest kernel that we test on: ``python -m tools.kernel_headers``.

A machine's own linux-libc-dev is as old as its Debian; tests/test_uapi.py compares ``uapi.py`` with these as well. They
come, checked and cached, the way the kernels themselves do (tests/kernel/guest).
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from tests.kernel.guest.cache import cache_directory, fill_cache
from tests.kernel.guest.ending import Exit, Failure
from tests.kernel.guest.kernels import SUITES
from tests.kernel.guest.packages import package_of, suite_packages, unpack

SERIES = "7.3"


def fill(root: Path) -> None:
    """Unpack the newest linux-libc-dev of the series' suite into `root`."""
    suite = SUITES[SERIES]
    mirror, index = suite_packages(suite)
    for stanza in index.split("\n\n"):
        if re.match(rf"Package: linux-libc-dev\n(?s:.*)^Version: {re.escape(SERIES)}\.", stanza, re.MULTILINE):
            unpack(mirror, package_of("linux-libc-dev", stanza), root)
            return
    raise Failure(Exit.HOST_NOT_READY, f"{suite} has no linux-libc-dev {SERIES}: is there a newer one by now?")


def main() -> int:
    name = f"headers-{SERIES}"
    root = cache_directory() / name
    try:
        print((root if root.exists() else fill_cache(name, fill)) / "usr" / "include")
    except Failure as failure:
        print(f"kernel_headers: {failure}", file=sys.stderr)
        return failure.code
    return 0


if __name__ == "__main__":
    sys.exit(main())
