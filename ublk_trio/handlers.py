"""From a request to the backend's method, and from what it returned or raised to the kernel's result.

A result is a number of bytes (READ, WRITE), 0 (everything else), or a negative errno:

- `OSError` fails the request with its errno. Which errnos an application sees unchanged is the kernel's choice
  (ENOSPC, ENODATA,
  ETIMEDOUT and some others are; most become EIO).
- ENOMEM, raised or returned as a negative number, is no result: the backend is out of resources, and the request waits to be
  tried again (`back_pressure`).
- `trio.TooSlowError`, what `trio.fail_after` raises, is ETIMEDOUT.
- Any other exception is EIO, and is logged with its traceback, once per kind (its type and the operation).
- A request that lies beyond the backend's end, because the disk has shrunk, is EIO, whatever its method raises.
- A short READ is committed as it is: the kernel asks again for the rest. A READ of 0 bytes is EIO.
- A short WRITE is EIO: since Linux 7.2 the kernel takes any result >= 0 of a write as all of it, so a short count
  must never be committed.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Awaitable
from types import CoroutineType
from typing import Any, Literal

import trio

from ublk_trio.backends import Backend, capabilities, is_async
from ublk_trio.errors import UsageError, errno_text
from ublk_trio.nursery import single_error
from ublk_trio.request import Request
from ublk_trio.uapi import IoFlag, IoOp

logger = logging.getLogger("ublk_trio.backend")

Serve = Literal["inline", "async"]
#: What a backend's method gives: None for "all of it", a number of bytes, or something to await for one of these.
Outcome = int | None

_WRONG_RESULT = "the method returned {}: fill the buffer in place, and return None or the number of bytes done"
_FUA = int(IoFlag.FUA)
_NOUNMAP = int(IoFlag.NOUNMAP)
_READ = int(IoOp.READ)
_WRITE = int(IoOp.WRITE)
_FLUSH = int(IoOp.FLUSH)
_DISCARD = int(IoOp.DISCARD)
_WRITE_ZEROES = int(IoOp.WRITE_ZEROES)


class Handlers:
    """A backend's operations, as one device serves them."""

    def __init__(self, backend: Backend, *, read_only: bool) -> None:
        """The backend must be open. With ``read_only`` only reading is offered."""
        self.backend = backend
        offered = capabilities(backend)
        self.offered = frozenset({"read"}) if read_only else offered
        self.read_only = "write" not in self.offered
        methods: Any = backend
        self._read = methods.read
        self._write = methods.write if "write" in self.offered else None
        self._flush = methods.flush if "flush" in self.offered else None
        self._discard = methods.discard if "discard" in self.offered else None
        self._write_zeroes = methods.write_zeroes if "write_zeroes" in self.offered else None
        self._logged: set[tuple[type[BaseException], int]] = set()

    def choose_serve(self, asked: Serve | None) -> Serve:
        """The way to serve: what was asked if it can be had, else what the methods are."""
        asynchronous = is_async(self.backend)
        if asked == "inline" and asynchronous:
            raise UsageError(
                f"{self.backend} has async methods and cannot be served inline: use serve='async', or leave it out"
            )
        return asked or ("async" if asynchronous else "inline")

    def start(self, request: Request) -> int | Awaitable[Outcome]:
        """Call the method. The result, or what the method wants awaited; then `finish` takes what came of it."""
        try:
            outcome = self._call(request)
        except Exception as exception:
            return self.failed(request, exception)
        if outcome is None:
            return request.success
        if isinstance(outcome, int):
            return self.finish(request, outcome)
        if isinstance(outcome, CoroutineType | Awaitable):
            return outcome
        return self.failed(request, TypeError(_WRONG_RESULT.format(type(outcome).__name__)))

    def _call(self, request: Request) -> Any:
        # Chosen by comparison and called directly: this runs once a request, and a table of wrappers costs one more call.
        op = request.op
        outcome: Any
        if op == _READ:
            outcome = self._read(request.offset, request.buffer[: request.length])
        elif op == _WRITE and self._write is not None:
            data = request.data[: request.length]
            outcome = self._write(request.offset, data, fua=bool(request.flags & _FUA))
        elif op == _FLUSH and self._flush is not None:
            outcome = self._flush()
        elif op == _DISCARD and self._discard is not None:
            outcome = self._discard(request.offset, request.length)
        elif op == _WRITE_ZEROES and self._write_zeroes is not None:
            outcome = self._write_zeroes(request.offset, request.length, unmap=not request.flags & _NOUNMAP)
        else:
            raise OSError(errno.EOPNOTSUPP, "not offered")
        return outcome

    def not_inline(self, request: Request, awaitable: Awaitable[Outcome]) -> int:
        """The kernel's result when a method that was taken for a plain one wants to be awaited."""
        close = getattr(awaitable, "close", None)
        if close is not None:
            close()
        return self.failed(request, TypeError(f"{request} was served inline, but the method wants to be awaited"))

    def finish(self, request: Request, outcome: object) -> int:
        """The kernel's result for what a method returned."""
        if outcome is None or outcome == request.success:
            return request.success
        if not isinstance(outcome, int):
            return self.failed(request, TypeError(_WRONG_RESULT.format(type(outcome).__name__)))
        if outcome == -errno.ENOMEM:
            return outcome
        if not 0 <= outcome <= request.length:
            return self.failed(request, ValueError(f"the backend answered {outcome!r} to a {request}"))
        if request.op == _READ and outcome > 0:
            return outcome
        if request.op in (_READ, _WRITE):
            return self.failed(request, ValueError(f"the backend did only {outcome} bytes of a {request}"))
        return 0

    def failed(self, request: Request, exception: BaseException) -> int:
        """The kernel's result for what a method raised; logs what is not an ordinary I/O error."""
        cause = exception
        if isinstance(exception, BaseExceptionGroup):
            cause = single_error(exception) or exception
        if isinstance(cause, OSError) and cause.errno:
            logger.debug("backend %s: %s failed: %s", self.backend, request, errno_text(cause.errno))
            return -cause.errno
        if isinstance(cause, trio.TooSlowError):
            return -errno.ETIMEDOUT
        if request.offset + request.length > self.backend.size:
            # The disk shrank under a request: no wonder that the method stumbles over it.
            return -errno.EIO
        kind = (type(cause), request.op)
        if kind not in self._logged:
            self._logged.add(kind)
            logger.error(
                "backend %s: %s failed with EIO because of this bug of the backend's; further ones are not logged",
                self.backend,
                request,
                exc_info=exception,
            )
        return -errno.EIO
