"""A memory disk costs what was written to it, not what its size is."""

from __future__ import annotations

import pytest

from tests.kernel.programs import run, start_server

TIB = 1 << 40
MIB = 1 << 20


@pytest.mark.any_kernel
async def test_tebibyte_in_little_memory() -> None:
    """A disk of 1 TiB in memory is written and read at both ends, and costs a few MiB."""
    # Few and small buffers: where huge pages are always given, each one used for the first time takes 2 MiB.
    async with start_server("memory:1T", options=["--depth", "8", "--max-io", "64K"]) as server:
        before = server.resident_bytes()
        assert (await run("blockdev", "--getsize64", server.disk)).check().stdout == f"{TIB}\n"
        for position in (0, TIB // MIB - 1):
            script = (
                f"tr '\\0' x < /dev/zero | dd of={server.disk} bs=1M count=1 seek={position} "
                "iflag=fullblock oflag=direct status=none && "
                f"dd if={server.disk} bs=1M count=1 skip={position} iflag=direct status=none | tr -d x | wc -c"
            )
            assert (await run("sh", "-c", script)).check().stdout == "0\n"
        # Two MiB of data, and the queue's buffers that carried them.
        assert server.resident_bytes() - before < 16 * MIB
        assert server.resident_bytes() < 512 * MIB
