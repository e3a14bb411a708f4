"""Which hardware queue each CPU uses.

**Supported.** Neighbouring CPUs share a queue, each queue gets as many as the others or one more (from 6.3); before, the
queues take turns. Every queue serves some CPU.
**Rejected.** Nothing. **Differs from Linux.** All CPUs are on one NUMA node, present, and without hyper-threads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ublk_trio.kernel_sim.version import KernelVersion


def queue_of_cpu(*, cpus: int, queues: int, version: KernelVersion) -> list[int]:
    """The queue of each CPU."""
    assert 0 < queues <= cpus
    if not version.groups_cpus:
        return [cpu % queues for cpu in range(cpus)]
    least, more = divmod(cpus, queues)
    return [queue for queue in range(queues) for _ in range(least + (queue < more))]


def spread(queue_of_cpu: list[int]) -> list[int]:
    """All CPUs, in an order in which the queues take turns."""
    rank = [queue_of_cpu[:cpu].count(queue) for cpu, queue in enumerate(queue_of_cpu)]
    return sorted(range(len(queue_of_cpu)), key=lambda cpu: (rank[cpu], queue_of_cpu[cpu]))
