"""Seeded random scripts: valid progress of a server, its disk and its end, with wrong commands strewn in.

The grammar knows roughly what goes on (what was fetched, which operations wait for an answer), so that most scripts get
somewhere; it need not know exactly, because a step that names what is not there is "unbound" on both arms.

What it leaves out, because a release breaks on it, or hangs, or answers by chance:

- START_DEV of a device that had been stopped (6.12 uses freed commands then).
- The end of a ring or process whose queue was fetched only in part (6.12 never cancels those commands).
- The end of a process that owns every tag of a queue (6.12 notices only after 30 seconds).
- The end of a process whose ring has the buffer of a request registered that was committed (7.3: the ring waits for its
  command, the command for the request, and the request for the ring to let go of the buffer).
- FETCH_REQ while STOP_DEV waits for answers (7.3: the command sleeps until STOP_DEV is through, and STOP_DEV waits for what
  that same task would have answered; neither ends, and not even SIGKILL helps).
- A write that STOP_DEV of a device with recovery waits for, and that needs a flush after it (FUA on a disk with a cache and
  without FUA of its own; by the source of 6.12 and 7.3 without an I/O scheduler): the flush waits for STOP_DEV, STOP_DEV for
  the write, and on 7.3 the write's tag keeps its command, so that a killed server's ring never ends.
- A READ's result above its length (a warning in the kernel's log), and GET_DATA to nowhere (tried for ever).
- A tag by its number while there are requests: which one has which is the kernel's choice.
- More operations at once than there are tags: who waits longest need not be the first to get one.
- Two discards, zeroings or flushes at a time: the second is held back (by the disk's lock for such calls, by writeback
  throttling, by the flush machinery).
"""

from __future__ import annotations

import random
from collections.abc import Callable

from tests.conformance.lockstep import Script

#: Operations lie in places of their own, so that a request tells which one it belongs to.
_PLACE_BYTES = 64 << 10
_PLACES = 16
_ALONE = frozenset({"discard", "zeroes", "punch", "flush", "fua"})
_ERRORS = ("EIO", "ENOSPC", "EOPNOTSUPP", "ETIMEDOUT", "ENOLINK", "ENODATA", "EILSEQ", "ENOMEM", "EPERM", "EAGAIN")
_MODES = (
    ("", ""),
    ("", ""),
    ("NEED_GET_DATA", ""),
    ("USER_COPY", ""),
    ("SUPPORT_ZERO_COPY", "fixed=4"),
    ("AUTO_BUF_REG", "fixed=8"),
    ("USER_COPY|SUPPORT_ZERO_COPY", "fixed=4"),
    ("NEED_GET_DATA|USER_COPY", ""),
)
_RECOVERY = (
    "",
    "",
    "USER_RECOVERY",
    "USER_RECOVERY|USER_RECOVERY_REISSUE",
    "USER_RECOVERY|USER_RECOVERY_FAIL_IO",
    "USER_RECOVERY|QUIESCE",
)
_EXTRAS = ("", "", "", "UPDATE_SIZE", "PER_IO_DAEMON", "NO_AUTO_PART_SCAN", "SAFE_STOP_DEV", "IO_DESC_SIZE")
_WRONG_ADD = (
    "depth=0", "depth=5000", "queues=0", "queues=5000", "q=0", "q=7", "len=10", "len=63", "at=0", "at=bad", "id=5 want=6",
    "id=1048576", "flags=USER_RECOVERY_REISSUE", "flags=USER_RECOVERY_FAIL_IO", "flags=QUIESCE", "flags=INTEGRITY",
    "flags=IO_DESC_SIZE desc=20", "flags=IO_DESC_SIZE desc=1000", "enc=bad", "narrow",
)  # fmt: skip
_WRONG_SET = (
    "nobasic", "lbs=8", "lbs=13 pbs=13", "lbs=12 pbs=9", "max=7", "max=0", "max=65", "pbs=29", "opt=30", "min=31", "devt",
    "types=0", "len=8", "plen=0", "plen=500", "at=0", "at=bad", "discard=0,0,64,0,1", "discard=0,4096,64,0,2",
    "zoned=1,1,8", "dma=4096", "dma=5", "segment=4094,4096,1", "segment=4095,100,1", "segment=2047,4096,1",
    "integrity=9,8,0", "types=0x100",
)  # fmt: skip
_RIGHT_SET = (
    "", "", "attrs=VOLATILE_CACHE", "attrs=VOLATILE_CACHE|FUA", "attrs=FUA", "attrs=ROTATIONAL", "pbs=9", "lbs=12",
    "discard=0,4096,64,64,1", "attrs=VOLATILE_CACHE discard=0,4096,32,32,1", "max=8", "max=16", "chunk=32", "dma=511",
    "segment=4095,4096,8", "opt=16 min=12", "vb=4095",
)  # fmt: skip
_ASKING = (
    "ctl INFO d0", "ctl GET d0", "ctl GET d0 plen=40", "ctl GET d0 len=8", "ctl AFFINITY d0 data=0",
    "ctl AFFINITY d0 data=9", "ctl AFFINITY d0 len=4", "ctl INFO2 d0", "ctl INFO2 d0 path=/dev/ublk-control",
    "ctl INFO2 d0 pathlen=0", "ctl FEATURES d0", "ctl INFO d0 len=10", "ctl INFO d0 at=bad", "ctl GET d0 at=bad",
    "ctl INFO d0 enc=legacy", "ctl INFO d0 enc=bad",
)  # fmt: skip
_REFUSED_LIVE = (
    "ctl START d0", "ctl START d0 pid=zero", "ctl START d0 pid=negative", "ctl SET d0", "ctl SET d0 max=1",
    "ctl RECOVER d0", "ctl RECOVERED d0", "ctl 0x40 d0", "ctl 0x03 d0", "ctl ADD d1 id=0", "ctl TRYSTOP d0",
    "ctl UNREG d0 data=0", "ctl REG d0 size=100", "ctl START d9", "ctl STOP d9", "ctl DEL d9", "proc p1;open p1 d0",
    "map p0 q=5", "map p0 w", "map p0 len=65536", "map p0 off=4096",
)  # fmt: skip
_WRONG_IO = (
    "io p0.a FETCH t=~", "io p0.a FETCH t=~", "io p0.a FETCH t=99", "io p0.a FETCH q=9 t=0", "io p0.b FETCH t=~",
    "io p0.a COMMIT t=~ res=0", "io p0.a COMMIT t=~ res=4096", "io p0.b COMMIT t=~", "io p0.a COMMIT t=77",
    "io p0.a COMMIT q=3 t=0", "io p0.a GETDATA t=~", "io p0.a GETDATA t=88", "io p0.a REGISTER t=~ index=0",
    "io p0.a UNREGISTER t=~ index=3", "io p0.a UNREGISTER t=~ index=99", "io p0.a 0x28 t=~", "io p0.a 0x2f t=~",
    "io p0.a FETCH t=~ enc=bad", "io p0.a COMMIT t=~ enc=bad", "io p0.a PREP t=~", "io p0.a MULTI t=~",
    "io p0.a FETCH t=~ at=0", "io p0.a FETCH t=~ at=bad",
)  # fmt: skip
_WRONG_OWNED = (
    "io p0.a FETCH t={0}", "io p0.b COMMIT t={0} res=512", "io p0.a 0x2f t={0}", "commit {0} by=p0.b",
    "io p0.a COMMIT t={0} enc=bad", "io p0.b GETDATA t={0}", "io p0.a PREP t={0}",
)  # fmt: skip
_WRONG_FETCH = _WRONG_OWNED[0]


class _Author:
    """Writes one script."""

    def __init__(self, draw: random.Random) -> None:
        self.draw = draw
        self.steps: list[str] = []
        self.server = "p0"
        self.servers = 1
        self.operations = 0
        #: STOP_DEV was sent, and waits for answers.
        self.stopping = False
        #: Operations that wait for an answer, by number: their kind.
        self.waiting: dict[int, str] = {}
        mode, self.ring = draw.choice(_MODES)
        self.mode = mode
        self.recovery = draw.choice(_RECOVERY)
        self.depth = draw.choice((2, 2, 3, 4))
        self.queues = draw.choice((1, 1, 1, 2))
        extra = draw.choice(_EXTRAS)
        flags = "|".join(filter(None, (mode, self.recovery, extra)))
        self.add_options = " ".join(
            filter(
                None,
                (
                    f"depth={self.depth}",
                    f"queues={self.queues}" if self.queues > 1 else "",
                    f"flags={flags}" if flags else "",
                    f"desc={draw.choice((24, 32, 64))}" if extra == "IO_DESC_SIZE" else "",
                ),
            )
        )
        self.set_options = draw.choice(_RIGHT_SET)
        #: A FUA write is a write and a flush for the server.
        self.flushes_after_fua = "VOLATILE_CACHE" in self.set_options and "FUA" not in self.set_options

    def say(self, *steps: str) -> None:
        for step in steps:
            self.steps += step.split(";")

    def maybe(self, chance: float, *choices: str) -> None:
        if self.draw.random() < chance:
            self.say(self.draw.choice(choices))

    # ------------------------------------------------------------------ the beginning

    def bring_up(self) -> None:
        if self.draw.random() < 0.5:
            ring = f" ring={self.ring}" if self.ring else ""
            self.say(f"up d0 {self.add_options}{ring} / {self.set_options}".rstrip(" /"))
            return
        for _ in range(self.draw.randrange(3)):
            self.say(f"ctl ADD d1 {self.draw.choice(_WRONG_ADD)}")
        self.say(f"ctl ADD d0 {self.add_options}")
        self.maybe(0.5, *_ASKING)
        self.maybe(
            0.2, "ctl START d0 pid=zero", "ctl RECOVER d0", "ctl SIZE d0 data=64", "ctl QUIESCE d0", "ctl TRYSTOP d0"
        )
        for _ in range(self.draw.randrange(3)):
            self.say(f"ctl SET d0 {self.draw.choice(_WRONG_SET)}")
        self.maybe(0.3, "ctl GET d0", "ctl GET d0 plen=1000", "ctl GET d0 plen=20")
        self.say(f"ctl SET d0 {self.set_options}".rstrip())
        self.say("open p0 d0")
        self.maybe(0.3, "proc p1;open p1 d0", "map p0 q=5", "map p0 w", "map p0 len=65536", "map p0 off=4096")
        self.say(*(f"map p0 q={queue}" for queue in range(self.queues)))
        waits = self.draw.random() < 0.2
        if waits:
            self.say("ctl START d0")
        for queue in range(self.queues):
            task = f"p0.{'ab'[queue]}"
            if self.ring:
                self.say(f"ring {task} {self.ring}")
            self.maybe(
                0.2,
                f"io {task} FETCH q={queue} t=50",
                f"io {task} COMMIT q={queue} t=0",
                f"io {task} 0x2e q={queue} t=0",
            )
            self.say(f"fetch {task} q={queue}")
        self.maybe(0.2, "io p0.a FETCH t=0", "io p0.a COMMIT t=0", "io p0.a GETDATA t=0", "ctl START d0 pid=zero")
        if not waits:
            self.say("ctl START d0")
        self.say("diskopen d0")

    # ------------------------------------------------------------------ the middle

    def operate(self) -> None:
        # A tag of every queue stays idle, whichever queue the kernel picks.
        if len(self.waiting) >= self.depth - 1 or self.operations >= _PLACES:
            self.answer()
            return
        kind = self.draw.choice(("read", "read", "write", "write", "fua", "flush", "discard", "zeroes", "punch"))
        if kind in _ALONE and _ALONE & {*self.waiting.values()}:
            kind = "read"
        cpu = self.draw.choice((0, 3)) if self.queues > 1 else 0
        place = self.operations * _PLACE_BYTES
        # More than a request's worth only where there are tags for all parts.
        lengths = (512, 4096, 4096, 8192) if "max=8" not in self.set_options else (512, 4096, 4096)
        offset, length = place + self.draw.choice((0, 0, 4096)), self.draw.choice(lengths)
        if self.draw.random() < 0.05:
            offset += 100
        if kind == "flush":
            offset = length = 0
        fill = f" fill={self.draw.randrange(1, 256):02x}" if kind in ("write", "fua") else ""
        self.say(f"app {kind} d0 {offset} {length}{fill} cpu={cpu}")
        self.waiting[self.operations] = kind
        self.operations += 1

    def answer(self) -> None:
        if self.waiting:
            self.answer_to(self.draw.choice(sorted(self.waiting)))

    def answer_to(self, number: int) -> None:
        kind = self.waiting[number]
        request = f"@{number}"
        if self.draw.random() < 0.15 and self.server == "p0":
            wrong = self.draw.choice(_WRONG_OWNED)
            if not (self.stopping and wrong == _WRONG_FETCH):
                self.say(wrong.format(request))
        if "NEED_GET_DATA" in self.mode and kind in ("write", "fua", "zeroes", "punch") and self.draw.random() < 0.9:
            self.say(f"getdata {request}")
        if "USER_COPY" in self.mode and self.draw.random() < 0.7:
            self.user_copy(request, kind)
        if "ZERO_COPY" in self.mode and self.draw.random() < 0.6:
            index = self.draw.randrange(5)
            self.say(f"register on {request} index={index}")
            self.maybe(
                0.3,
                f"io {self.server}.a UNREGISTER t=~ index={self.draw.randrange(9)}",
                f"register on {request} index={index}",
            )
            self.say(f"register off {request} index={index}")
        chance = self.draw.random()
        fill = f" fill={self.draw.randrange(256):02x}"
        if chance < 0.6:
            self.say(f"commit {request}{fill}")
        elif chance < 0.75:
            self.say(f"commit {request} res={self.draw.choice(_ERRORS)}")
        elif chance < 0.85:
            self.say(f"commit {request} res=512{fill}", f"commit {request}{fill}")
        elif chance < 0.9:
            self.say(f"commit {request} res=0", f"commit {request}{fill}")
        else:
            self.say(f"io {self.server}.a COMMIT t={request} at=0 res=512", f"commit {request}{fill}")
        # A FUA write and a write-zeroes that is refused go on.
        if kind in ("fua", "zeroes", "punch"):
            self.say(f"commit {request}", f"commit {request}")
        del self.waiting[number]

    def user_copy(self, request: str, kind: str) -> None:
        verb = "pread" if (kind != "read") ^ (self.draw.random() < 0.15) else "pwrite"
        offset, length = self.draw.choice((0, 512, 4096, 9000)), self.draw.choice((512, 4096, 1))
        fill = f" fill={self.draw.randrange(256):02x}" if verb == "pwrite" else ""
        self.say(f"{verb} {self.server} {request} {offset} {length}{fill}")

    def go_on(self, steps: int) -> None:
        for _ in range(steps):
            chance = self.draw.random()
            if chance < 0.4:
                self.operate()
            elif chance < 0.7:
                self.answer()
            elif chance < 0.85 and self.server == "p0":
                self.say(self.draw.choice(_WRONG_IO))
            elif chance < 0.93:
                self.say(self.draw.choice(_ASKING))
            elif self.server == "p0":
                self.say(self.draw.choice(_REFUSED_LIVE))

    # ------------------------------------------------------------------ the end

    def end(self) -> None:
        endings: list[Callable[[], None]] = [self.stop, self.stop_busy, self.kill, self.kill, self.delete, self.quiesce]
        self.draw.choice(endings)()

    def answer_all(self) -> None:
        while self.waiting:
            self.answer()

    def stop(self) -> None:
        self.answer_all()
        self.say("diskclose d0")
        self.say(self.draw.choice(("ctl STOP d0", "ctl TRYSTOP d0")))
        self.say("ctl INFO d0")
        self.maybe(
            0.4, "ctl STOP d0", "ctl TRYSTOP d0", "ctl SET d0", "ctl GET d0", "io p0.a FETCH t=0", "ctl QUIESCE d0"
        )

    def stop_busy(self) -> None:
        if not self.waiting:
            self.operate()
        if self.flushes_after_fua:
            for number in [number for number, kind in self.waiting.items() if kind == "fua"]:
                self.answer_to(number)
        self.say("ctl STOP d0")
        self.stopping = True
        self.answer_all()
        self.say("ctl INFO d0")
        self.maybe(0.3, "app read d0 0 4096", "app write d0 0 4096", "diskclose d0;ctl INFO d0")

    def kill(self) -> None:
        self.say(f"kill {self.server}", "ctl INFO d0")
        if not self.recovery or self.servers > 2:
            self.maybe(0.5, "ctl RECOVER d0", "ctl RECOVERED d0 pid=wrong", "app read d0 0 4096", "ctl TRYSTOP d0")
            return
        if self.draw.random() < 0.25:
            self.maybe(0.5, f"app read d0 {15 * _PLACE_BYTES} 4096")
            self.say("ctl STOP d0", "ctl INFO d0")
            return
        if self.draw.random() < 0.2:
            self.say("ctl RECOVER d9")
        self.say("ctl RECOVER d0")
        self.maybe(0.2, "ctl RECOVER d0", "ctl QUIESCE d0", "ctl GET d0", "ctl SET d0")
        self.servers += 1
        new = self.server = f"p{self.servers}"
        self.say(f"proc {new}", f"open {new} d0")
        self.say(*(f"map {new} q={queue}" for queue in range(self.queues)))
        for queue in range(self.queues):
            if self.ring:
                self.say(f"ring {new}.{'ab'[queue]} {self.ring}")
            self.say(f"fetch {new}.{'ab'[queue]} q={queue}")
        self.say(f"ctl RECOVERED d0 pid={new}", "ctl INFO d0")
        if "REISSUE" not in self.recovery:
            self.waiting.clear()
        self.go_on(3)
        self.end()

    def delete(self) -> None:
        self.answer_all()
        self.say("diskclose d0", self.draw.choice(("ctl DEL d0", "ctl DELASYNC d0")))
        self.maybe(0.5, "ctl INFO d0", "ctl ADD d1 id=0", "ctl DEL d0", "ctl STOP d0")
        if self.draw.random() < 0.5:
            self.say(f"kill {self.server}")
        else:
            self.say(*(f"unmap {self.server} q={queue}" for queue in range(self.queues)))
            self.say(
                *(f"closering {self.server}.{'ab'[queue]}" for queue in range(self.queues)), f"close {self.server}"
            )

    def quiesce(self) -> None:
        self.say("ctl QUIESCE d0", "ctl INFO d0")
        if self.draw.random() < 0.5:
            self.answer_all()
        self.kill()


def generate(seed: int) -> Script:
    """The script of a seed: the same on every machine and Python."""
    author = _Author(random.Random(f"conformance {seed}"))
    author.bring_up()
    author.go_on(author.draw.randrange(2, 10))
    author.end()
    return Script(name=f"seed-{seed}", steps=tuple(author.steps))
