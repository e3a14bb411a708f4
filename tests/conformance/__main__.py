"""Run the corpus, and fresh scripts, on this machine's kernel: ``python -m tests.conformance``, as root.

    python -m tests.conformance [FILE...] [--only REGEX] [--fresh N [--seed N]] [--after NAME] [--shrink] [--coverage] [--record]
        [--digests] [--verbose]

Without files: the whole corpus. Each script is played on the simulator, as the release that runs here, and followed on
the real driver. Exit status 1 when they differ in a way that `divergences` does not explain, or when an explanation
explains nothing any more; 3 when this machine's driver got stuck at a script: those that come after it were not run.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from tests.conformance import lockstep
from tests.conformance.divergences import DIVERGENCES
from tests.conformance.features import coverage
from tests.conformance.generator import generate
from tests.conformance.lockstep import Difference, Script
from tests.conformance.real_arm import RealArm, Wedged
from tests.conformance.simulated import simulated

CORPUS = Path(__file__).with_name("corpus")
#: What real kernels were seen to show, in few letters: kernel -> script -> `lockstep.digest`.
SEEN = CORPUS / "seen.json"
DIFFERENT, STUCK = 1, 3


def corpus() -> list[Script]:
    """Every script that is kept."""
    return [script for path in sorted(CORPUS.glob("*.jsonl")) for script in lockstep.load(path)]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description="Conformance with this kernel.")
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE")
    parser.add_argument("--only", default="", metavar="REGEX", help="scripts with such a name")
    parser.add_argument("--fresh", type=int, default=0, metavar="N", help="so many new scripts besides")
    parser.add_argument("--seed", type=int, metavar="N", help="of the first of them (default: by chance; printed)")
    parser.add_argument("--after", metavar="NAME", help="only those that come after this script")
    parser.add_argument(
        "--shrink", action="store_true", help="leave out of a script that differs what it does not need"
    )
    parser.add_argument(
        "--coverage", action="store_true", help="print how many scripts exercise each feature, run none"
    )
    parser.add_argument("--record", action="store_true", help="print what the real driver shows, compare nothing")
    parser.add_argument("--digests", action="store_true", help="end with a line of JSON for corpus/seen.json")
    parser.add_argument("--verbose", action="store_true", help="a line for each script")
    return parser


def main(arguments: Sequence[str]) -> int:
    asked = build_parser().parse_args(arguments)
    scripts = [script for path in asked.files for script in lockstep.load(path)] if asked.files else corpus()
    scripts = [script for script in scripts if re.search(asked.only, script.name)]
    if asked.fresh:
        seed = asked.seed if asked.seed is not None else random.SystemRandom().randrange(1 << 40)
        print(f"conformance: {asked.fresh} fresh scripts: --fresh {asked.fresh} --seed {seed}", flush=True)
        scripts += [generate(seed + number) for number in range(asked.fresh)]
    if asked.after is not None:
        scripts = scripts[[script.name for script in scripts].index(asked.after) + 1 :]
    if asked.coverage:
        return print_coverage(scripts)
    arm = RealArm()
    try:
        if asked.record:
            return record(scripts, arm)
        whole = not asked.files and not asked.only and asked.after is None
        comparison = Comparison(arm, verbose=asked.verbose, shrink=asked.shrink)
        status = comparison.run(scripts, whole=whole)
        if asked.digests:
            kept = {script.name for script in corpus()}
            seen = {name: digest for name, digest in comparison.seen.items() if name in kept}
            print(json.dumps({"{}.{}".format(*arm.release): seen}))
        return status
    finally:
        arm.close()


def print_coverage(scripts: Sequence[Script]) -> int:
    counts = coverage(scripts)
    for name, count in counts.items():
        print(f"{name:32} {count:5}")
    return 0 if all(counts.values()) else DIFFERENT


def record(scripts: Iterable[Script], arm: RealArm) -> int:
    """What this kernel shows, as lines of JSON on stdout."""
    for script in scripts:
        if arm.release < script.since:
            continue
        began = time.monotonic()
        shown = lockstep.watch(script, arm)
        problems = arm.clean()
        seconds = round(time.monotonic() - began, 2)
        print(json.dumps({"name": script.name, "seconds": seconds, "shown": shown, "left": problems}), flush=True)
    return 0


class Comparison:
    """Scripts on both arms."""

    def __init__(self, arm: RealArm, *, verbose: bool = False, shrink: bool = False) -> None:
        self.arm = arm
        self.verbose = verbose
        self.shrink = shrink
        self.explained: dict[str, int] = {divergence.name: 0 for divergence in DIVERGENCES}
        self.played: list[str] = []
        #: Of the scripts that agree: what both showed, in few letters.
        self.seen: dict[str, str] = {}

    def compare(self, script: Script) -> Difference | None:
        """One script on both."""
        expected = simulated(script, self.arm.release, legacy_opcodes=self.arm.legacy_opcodes, cpus=self.arm.cpus)
        _record, difference = lockstep.follow(script, expected, self.arm)
        if difference is None:
            self.seen[script.name] = lockstep.digest(expected)
        for problem in self.arm.clean():
            print(f"conformance: {script.name}: {problem}", flush=True)
        return difference

    def run(self, scripts: Sequence[Script], *, whole: bool) -> int:
        """All of them; ``whole`` when every explanation must be of use."""
        began = time.monotonic()
        differ = explained = ran = 0
        stuck = False
        for script in scripts:
            if self.arm.release < script.since:
                continue
            ran += 1
            self.played.append(script.name)
            started = time.monotonic()
            self.arm.mark(script.name)
            try:
                difference = self.compare(script)
            except Wedged as wedged:
                print(f"conformance: stuck at {script.name}: {wedged}", flush=True)
                stuck = True
                break
            if self.verbose:
                print(f"{time.monotonic() - started:6.2f} s {script.name}", flush=True)
            if difference is None:
                continue
            if name := self._explain(difference):
                explained += 1
                if self.verbose:
                    print(f"         differs as explained: {name}", flush=True)
                continue
            differ += 1
            print(difference, flush=True)
            if self.shrink:
                print(self._shrunk(script).to_json(), flush=True)
        unused = self.unused() if whole and not stuck else []
        for name in unused:
            print(f"conformance: nothing needs the explanation {name!r}")
        release = "{}.{}".format(*self.arm.release)
        print(
            f"conformance: Linux {release}: {ran} scripts in {time.monotonic() - began:.0f} s, "
            f"{differ} differ, {explained} differ as explained" + ", 1 got stuck" * stuck
        )
        if stuck:
            return STUCK
        return DIFFERENT if differ or unused else 0

    def unused(self) -> list[str]:
        """The explanations for this kernel that have explained nothing so far."""
        return [
            divergence.name
            for divergence in DIVERGENCES
            if not self.explained[divergence.name] and divergence.since <= self.arm.release < divergence.before
        ]

    def _explain(self, difference: Difference) -> str:
        """The name of the divergence that it is, or nothing."""
        for divergence in DIVERGENCES:
            if divergence.explains(difference, self.arm.release):
                self.explained[divergence.name] += 1
                return divergence.name
        return ""

    def _shrunk(self, script: Script) -> Script:
        """Without the steps that the difference does not need."""
        steps = list(script.steps)
        place = len(steps) - 1
        while place >= 0:
            fewer = Script(name=script.name, steps=(*steps[:place], *steps[place + 1 :]), scan=script.scan)
            if self.compare(fewer) is not None:
                del steps[place]
            place -= 1
        return Script(name=script.name, steps=tuple(steps), scan=script.scan, since=script.since)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
