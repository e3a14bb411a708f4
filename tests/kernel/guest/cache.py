"""The cache of what was fetched: a tree for each kernel and for the file server, whole or not there."""

from __future__ import annotations

import fcntl
import lzma
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.kernel.guest.ending import Exit, Failure


def cache_directory() -> Path:
    own = os.environ.get("UBLK_TRIO_CACHE")
    if own:
        return Path(own).absolute()
    shared = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(shared).absolute() / "ublk_trio"


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
