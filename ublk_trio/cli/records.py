"""What a serving process leaves for ``list`` to read: which backend a device has. The kernel does not know.

One small JSON file per device in a directory that is gone after a reboot. It counts only while the process that wrote
it is the device's daemon, so a file that a killed process left behind misleads nobody; the next ``start`` or ``stop``
of that id removes it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from pathlib import Path

logger = logging.getLogger("ublk_trio.cli")


def _directory() -> Path:
    if os.geteuid() == 0:
        return Path("/run/ublk_trio")
    return Path(os.environ.get("XDG_RUNTIME_DIR") or f"/tmp/ublk_trio-{os.geteuid()}") / "ublk_trio"


def write_record(dev_id: int, *, backend: str) -> None:
    """Say that this process serves a device from ``backend``. A directory that cannot be written costs only the
    column in ``list``."""
    path = _directory() / f"{dev_id}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps({"pid": os.getpid(), "backend": backend}))
        partial.rename(path)
    except OSError as error:
        logger.info("cannot record the backend of device %d for `list`: %s", dev_id, error)


def remove_record(dev_id: int, *, pid: int | None = None) -> None:
    """Forget a device; with ``pid`` only what that process wrote. Fine if there is no record."""
    if pid is None or _record(dev_id).get("pid") == pid:
        with contextlib.suppress(OSError):
            (_directory() / f"{dev_id}.json").unlink()


def recorded_backend(dev_id: int, *, pid: int) -> str | None:
    """The backend that process ``pid`` said it serves a device from; None if it said nothing."""
    record = _record(dev_id)
    backend = record.get("backend") if record.get("pid") == pid else None
    return backend if isinstance(backend, str) else None


def _record(dev_id: int) -> dict[str, object]:
    try:
        record = json.loads((_directory() / f"{dev_id}.json").read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}
