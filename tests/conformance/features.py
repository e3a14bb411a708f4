"""The contract's features, each with a pattern that a script's steps show when they exercise it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from tests.conformance.lockstep import Script
from tests.conformance.script import CONTROL, expand

_FLAGS = (
    "SUPPORT_ZERO_COPY", "NEED_GET_DATA", "USER_RECOVERY", "USER_RECOVERY_REISSUE", "USER_COPY", "ZONED",
    "USER_RECOVERY_FAIL_IO", "UPDATE_SIZE", "AUTO_BUF_REG", "QUIESCE", "PER_IO_DAEMON", "BATCH_IO", "INTEGRITY",
    "SAFE_STOP_DEV", "NO_AUTO_PART_SCAN", "SHMEM_ZC", "IO_DESC_SIZE", "UNPRIVILEGED_DEV",
)  # fmt: skip

#: Name -> a regular expression over a script's steps, one a line.
FEATURES: Final[Mapping[str, str]] = {
    **{f"command {name}": rf"^ctl {name} " for name in CONTROL},
    **{f"flag {flag}": rf"flags=(\S*\|)?{flag}(\||\s|$)" for flag in _FLAGS},
    "FETCH_REQ": r"^(fetch|io \S+ FETCH)",
    "COMMIT_AND_FETCH_REQ": r"^(commit|io \S+ COMMIT)",
    "NEED_GET_DATA": r"^(getdata|io \S+ GETDATA)",
    "REGISTER_IO_BUF": r"^(register on|io \S+ REGISTER)",
    "UNREGISTER_IO_BUF": r"^(register off|io \S+ UNREGISTER)",
    "PREP_IO_CMDS": r"^batch \S+ PREP",
    "COMMIT_IO_CMDS": r"^batch \S+ BCOMMIT",
    "FETCH_IO_CMDS": r"^batch \S+ MULTI",
    "unknown I/O command": r"^io \S+ 0x",
    "unknown control command": r"^ctl 0x",
    "legacy encoding": r"enc=legacy",
    "wrong ioctl type": r"enc=bad",
    "ring without SQE128": r"^ctl .* narrow",
    "user copy, from a WRITE": r"^pread .*@",
    "user copy, into a READ": r"^pwrite .*@",
    "user copy, integrity": r"^p(read|write) .*integrity=",
    "fixed-buffer I/O": r"^fixed ",
    "automatic registration, fallback": r"auto=1",
    "registered memory": r"^app .* mem=",
    "wrong task": r"by=p0\.b|^io p0\.b",
    "wrong tag": r"^io .* t=[5-9]",
    "wrong queue": r"^io .* q=[2-9]",
    "double fetch": r"^io \S+ FETCH t=(~|@)",
    "commit of an idle tag": r"^io \S+ COMMIT t=~",
    "address 0": r"^io .* at=0",
    "address of nothing": r"at=bad",
    "wrong pid": r"^ctl START .*pid=(wrong|zero|negative|p1)",
    "map, wrongly": r"^map .*(off=|len=| w)",
    "second opener": r"^open p1 d0",
    "two queues": r"queues=2",
    "split request": r"max=8|chunk=",
    "read": r"^app read",
    "write": r"^app write",
    "FUA": r"^app fua",
    "flush": r"^app flush",
    "discard": r"^app discard",
    "write zeroes": r"^app zeroes",
    "punch a hole": r"^app punch",
    "zone operations": r"^app zone-",
    "report of zones": r"^zones",
    "user's process": r"^proc .* user",
    "short result": r"^commit .* res=[1-9]\d*",
    "failed request": r"^commit .* res=E",
    "server killed": r"^kill p0",
    "ring closed": r"^closering",
    "stop in the middle": r"^app (?:(?!^diskclose)[\s\S])*^ctl STOP",
    "partition scan": r"^serve",
    "parameter DISCARD": r"^ctl SET .*discard=",
    "parameter DEVT": r"^ctl SET .*devt",
    "parameter ZONED": r"^ctl SET .*zoned=",
    "parameter DMA_ALIGN": r"^ctl SET .*dma=",
    "parameter SEGMENT": r"^ctl SET .*segment=",
    "parameter INTEGRITY": r"^ctl SET .*integrity=",
}


def coverage(scripts: Iterable[Script]) -> dict[str, int]:
    """For each feature, how many scripts exercise it."""
    exercised = [_exercised(script) for script in scripts]
    return {name: sum(name in features for features in exercised) for name in FEATURES}


def sample(scripts: Sequence[Script], *, every: int, besides: Iterable[str] = ()) -> list[Script]:
    """A part that exercises each feature that the whole does: every so manieth script, those named, and what is needed still."""
    chosen = {script.name for script in scripts[::every]} | set(besides)
    reached = {name for script in scripts if script.name in chosen for name in _exercised(script)}
    for script in scripts:
        features = _exercised(script)
        if not features <= reached:
            chosen.add(script.name)
            reached |= features
    return [script for script in scripts if script.name in chosen]


def _exercised(script: Script) -> set[str]:
    text = "\n".join(expand(script.steps))
    return {name for name, pattern in FEATURES.items() if re.search(pattern, text, re.MULTILINE)}
