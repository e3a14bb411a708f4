"""Mutants that no test can tell from the module as it is, each with the reason. One that is found after all must go from here."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

#: By module: the mutant as `python -m tests.proof.mutate` prints it, and why it is as good as the original.
EXPLAINED: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "ublk_trio.kernel_sim.batch": {
            "_Element.__init__: self.address = rest.pop(0) if flags & BatchFlag.HAS_BUF_ADDR else 0 "
            "-> self.address = rest.pop(-1) if flags & BatchFlag.HAS_BUF_ADDR else 0": (
                "a zoned device copies nothing: an element has an address or an LBA"
            ),
            "_Element.__init__: self.zone_lba = rest.pop(0) if flags & BatchFlag.HAS_ZONE_LBA else _NO_LBA "
            "-> self.zone_lba = rest.pop(-1) if flags & BatchFlag.HAS_ZONE_LBA else _NO_LBA": "the last word that is there",
            **{
                f"_Element.__init__: self.auto_buffer = 0 -> self.auto_buffer = {number}": "read only with AUTO_BUF_REG"
                for number in (1, -1)
            },
            "prepare: queue.device.update_delivery() -> pass": "without a server there is no disk, or nothing is delivered",
            "BatchQueue._acquire: if self._active is None and self._fetches and self._arrived "
            "-> if self._fetches and self._arrived": "makes the same command the one at work, which then finds nothing left",
            "BatchQueue._acquire: if self._active is None and self._fetches and self._arrived "
            "-> if self._active is None and self._fetches": "a command at work on nothing does nothing",
        },
        "ublk_trio.kernel_sim.checks": {
            **dict.fromkeys(
                (
                    "module: _PERIOD: Final = bytes(range(128, 255)) -> _PERIOD: Final = bytes(range(129, 255))",
                    "module: _PERIOD: Final = bytes(range(128, 255)) -> _PERIOD: Final = bytes(range(128, 254))",
                ),
                "a period that divides no power of two either",
            ),
            "pattern: if length > len(_pattern) -> if length >= len(_pattern)": "makes the same pattern anew",
            "pattern: _pattern = _PERIOD * (length // len(_PERIOD) + 1) -> _pattern = _PERIOD * (length // len(_PERIOD) + 2)": (
                "keeps more of the pattern than is asked for"
            ),
            "_first_difference: return next((i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b)) "
            "-> return next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b))": (
                "both have the same length"
            ),
        },
        "ublk_trio.kernel_sim.control_params": dict.fromkeys(
            (
                "module: _CHAR_MAJOR: Final = 240 -> _CHAR_MAJOR: Final = 241",
                "module: _CHAR_MAJOR: Final = 240 -> _CHAR_MAJOR: Final = 239",
                "module: _BLOCK_MAJOR: Final = 259 -> _BLOCK_MAJOR: Final = 260",
                "module: _BLOCK_MAJOR: Final = 259 -> _BLOCK_MAJOR: Final = 258",
            ),
            "a made-up number: on Linux it may be any",
        ),
        "ublk_trio.kernel_sim.control_start": {
            **{
                f"_stop_and_cancel: return 0 -> return {number}": (
                    "nobody looks at it: a generator of this type has to return something"
                )
                for number in (1, -1)
            },
            **{
                f"wait_until_ready_and_lock: return -errno.EINTR -> return {number}": "who called looks only whether it is 0"
                for number in ("errno.EINTR", "-errno.EINVAL")
            },
        },
        "ublk_trio.kernel_sim.char_device": {
            "Node: mode: int = 384 -> mode: int = 385": "nobody executes a device",
            "check_mmap: if length <= 0 or offset % page_size or offset < 0 -> if length <= 0 or offset % page_size or offset < -1": (
                "-1 is no page's offset"
            ),
        },
        "ublk_trio.kernel_sim.device": {
            **dict.fromkeys(
                (
                    f"SimDevice.{name}: return 0 -> return {other}"
                    for name in ("stop", "_abort_all", "wait_until_idle")
                    for other in (1, -1)
                ),
                "nobody looks at it: a generator of this type has to return something",
            ),
            **dict.fromkeys(
                (
                    "SimDevice.__init__: self.opener_pid = 0 -> self.opener_pid = 1",
                    "SimDevice.__init__: self.opener_pid = 0 -> self.opener_pid = -1",
                ),
                "START_DEV does not ask for it before somebody has opened the char device, and who ends with such a pid changes nothing",
            ),
            **dict.fromkeys(
                (
                    "SimDevice.reset: self.opener_pid = -1 -> self.opener_pid = -2",
                    "SimDevice.reset: self.opener_pid = -1 -> self.opener_pid = -0",
                ),
                "no process has such a pid either",
            ),
            "SimDevice.disk_closed: if disk is self.detached_disk and (not disk.openers) -> if not disk.openers": (
                "another disk than the detached one is still there: nothing is freed"
            ),
            "SimDevice.__init__: self.server_died = False -> self.server_died = True": (
                "a device that was never LIVE has no pid to hide, and no requests"
            ),
        },
        "ublk_trio.kernel_sim.queue": {
            "SimQueue.__init__: self.shmem = device.shmem if flags & Feature.SHMEM_ZC else None "
            "-> self.shmem = device.shmem if flags | Feature.SHMEM_ZC else None": (
                "without the feature no memory is registered: nothing lies in it"
            ),
            **dict.fromkeys(
                (
                    "module: UNKNOWN_COMMAND: Final = -1 -> UNKNOWN_COMMAND: Final = 1",
                    "module: UNKNOWN_COMMAND: Final = -1 -> UNKNOWN_COMMAND: Final = -0",
                    "module: BAD_OPCODE: Final = -2 -> BAD_OPCODE: Final = 2",
                    "module: BAD_OPCODE: Final = -2 -> BAD_OPCODE: Final = -3",
                ),
                "no command has that number either",
            ),
            **{
                f"{where} -> {before}{number}{after}": "the first 4 KiB are poisoned, whatever was moved"
                for number in (1, -1)
                for where, before, after in (
                    ("SimQueue.fetch: self._take_buffer(ring, tag, 0)", "self._take_buffer(ring, tag, ", ")"),
                    ("SimQueue._get_data: self._take_buffer(ring, tag, 0)", "self._take_buffer(ring, tag, ", ")"),
                    ("SimQueue._end_request: moved = 0", "moved = ", ""),
                    (
                        "SimQueue._end_request: moved = request.length if request.op == _WRITE else 0",
                        "moved = request.length if request.op == _WRITE else ",
                        "",
                    ),
                )
            },
        },
        "ublk_trio.rpc.splitter": {
            "Splitter._skip_space: del self._buffer[:_end(_SPACE, self._buffer, 0)] -> del self._buffer[:_end(_SPACE, self._buffer, -1)]": (
                "a pattern that is to begin before the beginning begins there"
            ),
            "Splitter._find_bracket: while self._scanned < length -> while self._scanned <= length": (
                "at the end there is nothing to find, and the loop says so, too"
            ),
        },
        "ublk_trio.kernel_sim.server_end": {
            **{
                f"{function}: return 0 -> return {number}": "nobody looks at it: a generator of this type has to return something"
                for function in ("release", "_lose_server", "_end_work")
                for number in (1, -1)
            },
            "reset_for_recovery: device.update_delivery() -> pass": "`quiesced`, or `fails_all`, keeps the queues from delivering",
        },
        "ublk_trio.kernel_sim.tag": {
            "SimTag.reset: self.address = 0 -> self.address = 1": "a tag gets its address by FETCH_REQ before anything reads it",
            "SimTag.reset: self.address = 0 -> self.address = -1": "a tag gets its address by FETCH_REQ before anything reads it",
        },
        "ublk_trio.kernel_sim.uring_commands": {
            **{
                f"module: {name}: Final = io_opcode(IoCommand.{name}, ioctl_encoded=True) "
                f"-> {name}: Final = io_opcode(IoCommand.{name}, ioctl_encoded=False)": (
                    "a command above NEED_GET_DATA exists only encoded"
                )
                for name in ("PREP_IO_CMDS", "COMMIT_IO_CMDS", "FETCH_IO_CMDS")
            },
            "QueueCommands.__init__: self.kernel_holds: dict[int, int] = {} -> pass": "a raw ring's buffers are not watched",
            **dict.fromkeys(
                (
                    "QueueCommands._deliver: tag.sectors_copied = -1 -> tag.sectors_copied = -2",
                    "BatchCommands.prepare_delivery: tag.sectors_copied = -1 -> tag.sectors_copied = -2",
                ),
                "any negative number says the same",
            ),
            "QueueCommands.is_same_ring: return isinstance(other, QueueCommands) and other.ring is self.ring "
            "-> return other.ring is self.ring": "only raw rings register buffers: mypy asks",
            "QueueCommands.close: return -> pass": "without pending commands there is nothing to cancel",
            "BatchCommands.post_result: raise AssertionError('no tag has a command of its own') -> pass": (
                "guards what never happens"
            ),
        },
    }
)
