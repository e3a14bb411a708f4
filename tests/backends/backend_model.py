"""A disk as a bytearray, and the checker that runs a script of requests on a backend and on it."""

from __future__ import annotations

import inspect
from typing import Any

import attrs
from hypothesis import strategies as st

from ublk_trio.backends import Backend, capabilities

STALE = 0xA5


@attrs.frozen(kw_only=True)
class Step:
    """One request; offset and length in bytes; `value` fills a write, `flag` is fua or unmap."""

    op: str
    offset: int
    length: int
    value: int
    flag: bool


def scripts(size: int, block_size: int) -> st.SearchStrategy[list[Step]]:
    """Scripts of block-aligned requests that lie within the disk."""
    blocks = size // block_size

    def step(op: str, first: int, count: int, value: int, flag: bool) -> Step:
        length = min(count, blocks - first) * block_size
        return Step(op=op, offset=first * block_size, length=length, value=value, flag=flag)

    steps = st.builds(
        step,
        st.sampled_from(["read", "write", "discard", "write_zeroes", "flush"]),
        st.integers(0, blocks - 1),
        st.integers(1, blocks),
        st.integers(1, 255),
        st.booleans(),
    )
    return st.lists(steps, min_size=1, max_size=20)


async def check_against_model(backend: Any, script: list[Step], *, size: int) -> None:
    """Runs the script on an all-zero backend; AssertionError where a bytearray would have given something else.

    A discarded range must read as zeroes: regular files and memory promise that.
    """
    assert backend.size == size
    model = bytearray(size)
    known = capabilities(backend)
    for number, step in enumerate(script):
        if step.op not in known:
            continue
        end = step.offset + step.length
        if step.op == "read":
            assert await _read(backend, step.offset, step.length) == model[step.offset : end], f"step {number}: {step}"
        elif step.op == "write":
            # Each block differs from its neighbours, so that a shift by any number of blocks shows.
            data = b"".join(bytes([(step.value + index) % 256]) * 512 for index in range(step.length // 512))
            count = await _settle(backend.write(step.offset, memoryview(data), fua=step.flag))
            assert count in (None, step.length)
            model[step.offset : end] = data
        elif step.op == "flush":
            await _settle(backend.flush())
        else:
            if step.op == "discard":
                await _settle(backend.discard(step.offset, step.length))
            else:
                await _settle(backend.write_zeroes(step.offset, step.length, unmap=step.flag))
            model[step.offset : end] = bytes(step.length)
    assert await _read(backend, 0, size) == model, "the whole disk at the end"


async def _read(backend: Backend, offset: int, length: int) -> bytearray:
    content = bytearray([STALE]) * length
    assert await _settle(backend.read(offset, memoryview(content))) in (None, length)
    return content


async def _settle(result: Any) -> Any:
    return await result if inspect.isawaitable(result) else result
