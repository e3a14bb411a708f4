"""An image of a Ceph cluster as a real disk: a filesystem on it, and a size that another program changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from tests.kernel.programs import RELEASE, drop_caches, fsck, make_filesystem, mounted, run
from tests.rbd.ceph import MIB, POOL, missing, started
from ublk_trio import RealKernel, open_target
from ublk_trio.backends import CephCluster, Rbd

pytestmark = [
    pytest.mark.any_kernel,
    pytest.mark.skipif(RELEASE < (6, 16), reason="a live disk can be resized since Linux 6.16"),
]
#: Seconds: what takes longer hangs.
HANGS = 180.0


async def test_life(tmp_path: Path) -> None:
    """Files on ext4 are there after caches are dropped, and fsck is content; the disk grows with its image; the cluster has every byte."""
    packages = missing()
    if packages:
        pytest.skip(f"needs Ceph: apt-get install {' '.join(packages)}")
    directory = tmp_path / "ceph"
    directory.mkdir()
    with started(directory) as ceph:
        image = ceph.image(16 * MIB)
        backend = Rbd(POOL, image, cluster=CephCluster(config_file=ceph.config_file), block_size=4096)
        async with open_target(RealKernel()) as target:
            device = await target.start_device(backend)
            disk = f"/dev/ublkb{device.dev_id}"
            (await run("blkdiscard", disk)).check()
            await make_filesystem(disk)
            # Whoever uses the disk does it in another process: this one serves it.
            original = tmp_path / "original"
            original.write_bytes(bytes(range(256)) * 8192)
            async with mounted(disk, tmp_path / "mount") as files:
                (await run("cp", original, files / "file")).check()
            drop_caches()
            await fsck(disk)
            async with mounted(disk, tmp_path / "mount") as files:
                (await run("cmp", original, files / "file")).check()
                (await run("fstrim", files)).check()
            resize = ("resize", "--no-progress", "--size", "32M", f"{POOL}/{image}")
            await trio.to_thread.run_sync(lambda: ceph.rbd(*resize))
            with trio.fail_after(HANGS):
                assert await backend.next_size() == 32 * MIB
            await device.update_size()
            assert int((await run("blockdev", "--getsize64", disk)).check().stdout) == 32 * MIB
            (await run("dd", "if=/dev/urandom", f"of={disk}", "bs=1M", "count=32", "oflag=direct")).check()
            (await run("dd", f"if={disk}", f"of={tmp_path / 'read'}", "bs=1M", "iflag=direct")).check()
        ceph.rbd("export", "--no-progress", f"{POOL}/{image}", str(tmp_path / "exported"))
    assert (tmp_path / "exported").read_bytes() == (tmp_path / "read").read_bytes()
