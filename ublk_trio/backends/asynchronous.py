"""`as_async`: a backend of plain ``def`` methods, in the shape of the asynchronous engine."""

from __future__ import annotations

from ublk_trio.backends.base import Backend, is_async
from ublk_trio.backends.file import File, as_threaded
from ublk_trio.backends.passthru import Passthru


def as_async(backend: Backend) -> Backend:
    """The same disk with ``async def`` methods, for what `backend` can do once it is open.

    - A backend that has ``async def`` methods already is given back as it is.
    - A `File` that is not open yet becomes a `ThreadedFile` of the same path and options: awaiting it really lets
      others run.
    - Any other (memory, null, your own) is wrapped: its methods are called in place, in Trio's thread, and an awaitable
      that one returns is awaited. The wrapper adds no checkpoint, because nothing in it waits: it neither yields nor
      can be cancelled.

    Opening and closing the result opens and closes `backend`; use one of them only. Raises `UsageError` for a `File`
    that is open.
    """
    if is_async(backend):
        return backend
    return as_threaded(backend) if type(backend) is File else _InPlace(backend)


class _InPlace(Passthru):
    def __str__(self) -> str:
        return str(self.base.backend)
