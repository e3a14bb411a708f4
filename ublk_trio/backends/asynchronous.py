"""`as_async`: a backend of plain ``def`` methods, in the shape of the asynchronous engine."""

from __future__ import annotations

import types
from typing import Any, cast

from ublk_trio.backends.base import Backend, CanDiscard, CanFlush, CanWrite, CanWriteZeroes, capabilities, is_async
from ublk_trio.backends.file import File, ThreadedFile
from ublk_trio.errors import UsageError

_GEOMETRY = (
    "size",
    "block_size",
    "physical_block_size",
    "optimal_io_size",
    "discard_granularity",
    "rotational",
    "read_only",
    "unsupported",
)


def as_async(backend: Backend) -> Backend:
    """The same disk with ``async def`` methods, for exactly what `backend` can do.

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
    if type(backend) is File:
        if backend.fileno() >= 0:
            raise UsageError(f"backend {backend}: open already: convert it before it is opened")
        return ThreadedFile(
            backend.path, direct=backend.direct, read_only=backend.read_only, block_size=backend._block_size_wanted
        )
    # What the class defines, and not what capabilities() says by now: `open` may still change `read_only` and
    # `unsupported`.
    mixins = [mixin for name, mixin in _MIXINS.items() if callable(getattr(backend, name, None))]
    made = types.new_class(f"Async{type(backend).__name__}", (*mixins, _Wrapper))
    wrapper = cast("_Wrapper", made(backend))
    assert capabilities(wrapper) == capabilities(backend), "a wrapper can do exactly what its backend can"
    return wrapper


class _Wrapper(Backend):
    def __init__(self, inner: Backend) -> None:
        self.inner = inner
        self._copy_geometry()

    def _copy_geometry(self) -> None:
        for name in _GEOMETRY:
            if hasattr(self.inner, name):
                setattr(self, name, getattr(self.inner, name))

    async def open(self) -> None:
        await self.inner.open()
        self._copy_geometry()

    async def aclose(self) -> None:
        await self.inner.aclose()

    async def read(self, offset: int, buffer: memoryview) -> int | None:
        result = self.inner.read(offset, buffer)
        return result if result is None or isinstance(result, int) else await result

    def __str__(self) -> str:
        return str(self.inner)


class _Write(_Wrapper):
    async def write(self, offset: int, data: memoryview, *, fua: bool) -> int | None:
        result = cast("CanWrite", self.inner).write(offset, data, fua=fua)
        return result if result is None or isinstance(result, int) else await result


class _Flush(_Wrapper):
    async def flush(self) -> None:
        result = cast("CanFlush", self.inner).flush()
        if result is not None:
            await result


class _Discard(_Wrapper):
    async def discard(self, offset: int, length: int) -> None:
        result = cast("CanDiscard", self.inner).discard(offset, length)
        if result is not None:
            await result


class _WriteZeroes(_Wrapper):
    async def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        result = cast("CanWriteZeroes", self.inner).write_zeroes(offset, length, unmap=unmap)
        if result is not None:
            await result


_MIXINS: dict[str, type[Any]] = {"write": _Write, "flush": _Flush, "discard": _Discard, "write_zeroes": _WriteZeroes}
