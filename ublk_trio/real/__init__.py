"""The real kernel: io_uring and this machine's own `ublk_drv`, behind the interfaces of `ublk_trio.ring`.

Importing it needs nothing but Python; the native part is loaded when the control device or a queue is opened.
"""

from ublk_trio.real.kernel import RealKernel

__all__ = ["RealKernel"]
