"""From a request to the backend's method, and from what it returned or raised to the kernel's result.

A result is a number of bytes (READ, WRITE), 0 (everything else), or a negative errno:

- `OSError` fails the request with its errno. Which errnos an application sees unchanged is the kernel's choice
  (ENOSPC, ENODATA,
  ETIMEDOUT and some others are; most become EIO).
- `trio.TooSlowError`, what `trio.fail_after` raises, is ETIMEDOUT.
- Any other exception is EIO, and is logged with its traceback, once per kind (its type and the operation).
- A short READ is committed as it is: the kernel asks again for the rest. A READ of 0 bytes is EIO.
- A short WRITE is EIO: since Linux 7.2 the kernel takes any result >= 0 of a write as all of it, so a short count
  must never be committed.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Awaitable, Callable
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
Call = Callable[[Request], Outcome | Awaitable[Outcome]]

_FUA = int(IoFlag.FUA)
_NOUNMAP = int(IoFlag.NOUNMAP)
_WRITE = int(IoOp.WRITE)
_READ = int(IoOp.READ)


def _calls(backend: Any, offered: frozenset[str]) -> list[Call | None]:
    """The backend's methods by op number."""
    calls: list[Call | None] = [None] * 256
    if "read" in offered:
        read = backend.read
        calls[IoOp.READ] = lambda r: read(r.offset, r.buffer[: r.length])
    if "write" in offered:
        write = backend.write
        calls[IoOp.WRITE] = lambda r: write(r.offset, r.data[: r.length], fua=bool(r.flags & _FUA))
    if "flush" in offered:
        flush = backend.flush
        calls[IoOp.FLUSH] = lambda r: flush()
    if "discard" in offered:
        discard = backend.discard
        calls[IoOp.DISCARD] = lambda r: discard(r.offset, r.length)
    if "write_zeroes" in offered:
        write_zeroes = backend.write_zeroes
        calls[IoOp.WRITE_ZEROES] = lambda r: write_zeroes(r.offset, r.length, unmap=not r.flags & _NOUNMAP)
    return calls


class Handlers:
    """A backend's operations, as one device serves them."""

    def __init__(self, backend: Backend, *, read_only: bool) -> None:
        """The backend must be open. With ``read_only`` only reading is offered."""
        self.backend = backend
        offered = capabilities(backend)
        self.offered = frozenset({"read"}) if read_only else offered
        self.read_only = "write" not in self.offered
        self._calls = _calls(backend, self.offered)
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
        call = self._calls[request.op]
        if call is None:
            return -errno.EOPNOTSUPP
        try:
            outcome = call(request)
        except Exception as exception:
            return self.failed(request, exception)
        if outcome is None:
            return request.success
        return self.finish(request, outcome) if isinstance(outcome, int) else outcome

    def run(self, request: Request) -> int:
        """Serve inline: call the method and return the result."""
        result = self.start(request)
        if isinstance(result, int):
            return result
        close = getattr(result, "close", None)
        if close is not None:
            close()
        return self.failed(request, TypeError(f"{request} was served inline, but the backend's method is async"))

    def finish(self, request: Request, outcome: Outcome) -> int:
        """The kernel's result for what a method returned."""
        if outcome is None or outcome == request.success:
            return request.success
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
