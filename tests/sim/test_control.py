"""The control commands' checks, in their order, and their effects."""

from __future__ import annotations

import errno
import os
from typing import Any

import attrs
import pytest

from tests.sim.mini import basic_params, live, machine, opened
from ublk_trio.kernel_sim import SimKernel
from ublk_trio.uapi import (
    ANY_DEVICE_ID,
    ControlCommand,
    DeviceState,
    DevInfo,
    Feature,
    Params,
    ParamsDevt,
    ParamsDiscard,
    ParamsDmaAlign,
    ParamsSegment,
)

GOOD = DevInfo(nr_hw_queues=2, queue_depth=4, max_io_buf_bytes=65536, dev_id=3)
R, REISSUE, FAIL_IO = Feature.USER_RECOVERY, Feature.USER_RECOVERY_REISSUE, Feature.USER_RECOVERY_FAIL_IO


async def add(kernel: SimKernel, info: DevInfo, **call: Any) -> int:
    async with kernel.open_control() as control:
        given: dict[str, Any] = {"dev_id": info.dev_id, "buffer": bytearray(info.pack())} | call
        return await control.submit(ControlCommand.ADD_DEV, **given)


# ---------------------------------------------------------------------- the order of the first checks


async def test_unknown_device_before_unknown_command() -> None:
    """A command that nobody knows, for a device that there is not, is ENODEV; for one that there is, EOPNOTSUPP."""
    kernel = SimKernel()
    async with machine(kernel) as m:
        for command in (0x7F, ControlCommand.QUIESCE_DEV, ControlCommand.REG_BUF):
            assert await m.command(command, 5) == -errno.ENODEV  # type: ignore[arg-type]
        await m.add(5)
        for command in (0x7F, ControlCommand.QUIESCE_DEV, ControlCommand.REG_BUF):
            assert await m.command(command, 5) == -errno.EOPNOTSUPP  # type: ignore[arg-type]
        await m.delete(5)
    assert kernel.leftovers() == []


async def test_no_permission_before_unknown_command() -> None:
    """Whoever may not touch the device does not learn whether the command exists."""
    kernel = SimKernel()
    async with machine(kernel) as m:
        await m.add(5)
        kernel.privileged = False
        assert await m.command(0x7F, 5) == -errno.EPERM  # type: ignore[arg-type]
        assert await m.stop(5) == -errno.EPERM
        kernel.privileged = True
        await m.delete(5)


async def test_legacy_opcodes_can_be_configured_away() -> None:
    """A kernel without legacy opcodes refuses them before it looks for the device."""
    async with SimKernel(legacy_opcodes=False).open_control() as control:
        stop = ControlCommand.STOP_DEV
        assert await control.submit(stop, dev_id=0, ioctl_encoded=False) == -errno.EOPNOTSUPP
        assert await control.submit(stop, dev_id=0) == -errno.ENODEV
    async with SimKernel().open_control() as control:
        assert await control.submit(stop, dev_id=0, ioctl_encoded=False) == -errno.ENODEV


async def test_get_features() -> None:
    """GET_FEATURES needs no device, exactly 8 bytes, and the ioctl encoding."""
    kernel = SimKernel()
    async with kernel.open_control() as control:
        buffer = bytearray(8)
        get = ControlCommand.GET_FEATURES
        assert await control.submit(get, dev_id=0, buffer=buffer) == 0
        assert int.from_bytes(buffer, "little") == kernel.features
        assert await control.submit(get, dev_id=0, buffer=bytearray(16)) == -errno.EINVAL
        assert await control.submit(get, dev_id=0, length=8) == -errno.EINVAL


# ---------------------------------------------------------------------- ADD_DEV


async def test_add_grants_what_it_can() -> None:
    """What comes back from ADD_DEV is what the kernel made of it, not what was asked."""
    kernel = SimKernel(cpus=2)
    asked = attrs.evolve(
        GOOD,
        nr_hw_queues=8,
        max_io_buf_bytes=65536 + 4095,
        flags=Feature.NEED_GET_DATA | Feature.ZONED | Feature.USER_COPY,
        state=DeviceState.LIVE,
    )
    buffer = bytearray(asked.pack())
    assert await add(kernel, asked, buffer=buffer) == 0
    got = DevInfo.unpack(buffer)
    assert (got.nr_hw_queues, got.max_io_buf_bytes, got.dev_id) == (2, 65536, 3)
    assert (got.state, got.ublksrv_pid) == (DeviceState.DEAD, -1)
    # The server moves the data itself, so there is nothing to ask for.
    assert Feature.USER_COPY | Feature.ZONED in got.flags
    assert Feature.NEED_GET_DATA not in got.flags
    assert Feature.CMD_IOCTL_ENCODE | Feature.PER_IO_DAEMON | Feature.SAFE_STOP_DEV in got.flags
    assert kernel.device_ids() == [3]


async def test_add_chooses_the_lowest_free_id() -> None:
    """-1 asks for any id: the lowest that is free."""
    kernel = SimKernel()
    async with machine(kernel) as m:
        assert [(await m.add(dev_id)).dev_id for dev_id in (ANY_DEVICE_ID, 2, ANY_DEVICE_ID, ANY_DEVICE_ID)] == [
            0,
            2,
            1,
            3,
        ]
        assert await m.delete(1) == 0
        assert (await m.add()).dev_id == 1


@pytest.mark.parametrize(
    ("change", "call"),
    [
        ({}, {"length": 63}),
        ({}, {"buffer": None, "length": 64}),
        ({}, {"queue_id": 0}),
        ({"queue_depth": 0}, {}),
        ({"queue_depth": 4097}, {}),
        ({"nr_hw_queues": 0}, {}),
        ({"nr_hw_queues": 4097}, {}),
        ({"flags": REISSUE}, {}),
        ({"flags": FAIL_IO}, {}),
        ({"flags": R | REISSUE | FAIL_IO}, {}),
        ({"flags": Feature.QUIESCE}, {}),
        ({"flags": Feature.INTEGRITY}, {}),
        ({"flags": Feature.IO_DESC_SIZE, "io_desc_size": 16}, {}),
        ({"flags": Feature.IO_DESC_SIZE, "io_desc_size": 264}, {}),
        ({"flags": Feature.IO_DESC_SIZE, "io_desc_size": 28}, {}),
        ({}, {"dev_id": 4}),
        ({"dev_id": 1 << 20}, {"dev_id": 1 << 20}),
        ({"flags": Feature.ZONED}, {}),
    ],
)
async def test_add_refuses(change: dict[str, Any], call: dict[str, Any]) -> None:
    """What ADD_DEV refuses adds nothing."""
    kernel = SimKernel()
    assert await add(kernel, attrs.evolve(GOOD, **change), **call) == -errno.EINVAL
    assert kernel.device_ids() == []


@pytest.mark.parametrize("flags", [Feature(0), R, R | REISSUE, R | FAIL_IO])
async def test_add_accepts_every_sensible_recovery(flags: Feature) -> None:
    """The four ways to recover are granted."""
    buffer = bytearray(attrs.evolve(GOOD, flags=flags).pack())
    assert await add(SimKernel(), GOOD, buffer=buffer) == 0
    assert DevInfo.unpack(buffer).flags & (R | REISSUE | FAIL_IO) == flags


async def test_add_refusals_in_order() -> None:
    """EINVAL comes before EPERM, and that before EEXIST."""
    kernel = SimKernel()
    assert await add(kernel, GOOD) == 0
    assert await add(kernel, GOOD) == -errno.EEXIST
    kernel.privileged = False
    assert await add(kernel, GOOD) == -errno.EPERM
    assert await add(kernel, attrs.evolve(GOOD, queue_depth=0)) == -errno.EINVAL


async def test_the_limit_on_devices() -> None:
    """To 6.11 every device counts against ublks_max; from 6.12 root's do not."""
    old, new = SimKernel(version=(6, 11), devices_max=1), SimKernel(version=(6, 12), devices_max=1)
    any_id = attrs.evolve(GOOD, dev_id=ANY_DEVICE_ID)
    assert [await add(old, any_id) for _ in range(2)] == [0, -errno.EACCES]
    assert [await add(new, any_id) for _ in range(2)] == [0, 0]


async def test_the_limit_does_not_count_what_was_deleted() -> None:
    """A device that DEL_DEV_ASYNC removed makes room at once, though its server keeps its id."""
    kernel = SimKernel(version=(6, 11), devices_max=1)
    async with machine(kernel) as m, opened(m) as device:
        assert await m.command(ControlCommand.DEL_DEV_ASYNC, device.info.dev_id) == 0
        assert device.info.dev_id in kernel.device_ids()
        assert (await m.add()).dev_id != device.info.dev_id


@pytest.mark.parametrize("flags", [REISSUE, R | REISSUE | FAIL_IO])
async def test_before_6_13_recovery_flags_were_not_checked(flags: Feature) -> None:
    """6.12 takes recovery flags that later releases refuse, and drops what it does not know."""
    kernel = SimKernel(version=(6, 12))
    buffer = bytearray(attrs.evolve(GOOD, flags=flags).pack())
    assert await add(kernel, GOOD, buffer=buffer) == 0
    assert DevInfo.unpack(buffer).flags & (R | REISSUE | FAIL_IO) == flags & kernel.features


async def test_batches_have_no_daemons_of_their_own() -> None:
    """BATCH_IO is granted without PER_IO_DAEMON and NEED_GET_DATA: no tag has a command of its own."""
    async with machine(SimKernel()) as m:
        granted = (await m.add(flags=Feature.BATCH_IO | Feature.NEED_GET_DATA)).flags
        assert Feature.BATCH_IO in granted
        assert not granted & (Feature.PER_IO_DAEMON | Feature.NEED_GET_DATA)


# ---------------------------------------------------------------------- parameters


async def test_params_round_trip_and_devt() -> None:
    """GET_PARAMS gives back what was set, with the device numbers filled in."""
    kernel = SimKernel(partition_scan=False)
    discard = ParamsDiscard(discard_granularity=4096, max_discard_sectors=64, max_discard_segments=1)
    # A section behind the device numbers, too.
    given = attrs.evolve(basic_params(discard=discard), dma_align=ParamsDmaAlign(alignment=511))
    async with machine(kernel) as m, live(m, params=given) as device:
        buffer = bytearray(Params.query())
        assert await m.command(ControlCommand.GET_PARAMS, 0, buffer=buffer) == 0
        got = Params.unpack(buffer)
        assert attrs.evolve(got, devt=None) == given
        assert got.devt is not None
        assert got.devt.disk_major
        await m.stop(device.info.dev_id)
        assert await m.command(ControlCommand.GET_PARAMS, 0, buffer=buffer) == 0
        devt = Params.unpack(buffer).devt
        assert devt is not None
        assert devt.disk_major == 0


@pytest.mark.parametrize("command", [ControlCommand.SET_PARAMS, ControlCommand.GET_PARAMS])
async def test_params_header(command: ControlCommand) -> None:
    """A length that cannot be is EINVAL."""
    kernel = SimKernel()
    async with machine(kernel) as m:
        await m.add()
        packed = basic_params().pack()
        too_long = bytearray((len(packed) + 1).to_bytes(4, "little") + packed[4:])
        for buffer in (bytearray(8), bytearray(packed[:8]), bytearray(4) + packed[4:], too_long):
            assert await m.command(command, 0, buffer=bytearray(buffer)) == -errno.EINVAL
        assert await m.command(command, 0) == -errno.EINVAL


BASIC = basic_params().basic
assert BASIC is not None
DISCARD = ParamsDiscard(discard_granularity=512, max_discard_sectors=8, max_discard_segments=1)
BAD_PARAMS = [
    Params(discard=DISCARD),
    Params(basic=attrs.evolve(BASIC, logical_bs_shift=8)),
    Params(basic=attrs.evolve(BASIC, logical_bs_shift=13, physical_bs_shift=13)),
    Params(basic=attrs.evolve(BASIC, logical_bs_shift=12, physical_bs_shift=9)),
    Params(basic=attrs.evolve(BASIC, io_opt_shift=29)),
    Params(basic=attrs.evolve(BASIC, max_sectors=7)),
    Params(basic=attrs.evolve(BASIC, max_sectors=129)),
    Params(basic=BASIC, discard=attrs.evolve(DISCARD, max_discard_segments=2)),
    Params(basic=BASIC, discard=attrs.evolve(DISCARD, discard_granularity=0)),
    Params(basic=BASIC, devt=ParamsDevt(char_major=0, char_minor=0, disk_major=0, disk_minor=0)),
    Params(basic=BASIC, dma_align=ParamsDmaAlign(alignment=4096)),
    Params(basic=BASIC, dma_align=ParamsDmaAlign(alignment=2)),
    Params(basic=BASIC, segment=ParamsSegment(seg_boundary_mask=2047, max_segment_size=4096, max_segments=1)),
    Params(basic=BASIC, segment=ParamsSegment(seg_boundary_mask=4095, max_segment_size=2048, max_segments=1)),
]


@pytest.mark.parametrize("bad", BAD_PARAMS)
async def test_bad_params_take_the_good_ones_with_them(bad: Params) -> None:
    """A failed validation leaves no parameters at all, so START_DEV refuses."""
    kernel = SimKernel()
    async with machine(kernel) as m:
        await m.add()
        assert await m.set_params(0, basic_params()) == 0
        assert await m.set_params(0, bad) == -errno.EINVAL
        assert await m.start() == -errno.EINVAL


@pytest.mark.parametrize("command", [ControlCommand.SET_PARAMS, ControlCommand.GET_PARAMS])
async def test_what_is_too_short_changes_no_params(command: ControlCommand) -> None:
    """Nothing but a header, a length of 0, no types in a SET_PARAMS, no address: EINVAL, and the parameters stay."""
    kernel = SimKernel()
    async with machine(kernel) as m:
        await m.add()
        await m.set_params(0, basic_params())
        packed = basic_params().pack()
        header = (8).to_bytes(4, "little") + packed[4:8]
        too_short = [bytearray(header), bytearray(4) + packed[4:]]
        if command is ControlCommand.SET_PARAMS:
            too_short.append(bytearray(packed[:4] + bytes(4) + packed[8:]))
        for buffer in too_short:
            assert await m.command(command, buffer=buffer) == -errno.EINVAL
        assert await m.control.submit(command, dev_id=0, length=len(packed)) == -errno.EINVAL
        buffer = bytearray(Params.query())
        assert await m.command(ControlCommand.GET_PARAMS, buffer=buffer) == 0
        assert attrs.evolve(Params.unpack(buffer), devt=None) == basic_params()


async def test_params_of_one_byte() -> None:
    """A length of 1 is none too small: one byte is set, or read."""
    kernel = SimKernel()
    async with machine(kernel) as m:
        await m.add()
        await m.set_params(0, basic_params())
        one_byte = bytearray((1).to_bytes(4, "little") + basic_params().pack()[4:])
        assert await m.command(ControlCommand.SET_PARAMS, buffer=bytearray(one_byte)) == 0
        assert await m.command(ControlCommand.GET_PARAMS, buffer=one_byte) == 0


@pytest.mark.parametrize("dev_id", [0, 3])
async def test_device_numbers(dev_id: int) -> None:
    """The minors are told as soon as there is such a device: the disk's from START_DEV to STOP_DEV."""
    kernel = SimKernel(partition_scan=False)
    async with machine(kernel) as m, opened(m, dev_id=dev_id) as device:
        buffer = bytearray(Params.query())

        async def numbers() -> ParamsDevt:
            assert await m.command(ControlCommand.GET_PARAMS, dev_id, buffer=buffer) == 0
            devt = Params.unpack(buffer).devt
            assert devt is not None
            return devt

        before = await numbers()
        assert (before.char_minor, before.disk_major, before.disk_minor) == (dev_id, 0, 0)
        device.queue.fetch_all()
        assert await m.start(dev_id) == 0
        live_now = await numbers()
        assert (live_now.char_major, live_now.char_minor) == (before.char_major, dev_id)
        assert live_now.disk_major not in (0, live_now.char_major)
        assert live_now.disk_minor == dev_id
        assert await m.stop(dev_id) == 0


async def test_before_6_3_there_are_no_device_numbers() -> None:
    """GET_PARAMS of a release without that section leaves it out."""
    async with SimKernel(version=(6, 2)).open_control() as control:
        buffer = bytearray(Params.query())
        for command, sent in (
            (ControlCommand.ADD_DEV, bytearray(GOOD.pack())),
            (ControlCommand.SET_PARAMS, bytearray(basic_params().pack())),
            (ControlCommand.GET_PARAMS, buffer),
        ):
            assert await control.submit(command, dev_id=GOOD.dev_id, buffer=sent, ioctl_encoded=False) == 0
        assert Params.unpack(buffer) == basic_params()


async def test_before_7_0_refused_params_can_still_be_read() -> None:
    """What SET_PARAMS refused is there without its types, and START_DEV takes none of it."""
    async with machine(SimKernel(version=(6, 16))) as m, opened(m) as device:
        device.queue.fetch_all()
        bad = basic_params(max_sectors=7)
        packed = bad.pack()
        assert await m.set_params(0, bad) == -errno.EINVAL
        assert await m.start() == -errno.EINVAL
        buffer = bytearray(Params.query())
        assert await m.command(ControlCommand.GET_PARAMS, buffer=buffer) == 0
        got = Params.unpack(buffer)
        assert attrs.evolve(got, devt=None) == Params()
        assert buffer[:4] == packed[:4]
        assert buffer[8:40] == packed[8:40]


async def test_params_are_fixed_while_there_is_a_disk() -> None:
    """SET_PARAMS is EACCES from START_DEV until the disk is freed, and that is when its last opener closes it."""
    kernel = SimKernel(partition_scan=False)
    async with machine(kernel) as m, live(m) as device:
        assert await m.set_params(0, basic_params()) == -errno.EACCES
        with device.disk.open():
            with device.disk.open():
                await m.stop()
                assert await m.set_params(0, basic_params()) == -errno.EACCES
            assert await m.set_params(0, basic_params()) == -errno.EACCES
        assert await m.set_params(0, basic_params()) == 0


async def test_a_section_of_a_later_release_is_ignored() -> None:
    """A release drops the type bits that it does not know instead of looking at their sections."""
    kernel = SimKernel(version=(6, 5))
    async with machine(kernel) as m:
        buffer = bytearray(Params(basic=BASIC, dma_align=ParamsDmaAlign(alignment=2)).pack())
        await m.add()
        assert await m.command(ControlCommand.SET_PARAMS, 0, buffer=buffer) == 0


# ---------------------------------------------------------------------- getters


async def test_device_info() -> None:
    """GET_DEV_INFO tells the state and whose server it is."""
    kernel = SimKernel(partition_scan=False)
    async with machine(kernel) as m:
        async with live(m):
            assert (await m.info()).state is DeviceState.LIVE
            assert (await m.info()).ublksrv_pid == os.getpid()
            await m.stop()
            assert (await m.info()).state is DeviceState.DEAD
            assert (await m.info()).ublksrv_pid == -1
            assert await m.command(ControlCommand.GET_DEV_INFO, buffer=bytearray(63)) == -errno.EINVAL
        assert await m.command(ControlCommand.GET_DEV_INFO, buffer=bytearray(64)) == -errno.ENODEV


async def test_device_info2_wants_the_path() -> None:
    """GET_DEV_INFO2 answers only whoever names the device's char device."""
    kernel = SimKernel()
    async with machine(kernel) as m:
        await m.add(7)

        async def ask(path: bytes, length: int | None = None) -> tuple[int, bytearray]:
            buffer = bytearray(path.ljust(16, b"\0") + bytes(64))
            result = await m.control.submit(
                ControlCommand.GET_DEV_INFO2, dev_id=7, buffer=buffer, length=length, dev_path_length=16 if path else 0
            )
            return result, buffer

        result, buffer = await ask(b"/dev/ublkc7")
        assert result == 0
        assert DevInfo.unpack(buffer[16:]).dev_id == 7
        assert (await ask(b""))[0] == -errno.EINVAL
        assert (await ask(b"/dev/ublkc7", length=15))[0] == -errno.EINVAL
        assert (await ask(b"/dev/ublkc7", length=79))[0] == -errno.EINVAL
        assert (await ask(b"/dev/ublkc8"))[0] == -errno.ENOENT
        await m.add(8)
        assert (await ask(b"/dev/ublkc8"))[0] == -errno.EPERM


async def test_every_cpu_belongs_to_one_queue() -> None:
    """The queues' affinities part the CPUs among them."""
    kernel = SimKernel(cpus=5)
    async with machine(kernel) as m:
        await m.add(queues=2)
        masks = []
        for queue in range(2):
            buffer = bytearray(8)
            assert await m.command(ControlCommand.GET_QUEUE_AFFINITY, data=queue, buffer=buffer) == 0
            masks.append(int.from_bytes(buffer, "little"))
        assert masks[0] | masks[1] == 0b11111
        assert masks[0] & masks[1] == 0
        assert await m.command(ControlCommand.GET_QUEUE_AFFINITY, data=2, buffer=bytearray(8)) == -errno.EINVAL
        assert await m.command(ControlCommand.GET_QUEUE_AFFINITY, buffer=bytearray(4)) == -errno.EINVAL
        assert await m.command(ControlCommand.GET_QUEUE_AFFINITY) == -errno.EINVAL
    async with machine(SimKernel(cpus=65)) as m:
        await m.add()
        assert await m.command(ControlCommand.GET_QUEUE_AFFINITY, buffer=bytearray(8)) == -errno.EINVAL
        assert await m.command(ControlCommand.GET_QUEUE_AFFINITY, buffer=bytearray(16)) == 0


# ---------------------------------------------------------------------- START_DEV


async def test_start_refusals_in_order() -> None:
    """A pid that cannot be, and missing parameters, are refused without waiting for the server."""
    kernel = SimKernel(partition_scan=False)
    async with machine(kernel) as m:
        await m.add()
        assert await m.start() == -errno.EINVAL  # no parameters
        await m.set_params(0, basic_params())
        assert await m.command(ControlCommand.START_DEV, data=0) == -errno.EINVAL
        assert await m.command(ControlCommand.START_DEV, data=-1 & (1 << 64) - 1) == -errno.EINVAL
        await m.delete()
        async with live(m):
            assert await m.start() == -errno.EEXIST
            assert await m.command(ControlCommand.START_DEV, data=os.getpid() + 1) == -errno.EINVAL
            await m.stop()
            assert await m.start() == -errno.EBUSY


async def test_older_releases_do_not_compare_the_pid() -> None:
    """Before 6.17 any pid starts the device."""
    kernel = SimKernel(version=(6, 16), partition_scan=False)
    async with machine(kernel) as m, opened(m) as device:
        device.queue.fetch_all()
        assert await m.command(ControlCommand.START_DEV, data=1) == 0


# ---------------------------------------------------------------------- the others


async def test_update_size() -> None:
    """UPDATE_SIZE changes the disk at once, and there must be one."""
    kernel = SimKernel(partition_scan=False)
    async with machine(kernel) as m, live(m) as device:
        assert await m.command(ControlCommand.UPDATE_SIZE, data=16) == 0
        assert device.disk.size == 8192
        await m.stop()
        assert await m.command(ControlCommand.UPDATE_SIZE, data=16) == -errno.ENODEV


async def test_try_stop() -> None:
    """TRY_STOP_DEV leaves a disk alone that somebody has open."""
    kernel = SimKernel(partition_scan=False)
    async with machine(kernel) as m, live(m) as device:
        with device.disk.open():
            assert await m.command(ControlCommand.TRY_STOP_DEV) == -errno.EBUSY
        assert await m.command(ControlCommand.TRY_STOP_DEV) == 0
        assert await m.command(ControlCommand.TRY_STOP_DEV) == -errno.ENODEV
