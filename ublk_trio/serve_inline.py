"""Inline serving: plain methods, called in the loop that reaps.

One task a queue. Reap first, park only when a reap came back empty: parking after every batch costs twice as much a
request. A pass that did not park ends with a checkpoint, so that one busy queue does not starve the other tasks of
the program.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from ublk_trio.queue import Queue


async def serve_inline(queue: Queue) -> None:
    """Serve until the kernel has ended every tag. Goes on with `queue.events` if a batch was left unfinished."""
    while True:
        for event in queue.events:
            request = queue.receive(event)
            if request is not None:
                queue.serve(request)
        queue.flush()
        while queue.ready:
            queue.serve(queue.ready.popleft())
            queue.flush()
        if queue.pressed and (request := queue.next_try()) is not None:
            queue.serve_again(request)
            continue
        if queue.reap():
            await trio.lowlevel.checkpoint()
            continue
        if queue.tags.all_ended:
            return
        if queue.pressed:
            with trio.move_on_at(queue.line.deadline):
                await queue.ring.wait()
        else:
            await queue.ring.wait()
        queue.reap()
