"""`CephCluster`: a connection to a Ceph cluster, which any number of `Rbd` images share.

Some facts about librados, and what they mean:

- *It waits for ever* where nobody says otherwise: five minutes for monitors, without end for a request to a storage daemon that is gone.
  So bounds are set where configuration leaves the library's own values: `CONNECT_SECONDS`, `REQUEST_SECONDS`. An option of the same
  name in ``config`` is taken as it is: ``{"rados_osd_op_timeout": "0"}`` waits as the kernel's RBD does.
- *It cannot be interrupted.* Connecting blocks a thread. When its task is cancelled the thread is left alone, and closes by itself what
  it opened, within those bounds.
- *Its threads* (about a dozen for a connection) inherit the CPUs of the thread that creates it.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, TypeVar

import trio

from ublk_trio.backends import _librbd
from ublk_trio.errors import BackendError, UsageError, errno_text

if TYPE_CHECKING:
    from outcome import Outcome

logger = logging.getLogger("ublk_trio.backends")

_Made = TypeVar("_Made")

#: Seconds in which a monitor must answer.
CONNECT_SECONDS: Final = 15
#: Seconds in which a monitor or a storage daemon must answer a request; then it fails with ETIMEDOUT.
REQUEST_SECONDS: Final = 60
_BOUNDS: Final[Mapping[str, int]] = MappingProxyType(
    {
        "client_mount_timeout": CONNECT_SECONDS,
        "rados_mon_op_timeout": REQUEST_SECONDS,
        "rados_osd_op_timeout": REQUEST_SECONDS,
    }
)
#: The library's own complaints on stderr: what is wrong is said in one line of ours.
_QUIET: Final = ("log_to_stderr", "err_to_stderr")
_VALUE_BYTES_MAX: Final = 4096


class CephCluster:
    """A connection to a cluster; open between `open` and `aclose`.

    Args:
        user: who to be, without ``client.``; None is admin.
        config_file: Ceph's configuration; None looks where Ceph's programs do (``/etc/ceph/ceph.conf`` and so on), and finding none is
            no error. ``/dev/null`` reads none.
        config: options of Ceph's by name, which win over the file: ``{"mon_host": "192.0.2.1"}``.
        keyring: the file with the user's key.
        cpus: where the library's threads run; None leaves them the process's.
    """

    def __init__(
        self,
        *,
        user: str | None = None,
        config_file: str | os.PathLike[str] | None = None,
        config: Mapping[str, str] = MappingProxyType({}),
        keyring: str | os.PathLike[str] | None = None,
        cpus: Collection[int] | None = None,
    ) -> None:
        self.user = user
        self.config_file = None if config_file is None else os.fspath(config_file)
        self.config = MappingProxyType(dict(config))
        self.keyring = None if keyring is None else os.fspath(keyring)
        self.cpus = cpus
        #: librados' handle while open.
        self._handle: Any = None
        self._opening = False
        # An image that is closed by a thread takes itself out there.
        self._lock = threading.Lock()
        self._images = 0
        self._goes_with_images = False

    @property
    def is_open(self) -> bool:
        """Whether images can be opened on it."""
        return self._handle is not None

    @property
    def images(self) -> int:
        """How many images are open on it."""
        return self._images

    async def open(self) -> None:
        """Connects, in a thread.

        Raises `BackendError`, one line with the mend: a library or file is missing, an option is unknown, no monitor answers in
        time, the user is refused. Cancelled, and when it raises, nothing stays open.
        """
        if self.is_open or self._opening:
            raise UsageError(f"{self} is open already: open it once, and share it when it is")
        self._opening = True
        try:
            self._handle = await make_in_thread(self._connect, shutdown)
        finally:
            self._opening = False

    async def aclose(self) -> None:
        """Disconnects, in a thread, also when it is cancelled. Raises `UsageError`, and stays open, while images are open on it."""
        if self._images:
            raise UsageError(f"{self} has {self._images} images open: close those first")
        handle, self._handle = self._handle, None
        if handle is not None:
            # Cancelled before it begins, the thread would not begin at all, and the connection stay.
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(shutdown, handle, limiter=trio.CapacityLimiter(1))

    async def attach(self) -> Any:
        """Enters an image, and returns librados' handle. A cluster that is not open is opened, and goes with its last image."""
        if not self.is_open:
            await self.open()
            self._goes_with_images = True
        with self._lock:
            self._images += 1
        return self._handle

    def detach(self) -> Any:
        """Takes an image out. Returns the handle when that was the last one and the cluster goes with it: `shutdown` it, in a thread."""
        with self._lock:
            self._images -= 1
            if self._images or not self._goes_with_images:
                return None
            handle, self._handle = self._handle, None
            self._goes_with_images = False
            return handle

    def option(self, name: str) -> str | None:
        """What an option of Ceph's is now; None when this version has none of that name."""
        return _get_option(self._handle, name)

    @contextmanager
    def confined(self) -> Iterator[None]:
        """What is called in here, in a thread, makes the library's threads where `cpus` says."""
        if self.cpus is None:
            yield
            return
        # Of this thread alone.
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, self.cpus)
        try:
            yield
        finally:
            os.sched_setaffinity(0, before)

    def _connect(self) -> Any:
        library = _librbd.load()
        with self.confined():
            made = library.ffi.new("rados_t *")
            user = library.ffi.NULL if self.user is None else _librbd.encode(self.user)
            self._check(library.rados.rados_create(made, user), "no connection could be made: check user")
            handle = made[0]
            try:
                self._configure(library, handle)
                result = library.rados.rados_connect(handle)
                if result < 0:
                    self._check(result, self._mend_of_connecting(-result, handle))
            except BaseException:
                shutdown(handle)
                raise
            return handle

    def _configure(self, library: _librbd.Library, handle: Any) -> None:
        usual = {name: _get_option(handle, name) for name in (*_BOUNDS, *_QUIET)}
        path = library.ffi.NULL if self.config_file is None else _librbd.encode(self.config_file)
        result = library.rados.rados_conf_read_file(handle, path)
        if result < 0 and self.config_file is not None:
            self._check(result, f"config_file {self.config_file} can't be read: check path, permissions and content")
        ours = {name: str(seconds) for name, seconds in _BOUNDS.items()} | dict.fromkeys(_QUIET, "false")
        for name, value in ours.items():
            if _get_option(handle, name) == usual[name]:
                library.rados.rados_conf_set(handle, name.encode(), value.encode())
        given = dict(self.config) if self.keyring is None else {**self.config, "keyring": self.keyring}
        for name, value in given.items():
            result = library.rados.rados_conf_set(handle, _librbd.encode(name), _librbd.encode(value))
            if result < 0:
                self._check(result, f"config: Ceph does not take {name} = {value!r}: check name and value")

    def _check(self, result: int, text: str) -> None:
        if result < 0:
            raise BackendError(-result, f"{self}: {errno_text(-result)}: {text}")

    def _mend_of_connecting(self, number: int, handle: Any) -> str:
        if number == errno.ETIMEDOUT:
            hosts, seconds = (_get_option(handle, name) for name in ("mon_host", "client_mount_timeout"))
            return f"no monitor answered within {seconds} s: check that they run, the network, and mon_host ({hosts})"
        if number in (errno.EACCES, errno.EPERM, errno.ENOTSUP):
            return f"the cluster refuses user {self.user or 'admin'}: check user and keyring"
        if number == errno.ENOENT:
            return "no monitor is named, or there is no key for the user: check mon_host and keyring in config or config_file"
        return "it could not be connected to: check config and config_file"

    def __str__(self) -> str:
        return f"ceph:{self.config.get('mon_host') or self.config_file or 'default'}"

    def __repr__(self) -> str:
        return f"<CephCluster {self}>"


async def make_in_thread(make: Callable[[], _Made], unmake: Callable[[_Made], None]) -> _Made:
    """What a slow ``make`` returns or raises, which runs in a thread, whatever comes.

    Cancelled, it returns at once, and the thread unmakes what it made when it is there.
    """
    lock = threading.Lock()
    token = trio.lowlevel.current_trio_token()
    delivered = trio.Event()
    outcomes: list[Outcome[_Made]] = []
    given_up = False

    def deliver(result: Outcome[_Made]) -> None:
        with lock:
            if not given_up:
                outcomes.append(result)
                token.run_sync_soon(delivered.set)
                return
        try:
            unmake(result.unwrap())
        except Exception as error:
            logger.info("what was given up: %s", error)

    # Not `trio.to_thread`: cancelled at its first checkpoint that does not begin, and what stands ready for the thread would stay.
    trio.lowlevel.start_thread_soon(make, deliver)
    try:
        await delivered.wait()
    except trio.Cancelled:
        with lock:
            given_up = True
        if outcomes:
            # It came at the same moment.
            trio.lowlevel.start_thread_soon(outcomes[0].unwrap, deliver)
        raise
    return outcomes[0].unwrap()


def shutdown(handle: Any) -> None:
    """Disconnects; blocks."""
    _librbd.load().rados.rados_shutdown(handle)


def _get_option(handle: Any, name: str) -> str | None:
    library = _librbd.load()
    value = library.ffi.new("char[]", _VALUE_BYTES_MAX)
    result = library.rados.rados_conf_get(handle, name.encode(), value, _VALUE_BYTES_MAX)
    return None if result < 0 else library.ffi.string(value).decode(errors="replace")
