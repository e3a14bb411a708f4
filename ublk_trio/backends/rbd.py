"""`Rbd`: a disk in a Ceph cluster, an image of its RBD (RADOS block device), by Ceph's own librbd.

Some facts, and what they mean:

- *Requests* are librbd's asynchronous ones. It writes to an eventfd when some are over, which a task of this process waits for: no thread
  of Ceph's ever calls into Python for a request.
- *Buffers.* A request can't be called back, and its buffer is librbd's until it is over. So each has a buffer of its own, and is copied:
  a task that is cancelled goes at once, and its request ends by itself. What is read after that is dropped; what is written may still arrive,
  but never after `aclose` returned.
- *Bounds* are the cluster's: `ublk_trio.backends.ceph.REQUEST_SECONDS`, if configuration says nothing else. A request that the cluster
  does not answer in time fails with ETIMEDOUT; until then it waits, and goes on when the cluster is back.
- *Cache.* librbd has a write-back cache in this process, and the cluster is durable when it has answered: `flush` empties that cache;
  ``fua`` is a write with a flush after it.
- *Discard* frees only whole pieces, 64 KiB if configuration says nothing else: `discard_granularity`. The rest of a range stays as it was.
- *Zeroes.* With ``unmap`` objects are removed or cut; without, zeroes are written.
- *Size.* Whoever resizes the image, in this process or elsewhere: librbd tells, it is asked for the size, and `next_size` returns. A request
  beyond the size that the image has, be it a disk's or not, fails with EIO; one in the moment before we know may still be cut off by
  librbd.
- *Locks.* Images with the feature exclusive-lock have one writer at a time, but the lock changes hands whenever another one writes: nothing
  here keeps two machines from mounting one image.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

import attrs
import trio

from ublk_trio.backends import _librbd
from ublk_trio.backends.base import Backend, check_block_size, check_size, set_size
from ublk_trio.backends.ceph import CephCluster, make_in_thread, shutdown
from ublk_trio.errors import BackendError, UsageError, errno_text

logger = logging.getLogger("ublk_trio.backends")

#: Seconds that closing may take; after that it goes on in a thread that nobody waits for.
CLOSE_SECONDS: Final = 90.0
#: Seconds in which a thread begins.
_MOMENT_SECONDS: Final = 0.1
#: Requests that one call hands over.
_BATCH: Final = 64
_FALLBACK_GRANULARITY: Final = 64 << 10
#: Seconds between questions for a size that was not to be had.
_ASK_AGAIN_SECONDS: Final = 1.0


@attrs.define(eq=False)
class _Request:
    #: The library's until `done`.
    buffer: Any
    done: trio.Event = attrs.field(factory=trio.Event)
    #: Bytes, 0, or a negative errno.
    result: int = 0


@attrs.define(kw_only=True, eq=False)
class _Open:
    """An open image, as the library knows it, and what must live as long as it does."""

    ioctx: Any
    image: Any
    #: Readable when requests are over.
    eventfd: int
    #: How the library's thread tells of a change: the C function, and its registration.
    callback: Any = None
    watch: int | None = None
    #: When it was opened.
    size: int = 0
    #: Set when the library told of a change that nobody has looked at.
    changed: trio.Event = attrs.field(factory=trio.Event)
    #: Around the task that looks.
    following: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    #: Around the task that wakes up whose requests are over, and its end.
    reaping: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    reaped: trio.Event = attrs.field(factory=trio.Event)
    #: Those that are under way, by the address of their completion.
    requests: dict[int, _Request] = attrs.field(factory=dict)
    #: Held by a thread that makes a blocking call; nobody may close the image meanwhile.
    calling: threading.Lock = attrs.field(factory=threading.Lock)


class Rbd(Backend):
    """An image of a Ceph cluster.

    Args:
        pool: its pool.
        image: its name.
        namespace: of the pool; empty is the pool's own.
        cluster: a connection. One that is open is shared, and must stay open; one that is not is opened and closed with the image. None
            is what ``ceph.conf`` says, as user admin.
        read_only: nothing is written. Another size is noticed only where the user may write and the image has no journal: Ceph tells no
            other readers.
        block_size: logical block, bytes.

    `open` raises `BackendError`, one line with the mend: no such pool, image or namespace, a cluster that does not answer, a
    library that is missing, …
    """

    def __init__(
        self,
        pool: str,
        image: str,
        *,
        namespace: str = "",
        cluster: CephCluster | None = None,
        read_only: bool = False,
        block_size: int = 512,
    ) -> None:
        self.pool, self.image, self.namespace = pool, image, namespace
        self.cluster = CephCluster() if cluster is None else cluster
        self.read_only = read_only
        check_block_size(self, block_size)
        self.block_size = block_size
        self._open: _Open | None = None
        #: What the image has, which may be no disk's size; `size` is the last that is one.
        self._size_now = 0
        #: What `next_size` told last, and whether there may be something to tell again.
        self._size_told = 0
        self._resized = trio.Event()
        #: Around each question for the size, so that the youngest answer is the last.
        self._asking = trio.Lock()

    # Life

    async def open(self) -> None:
        """Connects if the cluster is not open, and opens the image, in a thread. Cancelled, it returns at once, and the thread closes
        what it opened.
        """
        if self._open is not None:
            raise UsageError(f"backend {self}: open already: use one backend object per device")
        handle = await self.cluster.attach()
        token = trio.lowlevel.current_trio_token()

        def make() -> _Open:
            with self.cluster.confined():
                return self._open_image(handle, token)

        # From here on the thread takes the image out of the cluster again, which must not go before it.
        opened = await make_in_thread(make, self._close)
        try:
            self._measure(opened.size)
        except BaseException:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(self._close, opened, limiter=trio.CapacityLimiter(1))
            raise
        self._open = opened
        self._size_now = self._size_told = opened.size
        trio.lowlevel.spawn_system_task(self._reap, opened, name=f"requests of {self}")
        trio.lowlevel.spawn_system_task(self._follow, opened, name=f"size of {self}")

    async def aclose(self) -> None:
        """Waits for requests that are under way, writes back what the cache holds, and closes the image, in a thread.

        Raises `BackendError` (ETIMEDOUT) after `CLOSE_SECONDS`: then the thread goes on alone, and requests that are still under way fail
        with ETIMEDOUT.
        """
        opened, self._open = self._open, None
        if opened is None:
            return
        opened.following.cancel()
        # Whoever waits for a size is woken up, and finds it closed.
        self._wake()
        end = trio.current_time() + CLOSE_SECONDS
        if not opened.requests:
            opened.reaping.cancel()
        with trio.move_on_at(end, shield=True):
            await opened.reaped.wait()
        if not opened.reaped.is_set():
            await self._give_up(opened)
        # A moment in any case: cancelled before it begins, the thread would not begin at all.
        with trio.move_on_at(max(end, trio.current_time() + _MOMENT_SECONDS), shield=True) as limit:
            await trio.to_thread.run_sync(self._close, opened, abandon_on_cancel=True, limiter=trio.CapacityLimiter(1))
        if limit.cancelled_caught:
            raise self._error(errno.ETIMEDOUT, f"not closed after {CLOSE_SECONDS:g} s: the cluster does not answer")

    async def _give_up(self, opened: _Open) -> None:
        """Whoever still waits for a request is told that it failed; its buffer stays, since the library goes on with it."""
        opened.reaping.cancel()
        with trio.CancelScope(shield=True):
            await opened.reaped.wait()
        for request in opened.requests.values():
            request.result = -errno.ETIMEDOUT
            request.done.set()

    async def rescan(self) -> int:
        """Asks the image for its size anew, in a thread, and returns it: bytes.

        Raises `UsageError` when it is not open or no disk has that size, and `OSError` when it can't be asked; the size stays what it was.
        """
        await self._look(self._opened())
        return self.size

    async def resize(self, size: int) -> None:
        """Makes the image larger, bytes, in a thread.

        Raises `UsageError`, and changes nothing, when no disk has that size, or the image is larger, whoever made it so: making it smaller
        destroys what is there. `OSError` when it is open for reading alone (EROFS), or the cluster refuses. Cancelled: it waits for the
        thread.
        """
        opened = self._opened()
        check_size(self, size)
        if self.read_only:
            raise self._error(
                errno.EROFS, "it can't be resized: it is open for reading alone, open it without read_only"
            )
        await self._look(opened, lambda image: self._grow(image, size))

    async def _look(
        self, opened: _Open, ask: Callable[[Any], int] | None = None, *, abandon_on_cancel: bool = False
    ) -> None:
        """Takes over the size that the image has now, which `ask` returns."""
        async with self._asking:
            size = await self._call(opened, ask or self._ask_size, abandon_on_cancel=abandon_on_cancel)
            # Nobody comes between. First what `_within` looks at: it stands even if no disk has that size.
            self._size_now = size
            set_size(self, size)
            self._wake()

    async def _call(self, opened: _Open, function: Callable[[Any], int], *, abandon_on_cancel: bool = False) -> int:
        """A blocking call, in a thread. Raises `UsageError` when the image was closed before its turn came."""

        def call() -> int:
            with opened.calling:
                if self._open is not opened:
                    raise UsageError(f"backend {self}: not open")
                return function(opened.image)

        return await trio.to_thread.run_sync(call, abandon_on_cancel=abandon_on_cancel, limiter=trio.CapacityLimiter(1))

    async def next_size(self) -> int:
        """Returns when the image was resized since the last call returned, or since `open`, by `resize` or elsewhere: `size` is the new
        one then, bytes.

        Raises `trio.ClosedResourceError` when it is closed. A size that no disk has is logged, and passed over.
        """
        before = self._size_told
        while self._open is not None and self.size == before:
            await self._resized.wait()
        if self._open is None:
            raise trio.ClosedResourceError(f"backend {self} is closed")
        self._size_told = self.size
        return self.size

    async def _follow(self, opened: _Open) -> None:
        """Asks for the size whenever the library tells of a change; a task of the whole run, from `open` to `aclose`."""
        with opened.following:
            while True:
                await opened.changed.wait()
                opened.changed = trio.Event()
                try:
                    # Who closes waits for the thread, if anybody has to.
                    await self._look(opened, abandon_on_cancel=True)
                except UsageError as error:
                    logger.warning("backend %s: its new size is no disk's: %s", self, error)
                except OSError as error:
                    logger.warning("backend %s: its new size can't be had, and is asked for again: %s", self, error)
                    opened.changed.set()
                    await trio.sleep(_ASK_AGAIN_SECONDS)

    def _wake(self) -> None:
        self._resized.set()
        self._resized = trio.Event()

    # Requests

    async def read(self, offset: int, buffer: memoryview) -> None:
        """Reads all of it. What was never written is zeroes."""
        opened, length = self._within(offset, len(buffer)), len(buffer)
        library = _librbd.load()
        # librbd fills all that it reports.
        content = library.allocate("char[]", length)
        done = await self._finish(
            opened, "read", content, lambda c: library.rbd.rbd_aio_read(opened.image, offset, length, content, c)
        )
        if done != length:
            raise OSError(errno.EIO, f"{self}: the image has become shorter than the disk")
        buffer[:] = library.ffi.buffer(content, length)

    async def write(self, offset: int, data: memoryview, *, fua: bool) -> None:
        """Writes all of it; with `fua`, flushes then."""
        opened, length = self._writable(offset, len(data), "write"), len(data)
        library = _librbd.load()
        content = library.ffi.from_buffer(bytes(data))
        await self._finish(
            opened, "write", content, lambda c: library.rbd.rbd_aio_write(opened.image, offset, length, content, c)
        )
        if fua:
            await self.flush()

    async def flush(self) -> None:
        """Every finished write is in the cluster."""
        opened = self._opened()
        await self._finish(opened, "flush", None, lambda c: _librbd.load().rbd.rbd_aio_flush(opened.image, c))

    async def discard(self, offset: int, length: int) -> None:
        """Frees the whole pieces of the range, which then read as zeroes."""
        opened = self._writable(offset, length, "discard")
        rbd = _librbd.load().rbd
        await self._finish(opened, "discard", None, lambda c: rbd.rbd_aio_discard(opened.image, offset, length, c))

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        """Zeroes the range; without `unmap` by writing."""
        opened = self._writable(offset, length, "write_zeroes")
        rbd = _librbd.load().rbd
        flags = 0 if unmap else _librbd.WRITE_ZEROES_THICK
        await self._finish(
            opened, "write_zeroes", None, lambda c: rbd.rbd_aio_write_zeroes(opened.image, offset, length, c, flags, 0)
        )

    async def _finish(self, opened: _Open, operation: str, buffer: Any, submit: Callable[[Any], int]) -> int:
        """Submits a request and waits for its result. Cancelled: the request goes on without us, and `_Open.requests` holds its buffer."""
        library = _librbd.load()
        made = library.ffi.new("rbd_completion_t *")
        self._check(library.rbd.rbd_aio_create_completion(library.ffi.NULL, library.ffi.NULL, made), operation)
        completion = made[0]
        key = _address(completion)
        # Before it is submitted; it is reaped in this thread, so not before we wait.
        opened.requests[key] = request = _Request(buffer)
        refused = submit(completion)
        if refused < 0:
            del opened.requests[key]
            library.rbd.rbd_aio_release(completion)
            self._check(refused, operation)
        await request.done.wait()
        self._check(request.result, operation)
        return request.result

    async def _reap(self, opened: _Open) -> None:
        """Wakes up those whose requests are over; a task of the whole run, from `open` until the last is over that `aclose` finds."""
        with opened.reaping:
            while self._open is opened or opened.requests:
                await trio.lowlevel.wait_readable(opened.eventfd)
                for request in self._take_over(opened):
                    request.done.set()
        opened.reaped.set()

    def _take_over(self, opened: _Open) -> list[_Request]:
        """The requests that are over; the library is done with their buffers."""
        library = _librbd.load()
        completions = library.ffi.new("rbd_completion_t[]", _BATCH)
        over = []
        # The counter first: what ends later makes it readable again.
        with suppress(BlockingIOError):
            os.eventfd_read(opened.eventfd)
        while (count := library.rbd.rbd_poll_io_events(opened.image, completions, _BATCH)) > 0:
            for completion in completions[0:count]:
                request = opened.requests.pop(_address(completion))
                request.result = library.rbd.rbd_aio_get_return_value(completion)
                request.buffer = None
                library.rbd.rbd_aio_release(completion)
                over.append(request)
        return over

    def _within(self, offset: int, length: int) -> _Open:
        # librbd cuts off what lies beyond the end, and calls it done.
        if offset + length > min(self.size, self._size_now):
            raise OSError(errno.EIO, f"{self}: the image has become shorter than the disk")
        return self._opened()

    def _writable(self, offset: int, length: int, operation: str) -> _Open:
        if self.read_only:
            self._check(-errno.EROFS, operation)
        return self._within(offset, length)

    def _opened(self) -> _Open:
        if self._open is None:
            raise UsageError(f"backend {self}: not open")
        return self._open

    def _check(self, result: int, operation: str) -> None:
        if result < 0:
            raise OSError(-result, f"{self}: {operation}: {errno_text(-result)}")

    # In a thread

    def _open_image(self, handle: Any, token: trio.lowlevel.TrioToken) -> _Open:
        library = _librbd.load()
        ffi, rados, rbd = library.ffi, library.rados, library.rbd
        ioctx, eventfd = ffi.NULL, -1
        try:
            made = ffi.new("rados_ioctx_t *")
            self._refuse(rados.rados_ioctx_create(handle, _librbd.encode(self.pool), made), f"pool {self.pool!r}")
            ioctx = made[0]
            rados.rados_ioctx_set_namespace(ioctx, _librbd.encode(self.namespace))
            image = self._open_for_reading(ioctx) if self.read_only else self._open_by(rbd.rbd_open, ioctx)
            try:
                eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
                result = rbd.rbd_set_image_notification(image, eventfd, _librbd.EVENT_TYPE_EVENTFD)
                self._refuse(result, "the image's events")
                opened = _Open(ioctx=ioctx, image=image, eventfd=eventfd)
                opened.callback = ffi.callback("void(void *)", lambda _: _tell(token, opened))
                watched = ffi.new("uint64_t *")
                # An image that can't be watched is served all the same: its size is what it was, or what `rescan` finds.
                result = rbd.rbd_update_watch(image, watched, opened.callback, ffi.NULL)
                if result == 0:
                    opened.watch = int(watched[0])
                # Then: of a change before it nobody tells.
                try:
                    opened.size = self._ask_size(image)
                except BaseException:
                    self._unwatch(opened)
                    raise
            except BaseException:
                rbd.rbd_close(image)
                raise
        except BaseException:
            if eventfd >= 0:
                os.close(eventfd)
            if ioctx != ffi.NULL:
                rados.rados_ioctx_destroy(ioctx)
            self._leave()
            raise
        return opened

    def _open_by(self, opening: Callable[..., int], ioctx: Any) -> Any:
        ffi = _librbd.load().ffi
        made = ffi.new("rbd_image_t *")
        self._refuse(opening(ioctx, _librbd.encode(self.image), made, ffi.NULL), "the image")
        return made[0]

    def _open_for_reading(self, ioctx: Any) -> Any:
        """Opened to be written where that may be, though `_writable` lets nothing through: librbd watches no other image."""
        library = _librbd.load()
        try:
            image = self._open_by(library.rbd.rbd_open, ioctx)
        except BackendError as error:
            if error.errno not in (errno.EPERM, errno.EACCES, errno.EROFS):
                raise
        else:
            features = library.ffi.new("uint64_t *")
            if library.rbd.rbd_get_features(image, features) == 0 and not features[0] & _librbd.FEATURE_JOURNALING:
                return image
            # Of one with a journal a reader takes the writer's lock.
            library.rbd.rbd_close(image)
        return self._open_by(library.rbd.rbd_open_read_only, ioctx)

    def _close(self, opened: _Open) -> None:
        # What nobody waits for any more is still the library's, with its buffer.
        ready = select.poll()
        ready.register(opened.eventfd, select.POLLIN)
        while opened.requests:
            ready.poll()
            self._take_over(opened)
        try:
            with opened.calling:
                self._close_image(opened)
        finally:
            self._leave()

    def _leave(self) -> None:
        last = self.cluster.detach()
        if last is not None:
            shutdown(last)

    def _close_image(self, opened: _Open) -> None:
        library = _librbd.load()
        self._unwatch(opened)
        result = library.rbd.rbd_close(opened.image)
        library.rados.rados_ioctx_destroy(opened.ioctx)
        os.close(opened.eventfd)
        self._refuse(result, "what was not flushed may be lost")

    def _unwatch(self, opened: _Open) -> None:
        if opened.watch is not None:
            # Waits for a call that is under way.
            _librbd.load().rbd.rbd_update_unwatch(opened.image, opened.watch)

    def _grow(self, image: Any, size: int) -> int:
        library = _librbd.load()
        # The image's own size: somebody else may have changed it, and nobody have told us yet.
        if size < (current := self._ask_size(image)):
            raise self._would_lose_data(size, f"its {current}")
        try:
            resize2 = library.rbd.rbd_resize2
        except AttributeError:
            result = library.rbd.rbd_resize(image, size)
        else:
            # The library has no test for a null function, and calls it when another process has the lock and does the work.
            progress = library.ffi.callback("int(uint64_t, uint64_t, void *)", lambda done, total, _: 0)
            result = resize2(image, size, False, progress, library.ffi.NULL)
        if result == -errno.EINVAL:
            # It grew after we asked.
            raise self._would_lose_data(size, "what it has by now")
        if result < 0:
            raise self._error(-result, "it can't be resized: check the cluster's health and the pool's quota")
        return size

    def _would_lose_data(self, size: int, current: str) -> UsageError:
        mend = f"rbd resize --allow-shrink {self._spec()} does it"
        return UsageError(f"backend {self}: {size} bytes are less than {current}, which would lose data: {mend}")

    def _ask_size(self, image: Any) -> int:
        library = _librbd.load()
        size = library.ffi.new("uint64_t *")
        self._check(library.rbd.rbd_get_size(image, size), "size")
        return int(size[0])

    # What is told

    def _measure(self, size: int) -> None:
        if size == 0 or size % self.block_size:
            mend = f"make it so with rbd resize --size 1G {self._spec()}" if size == 0 else "use a smaller block_size"
            raise self._error(errno.EINVAL, f"size {size} is not a multiple of block_size {self.block_size}: {mend}")
        self.size = size
        granularity = int(self.cluster.option("rbd_discard_granularity_bytes") or _FALLBACK_GRANULARITY)
        whole = granularity and granularity % self.block_size == 0
        self.discard_granularity = granularity if whole else self.block_size

    def _refuse(self, result: int, what: str) -> None:
        if result < 0:
            raise self._error(-result, f"{what}: {self._mend(-result)}")

    def _mend(self, number: int) -> str:
        if number == errno.ENOENT:
            return "there is none of that name: check it, or make one with ceph osd pool create or rbd create"
        if number == errno.ETIMEDOUT:
            return "the cluster did not answer in time: check its health with ceph -s"
        if number in (errno.EACCES, errno.EPERM):
            return f"user {self.cluster.user or 'admin'} is not permitted: check the user's capabilities with ceph auth get"
        if number == errno.EROFS:
            return "it can't be written: open it with read_only=on"
        return "check the cluster's health with ceph -s, and the image with rbd info"

    def _error(self, number: int, text: str) -> BackendError:
        return BackendError(number, f"{self}: {errno_text(number)}: {text}")

    def _spec(self) -> str:
        return "/".join(part for part in (self.pool, self.namespace, self.image) if part)

    def __str__(self) -> str:
        return f"rbd:{self._spec()}" + (",read_only=on" if self.read_only else "")


def _address(completion: Any) -> int:
    return int(_librbd.load().ffi.cast("uintptr_t", completion))


def _tell(token: trio.lowlevel.TrioToken, opened: _Open) -> None:
    """What a thread of the library calls when the image has changed in any way."""
    # The event of that moment: the task that looks makes a new one each time.
    with suppress(trio.RunFinishedError):
        token.run_sync_soon(lambda: opened.changed.set())
