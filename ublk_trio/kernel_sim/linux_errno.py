"""Linux's errno numbers, on whatever system this runs, and which of them a request's result survives as.

**Supported.** Every number is what this Python's `errno` calls by that name, so that tests can compare with it; names
that the system does not have get Linux's number.
"""

from __future__ import annotations

import errno
from typing import Final

from ublk_trio.errors import ENOTSUPP

__all__ = ["ENOTSUPP", "SURVIVING", "number", "through_block_status"]

_LINUX: Final = {
    "EIO": 5,
    "EBADE": 52,
    "EREMCHG": 78,
    "EREMOTEIO": 121,
    "ENODATA": 61,
    "ETIME": 62,
    "ENOLINK": 67,
    "EOVERFLOW": 75,
    "EILSEQ": 84,
    "EOPNOTSUPP": 95,
    "ETIMEDOUT": 110,
    "ETOOMANYREFS": 109,
}


def number(name: str) -> int:
    """The errno of that name."""
    return getattr(errno, name, 0) or _LINUX[name]


#: The errnos that have a block status of their own and reach the application; every other becomes EIO.
SURVIVING: Final = frozenset(
    map(
        number,
        [
            "EOPNOTSUPP",
            "ETIMEDOUT",
            "ENOSPC",
            "ENOLINK",
            "EREMOTEIO",
            "EBADE",
            "ENODATA",
            "EILSEQ",
            "ENOMEM",
            "EBUSY",
            "EAGAIN",
            "ENODEV",
            "EREMCHG",
            "ETOOMANYREFS",
            "EOVERFLOW",
            "ETIME",
            "EINVAL",
        ],
    )
)


def through_block_status(result: int) -> int:
    """The errno (positive) that an application sees for a request that ended with ``result``, a negative errno."""
    return -result if -result in SURVIVING else errno.EIO
