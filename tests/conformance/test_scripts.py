"""The conformance scripts by themselves, and on the simulator: no kernel needed.

`python -m tests.conformance` plays them on the real driver, too.
"""

from __future__ import annotations

import errno
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.conformance import guests, lockstep
from tests.conformance.__main__ import SEEN, corpus
from tests.conformance.divergences import DIVERGENCES, Divergence
from tests.conformance.features import FEATURES, coverage, sample
from tests.conformance.generator import generate
from tests.conformance.lockstep import Difference, Script
from tests.conformance.script import CONTROL, IO, ScriptError, expand
from tests.conformance.sim_arm import SimArm
from tests.conformance.simulated import simulated
from ublk_trio.kernel_sim import SimKernel
from ublk_trio.kernel_sim.queue import SimQueue

_RELEASES = [(6, 1), (6, 12), (6, 16), (7, 0), (7, 3)]
_SERVE = Script(
    name="serve",
    steps=("up d0", "app write d0 0 4096 fill=11", "commit @0", "io p0.a FETCH t=0", "app read d0 0 512", "commit @1 fill=22", "down d0"),
)  # fmt: skip

#: A command that ends well.
_TAKEN = re.compile(r"(?:^|\.\w+ )([A-Z0-9]+)\b[^=]* = \d")
#: Commands that are held until there is a request: the words that send them, where the same step delivers one, and a later step.
_DELIVERS = {"GETDATA": "getdata "}
_DELIVERS_LATER = {"FETCH": "fetch ", "COMMIT": "commit ", "MULTI": "batch p0.a MULTI"}

#: In place of a virtual machine: the first one's driver gets stuck.
_MACHINE = """
import sys
if "--after" in sys.argv:
    assert sys.argv[-2:] == ["--after", "b"], sys.argv
    print('{"7.3": {"c": "33"}}')
else:
    print("conformance: stuck at b: it does not die")
    print('{"7.3": {"a": "11"}}')
    sys.exit(3)
"""


@pytest.mark.parametrize("release", _RELEASES, ids=lambda release: "{}.{}".format(*release))
def test_corpus_plays(release: tuple[int, int]) -> None:
    """Every script plays on every release, and a second time shows the same."""
    for script in corpus():
        assert simulated(script, release) == simulated(script, release), script.name


@pytest.mark.parametrize("kernel", ["6.12", "7.3"])
def test_simulator_shows_what_was_seen(kernel: str) -> None:
    """What a real kernel has been seen to show, the simulator shows: no machine is needed to notice that it does not any more."""
    seen = json.loads(SEEN.read_text())[kernel]
    scripts = {script.name: script for script in corpus()}
    assert seen.keys() <= scripts.keys()
    assert len(seen) > 200
    major, minor = (int(word) for word in kernel.split("."))
    other = [name for name in seen if lockstep.digest(simulated(scripts[name], (major, minor))) != seen[name]]
    assert not other, (
        f"to see the difference: tests/kernel/vm.py run --kernel {kernel} -- ... -m tests.conformance --only NAME"
    )


def test_corpus_is_large_and_covers_every_feature() -> None:
    """At least 500 scripts are kept, each once, and each feature of the contract is exercised by one of them."""
    scripts = corpus()
    assert len(scripts) >= 500
    assert len({script.name for script in scripts}) == len(scripts)
    assert len({tuple(expand(script.steps)) for script in scripts}) == len(scripts)
    counts = coverage(scripts)
    assert counts.keys() == FEATURES.keys()
    assert not [name for name, count in counts.items() if not count]


def test_every_command_is_taken_in_some_script() -> None:
    """A command that is only ever refused is not exercised: each one comes to its good end, or delivers a request."""
    taken: set[str] = set()
    for script in corpus():
        steps = expand(script.steps)
        record = simulated(script, (7, 3))
        for step, seen in zip(steps, record, strict=True):
            taken.update(match[1] for text in seen if (match := _TAKEN.search(text)))
            if any(" delivers " in text for text in seen):
                taken.update(name for name, words in _DELIVERS.items() if words in step)
        if any(" delivers " in text for text in itertools.chain(*record)):
            taken.update(name for name, words in _DELIVERS_LATER.items() if any(words in step for step in steps))
    assert {*CONTROL, *IO} <= taken


def test_sample_covers_every_feature() -> None:
    """The part that is played in every run of the kernel tests leaves out no feature, and is bounded."""
    scripts = corpus()
    some = sample(scripts, every=10, besides=["copy-depth-one"])
    assert all(coverage(some).values())
    assert "copy-depth-one" in {script.name for script in some}
    assert some == [script for script in scripts if script in some]
    assert len(some) < len(scripts) / 6
    assert all(coverage(sample(scripts, every=len(scripts))).values())


def test_what_a_script_shows() -> None:
    """The simulator's observations are what the contract says, step by step."""
    shown = dict(zip(expand(_SERVE.steps), simulated(_SERVE, (7, 3)), strict=True))
    assert shown["ctl START d0"] == ["START d0 = 0"]
    assert shown["app write d0 0 4096 fill=11"] == ["p0.a delivers @0 WRITE 8@0 = 0 at=own 11*4096"]
    assert shown["commit @0"] == ["app 0 write = 4096"]
    assert shown["io p0.a FETCH t=0"] == ["p0.a FETCH = EBUSY"]
    assert shown["commit @1 fill=22"] == ["app 1 read = 512 22*512"]
    assert shown["ctl STOP d0"] == ["STOP d0 = 0", "p0.a aborts", "p0.a aborts"]
    assert shown["ctl DEL d0"] == ["DEL d0 = 0"]


def test_planted_errno_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that refuses with another errno than the expected one is told from it, at the very step."""
    monkeypatch.setattr(lockstep, "EXPECTED_SECONDS_MAX", 0.0)
    expected = simulated(_SERVE, (7, 3))
    assert lockstep.follow(_SERVE, expected, SimArm(SimKernel(partition_scan=False)))[1] is None

    original = SimQueue.command

    def planted(self: SimQueue, *arguments: Any, **options: Any) -> Any:
        result = original(self, *arguments, **options)
        return -errno.EINVAL if result == -errno.EBUSY else result

    monkeypatch.setattr(SimQueue, "command", planted)
    difference = lockstep.follow(_SERVE, expected, SimArm(SimKernel(partition_scan=False)))[1]
    assert difference is not None
    assert difference.step == "io p0.a FETCH t=0"
    assert (difference.expected, difference.shown) == (("p0.a FETCH = EBUSY",), ("p0.a FETCH = EINVAL",))


def test_lost_and_surplus_observations_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """What never comes is a difference, and so is what nobody expected."""
    monkeypatch.setattr(lockstep, "EXPECTED_SECONDS_MAX", 0.0)
    expected = simulated(_SERVE, (7, 3))
    steps = expand(_SERVE.steps)
    place = steps.index("commit @0")
    more = [*expected]
    more[place] = [*expected[place], "app 7 read = 512"]
    less = [*expected]
    less[place] = []
    for wanted in (more, less):
        difference = lockstep.follow(_SERVE, wanted, SimArm(SimKernel(partition_scan=False)))[1]
        assert difference is not None
        assert difference.step_number == place


def test_generator_is_reproducible() -> None:
    """A seed makes one script, for ever; different seeds make different ones."""
    assert [generate(seed) for seed in range(40)] == [generate(seed) for seed in range(40)]
    assert len({generate(seed).steps for seed in range(200)}) > 190


def test_generator_spares_drivers_that_would_get_stuck() -> None:
    """No FETCH_REQ while STOP_DEV waits for answers: on 7.3 neither would ever end."""
    for seed in range(400):
        steps = generate(seed).steps
        place = steps.index("ctl STOP d0") if "ctl STOP d0" in steps and "diskclose d0" not in steps else len(steps)
        assert not [step for step in steps[place:] if step.startswith("io p0.a FETCH t=@")], seed


def test_generator_answers_fua_writes_before_a_stop() -> None:
    """No FUA write that needs a flush after it is left for STOP_DEV to wait for: STOP_DEV would hold that flush back."""
    assert any("attrs=VOLATILE_CACHE" in step for step in generate(700003).steps)
    for seed in [*range(2000), 700003]:
        steps = generate(seed).steps
        begun = " ".join(steps)
        if "VOLATILE_CACHE" not in begun or "VOLATILE_CACHE|FUA" in begun or "ctl STOP d0" not in steps:
            continue
        if "diskclose d0" in steps or any(step.startswith("kill") for step in steps):
            continue
        operations = [step for step in steps if step.startswith("app ")]
        late = steps[steps.index("ctl STOP d0") :]
        for number, operation in enumerate(operations):
            if operation.startswith("app fua"):
                assert not [step for step in late if step.startswith(f"commit @{number}")], seed


def test_server_is_gone_before_a_deletion_that_waited_for_it_goes_on() -> None:
    """A killed server has closed its files before DEL_DEV_ASYNC goes on, so that the ADD_DEV behind it finds the id free."""
    script = next(script for script in corpus() if script.name == "seed-700010")
    assert any(line.startswith("ADD d1 = 0 ") for line in simulated(script, (6, 12))[-1])


def test_fresh_machine_goes_on_behind_a_stuck_script(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A driver that got stuck costs one script; the exit status tells, and what was seen on both machines is kept."""
    machine = tmp_path / "machine.py"
    machine.write_text(_MACHINE)
    seen = tmp_path / "seen.json"
    seen.write_text('{"6.12": {"a": "66"}}')
    monkeypatch.setattr(guests, "_VM", machine)
    monkeypatch.setattr(guests, "SEEN", seen)
    assert guests.main(["--kernel", "7.3", "--", "--digests"]) == 3
    assert json.loads(seen.read_text()) == {"6.12": {"a": "66"}, "7.3": {"a": "11", "c": "33"}}
    assert capfd.readouterr().out == "conformance: stuck at b: it does not die\n"


def test_script_in_error() -> None:
    """A step that says nothing sensible is our mistake, and named; one that names an absent request is not."""
    with pytest.raises(ScriptError, match="dance"):
        simulated(Script(name="", steps=("dance",)), (7, 3))
    with pytest.raises(ScriptError, match="ctl ADD"):
        simulated(Script(name="", steps=("ctl ADD d0 depth=many",)), (7, 3))
    assert simulated(Script(name="", steps=("commit @0",)), (7, 3)) == [["unbound @0"]]


def test_divergences_are_narrow() -> None:
    """An explanation covers its releases, its steps and its lines, and nothing more."""
    divergence = Divergence(
        name="x",
        reason="y",
        example="z",
        since=(6, 2),
        before=(7, 0),
        step="ctl STOP .*",
        simulated="STOP d0 = 0",
        real="STOP d0 = EINTR",
    )

    def difference(step: str, expected: tuple[str, ...], shown: tuple[str, ...]) -> Difference:
        return Difference(script="s", step_number=0, step=step, expected=expected, shown=shown)

    real = ("STOP d0 = EINTR",)
    assert divergence.explains(difference("ctl STOP d0", ("STOP d0 = 0",), real), (6, 12))
    assert divergence.explains(difference("ctl STOP d0", (), real), (6, 12))
    assert not divergence.explains(difference("ctl STOP d0", (), real), (7, 0))
    assert not divergence.explains(difference("ctl STOP d0", (), real), (6, 1))
    assert not divergence.explains(difference("ctl START d0", (), real), (6, 12))
    assert not divergence.explains(difference("ctl STOP d0", (), (*real, "app 0 read = EIO")), (6, 12))
    assert not divergence.explains(difference("ctl STOP d0", ("STOP d0 = 00",), real), (6, 12))


def test_divergences_have_reasons() -> None:
    """Every explanation says why, names a script that shows it, and has a name of its own."""
    assert {divergence.example for divergence in DIVERGENCES} <= {script.name for script in corpus()}
    assert all(len(divergence.reason) > 40 for divergence in DIVERGENCES)
    assert len({divergence.name for divergence in DIVERGENCES}) == len(DIVERGENCES)
