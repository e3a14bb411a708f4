"""Two arms in step: what the first one shows at each step is what is waited for, and demanded, of the second.

The first arm is the simulator (or a record of what a kernel has shown): whatever can happen has happened when a call
returns. The second takes its time; so after each step it is asked until it has shown what is expected, for at most
`EXPECTED_SECONDS_MAX`. Where nothing more is expected it is left to settle, and whatever comes too much counts against
the step where it is found.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs

from tests.conformance.script import Arm, Run, Unbound, Words, expand

EXPECTED_SECONDS_MAX = 8.0
_POLL_SECONDS = 0.001
_REPEAT_SECONDS = 0.02
#: A task's work is done when its ring is looked at, and may give another ring or the disk something to show.
_ROUNDS_MAX = 400
_PATIENCE = 12


@attrs.frozen(kw_only=True)
class Script:
    """One script of the corpus."""

    name: str
    steps: tuple[str, ...]
    #: The disk's partition table is read when it starts: a `serve` step answers that.
    scan: bool = False
    #: The first release on which it does no harm: older ones would break, or hang for ever.
    since: tuple[int, int] = (6, 0)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Script:
        major, minor = (int(word) for word in fields.get("since", "6.0").split("."))
        return cls(
            name=fields["name"], steps=tuple(fields["steps"]), scan=fields.get("scan", False), since=(major, minor)
        )

    def to_json(self) -> str:
        fields: dict[str, Any] = {"name": self.name}
        if self.scan:
            fields["scan"] = True
        if self.since > (6, 0):
            fields["since"] = "{}.{}".format(*self.since)
        return json.dumps({**fields, "steps": self.steps})


def load(path: Path) -> list[Script]:
    """The scripts of a file, one a line."""
    return [Script.from_json(json.loads(line)) for line in path.read_text().splitlines() if line]


@attrs.frozen(kw_only=True)
class Difference:
    """What two arms do not agree on."""

    script: str
    step_number: int
    step: str
    expected: tuple[str, ...]
    shown: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{self.script}, step {self.step_number}: {self.step}"]
        lines += [f"    simulated, not real: {text}" for text in self.expected]
        lines += [f"    real, not simulated: {text}" for text in self.shown]
        return "\n".join(lines)


#: What was seen at each step, sorted.
Record = list[list[str]]


def digest(record: Record) -> str:
    """A record in few letters, the same for equal ones only."""
    return hashlib.sha256(json.dumps(record).encode()).hexdigest()[:16]


def play(script: Script, arm: Arm) -> Record:
    """Play it on an arm that answers at once."""
    run = Run(arm)
    record: Record = []
    for step in expand(script.steps):
        seen = run.step(step)
        words = Words.of(step)
        quiet = 0
        for _round in range(_ROUNDS_MAX):
            came = run.collect(scanning=script.scan)
            seen += came
            served = words.verb == "serve" and _serve(run, words)
            quiet = 0 if came or served else quiet + 1
            if quiet == 2:
                break
        record.append(sorted(seen))
    return record


def _serve(run: Run, words: Words) -> bool:
    try:
        return run.serve(words.objects[0])
    except Unbound:
        return False


def follow(script: Script, expected: Record, arm: Arm) -> tuple[Record, Difference | None]:
    """Play it on an arm that takes its time, until it shows something else than is expected."""
    run = Run(arm)
    record: Record = []
    steps = expand(script.steps)
    for number, (step, wanted, following) in enumerate(zip(steps, expected, [*steps[1:], "end"], strict=True)):
        seen = _shown(run, step, wanted, scanning=script.scan, settles=_must_settle(step, wanted, following))
        record.append(sorted(seen))
        lacking, extra = Counter(wanted) - Counter(seen), Counter(seen) - Counter(wanted)
        if lacking or extra:
            return record, Difference(
                script=script.name, step_number=number, step=step, expected=tuple(sorted(lacking.elements())),
                shown=tuple(sorted(extra.elements())),
            )  # fmt: skip
    return record, None


def _shown(run: Run, step: str, wanted: Sequence[str], *, scanning: bool, settles: bool) -> list[str]:
    """Do a step, and look until it has shown what is wanted, or something else."""
    deadline = time.monotonic() + EXPECTED_SECONDS_MAX
    words = Words.of(step)
    seen = run.step(step)
    settled = not settles
    while True:
        came = run.collect(scanning=scanning)
        seen += came
        if words.verb == "serve" and _serve(run, words):
            continue
        lacking, extra = Counter(wanted) - Counter(seen), Counter(seen) - Counter(wanted)
        late = time.monotonic() > deadline
        if extra:
            if late or not _can_be_repeated(words, lacking, extra):
                return seen
            # The kernel's own work is not done yet: ask again.
            seen = [text for text in seen if text not in extra]
            time.sleep(_REPEAT_SECONDS)
            seen += run.step(step)
        elif lacking:
            if late:
                return seen
            time.sleep(_POLL_SECONDS)
        elif settled:
            return seen
        else:
            run.arm.settle()
            settled = True


def watch(script: Script, arm: Arm) -> Record:
    """Play it on an arm that takes its time, with nothing to compare with: each step until there is rest."""
    run = Run(arm)
    record: Record = []
    for step in expand(script.steps):
        words = Words.of(step)
        seen = run.step(step)
        quiet = 0
        # A command that the kernel is at work on sleeps as one does that it holds.
        while quiet < (_PATIENCE if run.held else 2):
            arm.settle()
            came = run.collect(scanning=script.scan)
            seen += came
            served = words.verb == "serve" and _serve(run, words)
            quiet = 0 if came or served else quiet + 1
        record.append(sorted(seen))
    return record


def _can_be_repeated(words: Words, lacking: Counter[str], extra: Counter[str]) -> bool:
    """Whether the step only asks, and has been answered, but not as expected."""
    if len(lacking) != 1 or len(extra) != 1:
        return False
    (text,) = extra
    if words.verb == "ctl" and words.objects[0] in ("INFO", "INFO2"):
        return text.startswith(f"{words.objects[0]} {words.objects[1]} ")
    return words.verb in ("open", "diskopen") and text.startswith(words.verb)


def _must_settle(step: str, wanted: Sequence[str], following: str) -> bool:
    """Whether a step's effect is shown by nothing, and may be late for the next step.

    What a task sends, the kernel looks at before the system call returns. A disk's operation is a thread of its own, a control
    command may be a worker's work, and what ends goes through many hands.
    """
    verb = Words.of(step).verb
    if wanted and verb != "serve":
        return False
    if verb in ("kill", "closering", "close", "unmap", "diskclose"):
        return Words.of(following).verb not in ("unmap", "closering", "close", "diskclose", "end") and (
            not following.startswith("ctl INFO")
        )
    return verb in ("app", "ctl", "serve")
