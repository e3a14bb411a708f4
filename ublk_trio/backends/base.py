"""What a disk is made of: `Backend`, and what the engine asks about one.

A backend is a small class with a `read` and as many of the optional methods as it can keep its word on:

| method | called for | the kernel sends it when |
|---|---|---|
| ``read(offset, buffer)`` | READ | always; required |
| ``write(offset, data, *, fua)`` | WRITE | the class defines it; without it the disk is read-only |
| ``flush()`` | FLUSH | the class defines it: the disk then has a volatile cache |
| ``discard(offset, length)`` | DISCARD | the class defines it |
| ``write_zeroes(offset, length, *, unmap)`` | WRITE_ZEROES | the class defines it |

`Backend` itself therefore defines none of the optional ones: **what a class defines is what the device advertises**
(`capabilities`). `CanWrite`, `CanFlush`, `CanDiscard` and `CanWriteZeroes` give their types to a type checker.

Some facts, and what they mean for a backend:

- *Units.* Offsets and lengths are bytes, multiples of `block_size`, and within `size`: the kernel's block layer saw to
  it.
- *Buffers.* `buffer` and `data` are contiguous memoryviews of bytes (format ``B``), page aligned on the real kernel,
  valid **only during the call**: the kernel reuses the memory for the next request. Keep a copy, never the view. `data`
  may be read-only.
- *Results.* None means "all of it"; an int is the number of bytes done. The kernel asks again for the rest of a short
  read; a short write fails with EIO, because the kernel can't be told of one. An `OSError` fails the request with its
  errno (one without an errno, and any other exception, with EIO) and nothing else.
- *Out of resources.* ``OSError`` with ENOMEM, or the result ``-errno.ENOMEM``, fails nothing: the request waits, and the method is
  called again with the same arguments, a little later or when another request was answered.
- *Threads.* Every method runs in Trio's thread. A plain ``def`` is called in the middle of the loop that serves the
  queue: it must not wait for anything slow. An ``async def`` may wait; a backend with any of those is served by the
  asynchronous engine. A plain ``def`` may return an awaitable when the class says ``awaits = True``: then what it
  answers at once costs no coroutine.
- *Concurrency.* Requests of a queue and of different queues may be in progress at the same time and finish in any order
  as soon as a method awaits. The kernel never relies on an order between requests that it has not yet been given an
  answer for.
- *Cancellation.* When the device is torn down by force, an ``async def`` method may be cancelled at any of its
  checkpoints. It must let `trio.Cancelled` out, and must not leave behind anything that still uses the buffer (hence no
  abandoned threads).
- *Durability.* A class with `flush` says "a finished write may still be in a volatile cache". Its `flush` returns when
  every write that was answered before the call is on stable storage; its `write` with `fua` true returns when those
  very bytes are. A class without `flush` says that a finished write is as safe as it will ever be; it is never called
  with `fua` true.
- *Discard* is advice, its content afterwards is the backend's to choose; `write_zeroes` is an order: the range reads as
  zeroes. With `unmap` false the space should stay reserved, with `unmap` true it should be freed.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from inspect import iscoroutinefunction
from typing import Any, Final, Protocol, TypeAlias

from ublk_trio.backends.sizes import format_size
from ublk_trio.errors import UsageError

#: What `read` and `write` return: bytes done, or None for all of them; or an awaitable of that.
Result: TypeAlias = int | Awaitable[int | None] | None
#: What `flush`, `discard` and `write_zeroes` return.
Done: TypeAlias = Awaitable[None] | None

#: The smallest logical block, bytes: the kernel's sector.
BLOCK_SIZE_MIN: Final = 512
#: The largest, bytes. The kernel's limit is its page size; 4096 is the smallest of those, so such a disk works
#: everywhere.
BLOCK_SIZE_MAX: Final = 4096
#: The largest disk, bytes (excluded): the kernel's signed file offset.
SIZE_LIMIT: Final = 1 << 63

_OPTIONAL: Final = ("write", "flush", "discard", "write_zeroes")
_ZEROES: Final = memoryview(bytes(1 << 20))


class _Derived:
    """An int that follows from other attributes until a class or an instance sets its own.

    Not a property: a property could not be overridden by a plain ``self.discard_granularity = 65536``.
    """

    def __init__(self, derive: Callable[[Any], int]) -> None:
        self._derive = derive

    def __get__(self, instance: object | None, owner: type) -> int:
        if instance is None:
            raise AttributeError("known for an instance only")
        return self._derive(instance)


class Backend(ABC):
    """A disk. Subclasses define `read`, set `size`, and override what else they need; see the module for the contract.

    The attributes are read after `open` returned, once; changing them later has no effect on a live device. But the size: it may
    change, and `Device.update_size` then tells the kernel.
    """

    #: Bytes; a multiple of `block_size`. Known at the latest when `open` returned.
    size: int
    #: Logical block, bytes: a power of two, 512 to 4096. The smallest unit of a request.
    block_size: int = 512
    #: Physical block, bytes: the smallest unit that is written without a read first. Default: `block_size`, at least
    #: 4096.
    physical_block_size = _Derived(lambda backend: max(backend.block_size, 4096))
    #: The best length of a request, bytes, a power of two; 0 gives the kernel no hint.
    optimal_io_size: int = 0
    #: Bytes: a discard of less frees nothing. Default: `block_size`.
    discard_granularity = _Derived(lambda backend: backend.block_size)
    #: True has the kernel's schedulers spare the seeks.
    rotational: bool = False
    #: True refuses writes, whatever the class defines. A class without `write` is read-only anyhow.
    read_only: bool = False
    #: Names of methods that the class defines but that this very disk can't do; settled when `open` returned.
    unsupported: frozenset[str] = frozenset()
    #: True lets plain ``def`` methods return awaitables; the asynchronous engine serves such a backend.
    awaits: bool = False

    async def open(self) -> None:  # noqa: B027 - optional: most backends have nothing to open
        """Gets ready: called by the device's scope before the kernel hears of the device.

        Raises `BackendError` or `OSError`; then `aclose` is not called, so it must not leave anything open. May be
        cancelled: the same holds.
        """

    async def aclose(self) -> None:  # noqa: B027 - optional, as above
        """Releases what `open` took. Called once, shielded from cancellation, after the kernel's device is gone, if
        `open` returned.
        """

    @abstractmethod
    def read(self, offset: int, buffer: memoryview) -> Result:
        """Fills `buffer` with the bytes at `offset`. May be ``async def``. Must not leave stale bytes in what it
        reports as done.
        """

    def __str__(self) -> str:
        """Like a SPEC of the command line: ``memory:1G``."""
        size = getattr(self, "size", None)
        kind = type(self).__name__.lower()
        return f"{kind}:{format_size(size)}" if isinstance(size, int) else kind

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self}>"


class CanWrite(Protocol):
    """A disk that can be written."""

    def write(self, offset: int, data: memoryview, *, fua: bool) -> Result:
        """Stores `data` at `offset`; with `fua`, on stable storage before it returns."""
        ...


class CanFlush(Protocol):
    """A disk with a volatile cache."""

    def flush(self) -> Done:
        """Brings every write answered so far to stable storage."""
        ...


class CanDiscard(Protocol):
    """A disk that can free what nobody needs any more."""

    def discard(self, offset: int, length: int) -> Done:
        """The content of the range is no longer needed."""
        ...


class CanWriteZeroes(Protocol):
    """A disk that can zero a range without being sent zeroes."""

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> Done:
        """Makes the range read as zeroes; with `unmap` its space may be freed."""
        ...


def capabilities(backend: Backend) -> frozenset[str]:
    """The methods that the engine may call: ``read``, and which of ``write``, ``flush``, ``discard``, ``write_zeroes``.

    Ask after `Backend.open` returned. A read-only disk (`read_only`, or nothing to write with) has ``read`` alone:
    there is nothing to flush, and discarding and zeroing are ways of writing.
    """
    names = {name for name in _OPTIONAL if callable(getattr(backend, name, None))} - backend.unsupported
    if backend.read_only or "write" not in names:
        names.clear()
    return frozenset({"read"} | names)


def is_async(backend: Backend) -> bool:
    """True when any of the `capabilities` is an ``async def`` or may be: such a backend needs the asynchronous engine."""
    return backend.awaits or any(iscoroutinefunction(getattr(backend, name)) for name in capabilities(backend))


def check_block_size(backend: Backend, block_size: int) -> None:
    """Raises `UsageError`, one line with the mend, when the kernel would not take a disk with such logical blocks."""
    if block_size not in (512, 1024, 2048, 4096):
        raise UsageError(f"backend {backend}: block_size {block_size} is not possible: use 512, 1024, 2048 or 4096")


def check_geometry(backend: Backend) -> None:
    """Raises `UsageError`, one line with the mend, when the kernel would not take a disk of these sizes. Ask after
    `Backend.open`.
    """
    name = f"backend {backend}"
    block = _integer(backend, name, "block_size")
    check_block_size(backend, block)
    size = _integer(backend, name, "size")
    if size <= 0:
        raise UsageError(f"{name}: size {size} is not possible: a disk has at least one block of {block} bytes")
    if size >= SIZE_LIMIT:
        raise UsageError(f"{name}: size {size} is not possible: a disk is smaller than 2**63 bytes")
    if size % block:
        below, above = size - size % block, size - size % block + block
        mend = f"{below} or {above}" if below else f"{above}"
        raise UsageError(f"{name}: size {size} is not a multiple of block_size {block}: use {mend}")
    physical = _integer(backend, name, "physical_block_size")
    if not _is_power_of_two(physical) or physical < block:
        raise UsageError(
            f"{name}: physical_block_size {physical} is not possible: use a power of two from block_size {block} up"
        )
    optimal = _integer(backend, name, "optimal_io_size")
    if optimal and (not _is_power_of_two(optimal) or optimal < block):
        raise UsageError(
            f"{name}: optimal_io_size {optimal} is not possible: use 0 or a power of two from block_size {block} up"
        )
    granularity = _integer(backend, name, "discard_granularity")
    if granularity <= 0 or granularity % block:
        raise UsageError(
            f"{name}: discard_granularity {granularity} is not possible: use a multiple of block_size {block}"
        )


def check_size(backend: Backend, size: int) -> None:
    """Raises `UsageError` when `check_geometry` would if the backend had that size, bytes."""
    # Of a copy: requests that run in threads read the size at any time.
    changed = copy.copy(backend)
    changed.size = size
    check_geometry(changed)


def set_size(backend: Backend, size: int) -> None:
    """Gives a backend another size, bytes. Raises `UsageError`, and changes nothing, when `check_size` does."""
    check_size(backend, size)
    backend.size = size


def fill_zeroes(buffer: memoryview) -> None:
    """Zeroes all of `buffer`, from a block of zeroes made once: a copy, no allocation up to 1 MiB."""
    length = len(buffer)
    if length <= len(_ZEROES):
        buffer[:] = _ZEROES[:length]
        return
    for start in range(0, length, len(_ZEROES)):
        part = buffer[start : start + len(_ZEROES)]
        part[:] = _ZEROES[: len(part)]


def _integer(backend: Backend, name: str, attribute: str) -> int:
    value = getattr(backend, attribute, None)
    if type(value) is not int:
        mend = f"set it in __init__ or open(), in bytes, e.g. self.{attribute} = 4096"
        raise UsageError(f"{name}: {attribute} is {value!r}, not an int: {mend}")
    return value


def _is_power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0
