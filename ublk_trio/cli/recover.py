"""``recover``: take over disks whose server was killed, and serve them as ``start`` does."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from ublk_trio.backends import parse_backend
from ublk_trio.cli.serving import Disk, serve_until_signal
from ublk_trio.errors import UsageError
from ublk_trio.handlers import Serve
from ublk_trio.options import DeviceOptions


async def recover(
    id: int,
    /,
    *,
    backend: str,
    serve: Serve | None = None,
    grace: float = 10.0,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Take over a disk whose server was killed, and serve it until SIGINT or SIGTERM.

    It must have been started with --recovery. Queues, depth, mode and recovery are the device's own. Prints the path of
    the disk when it is live again. A disk that cannot be taken over is left as it was.

    Parameters
    ----------
    id
        The N of /dev/ublkbN.
    backend
        What the disk was made of, as `start` takes it. Its size and block size must be the disk's.
    serve
        As for `start`.
    grace
        As for `start`.
    json
        Print a JSON object instead of the path.
    """
    if id < 0:
        raise UsageError("device ids are 0 or more")
    options = DeviceOptions(serve=serve, grace_seconds=grace)
    disk = Disk(spec=backend, backend=parse_backend(backend), options=options, recovers=id)
    return await serve_until_signal([disk], json=json)
