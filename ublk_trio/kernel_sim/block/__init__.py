"""The block layer above the driver, and what an application sees of ``/dev/ublkbN``.

An operation of an application is a `Bio`. The disk checks it, splits it at the queue's limits into `Request`s, and hands
these to the hardware queue of the application's CPU, where each waits for a tag. What the driver answers goes back the
same way.

| module | what it is about |
|---|---|
| `device` | ``/dev/ublkbN``: opening, reading, writing, ioctls and their errnos |
| `disk` | the gendisk: from a bio to its requests, freezing, removal |
| `limits`, `split` | what fits into one request |
| `merge` | plugging: adjacent operations become one request |
| `tags` | a hardware queue: tags, who waits for them, requeueing |
| `mapping` | which CPU uses which hardware queue |
| `flush` | preflush, postflush, and one FLUSH for many |
| `partitions` | the scan of a new disk |
| `zones` | zoned disks |
"""

from ublk_trio.kernel_sim.block.bio import Bio
from ublk_trio.kernel_sim.block.device import SimBlockDevice, SimBlockFile
from ublk_trio.kernel_sim.block.disk import SimDisk
from ublk_trio.kernel_sim.block.flush import FLUSH_SECTOR
from ublk_trio.kernel_sim.block.merge import Plug
from ublk_trio.kernel_sim.block.partitions import Partition
from ublk_trio.kernel_sim.block.request import Request

__all__ = ["FLUSH_SECTOR", "Bio", "Partition", "Plug", "Request", "SimBlockDevice", "SimBlockFile", "SimDisk"]
