"""Ceph's librados and librbd: those of their calls that `CephCluster` and `Rbd` make.

The libraries are looked for when the first cluster is opened, with cffi in ABI mode: nobody else needs Ceph, neither to build nor to
import this package. Declarations are from Ceph's ``rados/librados.h`` and ``rbd/librbd.h``; these calls are in librados 2 and librbd 1
since Ceph 16; who calls ``rbd_resize2`` looks first whether it is there. All return 0, or a negative errno, if nothing else is said.
"""

from __future__ import annotations

import errno
import functools
import os
from typing import Any, Final

import attrs

from ublk_trio.errors import BackendError, UsageError, errno_text

LIBRADOS: Final = "librados.so.2"
LIBRBD: Final = "librbd.so.1"
#: What `Library.rbd` is asked to write to when requests are over (enum of librbd.h).
EVENT_TYPE_EVENTFD: Final = 2
#: Zero by writing zeroes, so that the space stays taken.
WRITE_ZEROES_THICK: Final = 1
#: An image that has a journal (RBD_FEATURE_JOURNALING).
FEATURE_JOURNALING: Final = 1 << 6
_DEBIAN: Final = {LIBRADOS: "librados2", LIBRBD: "librbd1"}

_RADOS: Final = """
typedef void *rados_t;
typedef void *rados_ioctx_t;
int rados_create(rados_t *cluster, const char *id);
int rados_conf_read_file(rados_t cluster, const char *path);
int rados_conf_set(rados_t cluster, const char *option, const char *value);
int rados_conf_get(rados_t cluster, const char *option, char *buf, size_t len);
int rados_connect(rados_t cluster);
void rados_shutdown(rados_t cluster);
int rados_ioctx_create(rados_t cluster, const char *pool_name, rados_ioctx_t *ioctx);
void rados_ioctx_set_namespace(rados_ioctx_t io, const char *nspace);
void rados_ioctx_destroy(rados_ioctx_t io);
"""
# Offsets and sizes that are off_t or uint64_t in the header; ssize_t is what requests come to: bytes, or a negative errno.
_RBD: Final = """
typedef void *rbd_image_t;
typedef void *rbd_completion_t;
int rbd_open(rados_ioctx_t io, const char *name, rbd_image_t *image, const char *snap_name);
int rbd_open_read_only(rados_ioctx_t io, const char *name, rbd_image_t *image, const char *snap_name);
int rbd_close(rbd_image_t image);
int rbd_get_features(rbd_image_t image, uint64_t *features);
int rbd_get_size(rbd_image_t image, uint64_t *size);
int rbd_resize(rbd_image_t image, uint64_t size);
int rbd_resize2(rbd_image_t image, uint64_t size, bool allow_shrink, int (*progress)(uint64_t, uint64_t, void *), void *);
int rbd_aio_create_completion(void *arg, void *callback, rbd_completion_t *c);
int rbd_aio_read(rbd_image_t image, uint64_t off, size_t len, char *buf, rbd_completion_t c);
int rbd_aio_write(rbd_image_t image, uint64_t off, size_t len, const char *buf, rbd_completion_t c);
int rbd_aio_discard(rbd_image_t image, uint64_t off, uint64_t len, rbd_completion_t c);
int rbd_aio_write_zeroes(rbd_image_t image, uint64_t off, size_t len, rbd_completion_t c, int zero_flags, int op_flags);
int rbd_aio_flush(rbd_image_t image, rbd_completion_t c);
ssize_t rbd_aio_get_return_value(rbd_completion_t c);
void rbd_aio_release(rbd_completion_t c);
int rbd_set_image_notification(rbd_image_t image, int fd, int type);
int rbd_poll_io_events(rbd_image_t image, rbd_completion_t *comps, int numcomp);
int rbd_update_watch(rbd_image_t image, uint64_t *handle, void (*callback)(void *), void *arg);
int rbd_update_unwatch(rbd_image_t image, uint64_t handle);
"""


@attrs.frozen(kw_only=True)
class Library:
    """Both libraries. `Any` stands for C, to which cffi gives no types; a call lets other threads run meanwhile."""

    ffi: Any
    rados: Any
    rbd: Any
    #: Memory from C, not zeroed first.
    allocate: Any


@functools.cache
def load() -> Library:
    """The libraries, loaded once. Raises `BackendError` (ENOTSUP), one line with the mend, when one does not load."""
    import cffi

    ffi = cffi.FFI()
    ffi.cdef(_RADOS + _RBD)
    allocate = ffi.new_allocator(should_clear_after_alloc=False)
    return Library(ffi=ffi, rados=_dlopen(ffi, LIBRADOS), rbd=_dlopen(ffi, LIBRBD), allocate=allocate)


def encode(text: str) -> bytes:
    """A text for C. Raises `UsageError` for one that C would cut off."""
    if "\0" in text:
        raise UsageError(f"{text!r} holds a zero byte: take that out")
    return os.fsencode(text)


def _dlopen(ffi: Any, name: str) -> Any:
    try:
        return ffi.dlopen(name)
    except OSError as error:
        raise BackendError(
            errno.ENOTSUP,
            f"{errno_text(errno.ENOTSUP)}: Ceph's {name} does not load ({error}): as root, apt-get install {_DEBIAN[name]}",
        ) from error
