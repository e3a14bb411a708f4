"""Writes the pages of the documentation that are drawn from the code: ``make docs``. A test fails when one is stale."""

from __future__ import annotations

import errno
import importlib
import inspect
import pkgutil
import sys
from pathlib import Path

# As a script it finds what lies next to it first, and perhaps another checkout's package: this is about this checkout.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.proof.coverage_page import coverage_page
from ublk_trio import kernel_sim
from ublk_trio.kernel_sim.control_faults import CONTROL_FAULTS
from ublk_trio.kernel_sim.faults import FAULTS, LAYER_MEANING, Layer
from ublk_trio.kernel_sim.version import COMMAND_RELEASE, MODELLED, KernelVersion
from ublk_trio.tag import EVENT_MEANING, KERNEL_OWNS, SERVER_OWES, STATE_MEANING, TRANSITIONS, TagEvent, TagState
from ublk_trio.uapi import FEATURE_RELEASE, ControlCommand, Feature

DOCS = Path(__file__).resolve().parent


def _owner(state: TagState) -> str:
    if state in KERNEL_OWNS:
        return "kernel"
    return "server, which owes an answer" if state in SERVER_OWES else "nobody's turn"


def _diagram() -> list[str]:
    lines = ["```mermaid", "stateDiagram-v2", "    [*] --> UNFETCHED"]
    for state, row in TRANSITIONS.items():
        lines += [
            f"    {state.name} --> {after.name}: {event.name}"
            for event, after in row.items()
            if event is not TagEvent.RING_CLOSED
        ]
    return [*lines, "    CLOSED --> [*]", "```"]


def _table() -> list[str]:
    lines = ["| state | " + " | ".join(event.name for event in TagEvent) + " |", "|---" * (len(TagEvent) + 1) + "|"]
    for state in TagState:
        cells = (TRANSITIONS[state].get(event) for event in TagEvent)
        lines.append(
            f"| **{state.name}** | " + " | ".join(cell.name if cell is not None else "" for cell in cells) + " |"
        )
    return lines


def tag_page() -> str:
    """The page about the tag state machine."""
    return "\n".join(
        [
            "# The tag state machine",
            "",
            "Drawn from the tables in `ublk_trio/tag.py` by `make docs`. RING_CLOSED leads from every state to CLOSED and is left",
            "out of the diagram.",
            "",
            *_diagram(),
            "",
            "| state | meaning | whose turn |",
            "|---|---|---|",
            *(f"| {state.name} | {STATE_MEANING[state]} | {_owner(state)} |" for state in TagState),
            "",
            "| event | meaning |",
            "|---|---|",
            *(f"| {event.name} | {EVENT_MEANING[event]} |" for event in TagEvent),
            "",
            "What each event makes of each state. An empty cell is an illegal event: it raises `IllegalTagEventError` and",
            "changes nothing.",
            "",
            *_table(),
            "",
        ]
    )


def _simulator_modules() -> list[str]:
    """A section for each module that says what it supports: its docstring as it stands."""
    lines: list[str] = []
    prefix = f"{kernel_sim.__name__}."
    for info in pkgutil.walk_packages(kernel_sim.__path__, prefix):
        text = inspect.getdoc(importlib.import_module(info.name)) or ""
        if "**Supported.**" in text:
            lines += [f"## {info.name.removeprefix(prefix)}", "", text, ""]
    return lines


def _release(release: tuple[int, int]) -> str:
    return "{}.{}".format(*release)


#: The releases that the table of differences shows.
PROFILES = (KernelVersion(6, 1), KernelVersion(6, 12), KernelVersion(6, 16), KernelVersion(7, 0), KernelVersion(7, 3))


def _differences() -> list[str]:
    """What releases do differently, beyond the commands and features that they have."""
    return [
        "| difference | when | " + " | ".join(map(str, PROFILES)) + " |",
        "|---|---|" + "---|" * len(PROFILES),
        *(
            f"| {difference.text} | {difference.when} | "
            + " | ".join("yes" if getattr(version, difference.name) else "" for version in PROFILES)
            + " |"
            for difference in KernelVersion.differences()
        ),
    ]


def _control_faults() -> list[str]:
    return [
        "| point | errno |",
        "|---|---|",
        *(f"| {point} | {errno.errorcode[number]} |" for point, number in CONTROL_FAULTS.items()),
    ]


def simulator_page() -> str:
    """The page about what the simulator covers."""
    return "\n".join(
        [
            "# What the simulator covers",
            "",
            "Drawn from `ublk_trio/kernel_sim/` by `make docs`: what each of its modules says of itself, and the tables of releases",
            "that it plays. What it is a simulation of is in [the contract](contract.md).",
            "",
            "A feature that is not simulated is not offered by the simulated driver, whatever release it plays. A command that is not",
            "simulated gets EOPNOTSUPP.",
            "",
            "| feature | bit | Linux | simulated |",
            "|---|---|---|---|",
            *(
                f"| {feature.name} | {feature.bit_length() - 1} | {_release(FEATURE_RELEASE[feature])} | "
                f"{'yes' if feature in MODELLED else ''} |"
                for feature in Feature
            ),
            "",
            "| control command | number | Linux | simulated |",
            "|---|---|---|---|",
            *(
                f"| {command.name} | 0x{command:02x} | "
                + (f"{_release(COMMAND_RELEASE[command])} | yes |" if command in COMMAND_RELEASE else "| |")
                for command in sorted(ControlCommand)
            ),
            "",
            "What releases do differently, each a property of `KernelVersion`:",
            "",
            *_differences(),
            "",
            "Where `SimKernel.control_faults` lets Choices fail a control command:",
            "",
            *_control_faults(),
            "",
            *_simulator_modules(),
        ]
    )


def _faults_of(layer: Layer) -> list[str]:
    return [
        f"## {layer.value}",
        "",
        f"Injected by {_INJECTED_BY[layer]}: {LAYER_MEANING[layer]}.",
        "",
        "| fault | what happens | permitted, because | asks for |",
        "|---|---|---|---|",
        *(
            f"| `{fault.name}`{' (ordinary)' if fault.ordinary else ''} | {fault.happens} | {fault.permitted} | "
            f"{', '.join(f'`{choice}`' for choice in fault.choices)} |"
            for fault in FAULTS
            if fault.layer is layer
        ),
        "",
    ]


_INJECTED_BY = {
    Layer.RING: "the simulator",
    Layer.COMMANDS: "the simulator",
    Layer.PROCESS: "the simulator",
    Layer.BACKEND: "the disks of `tests/property/`",
    Layer.STORAGE: "`ublk_trio.testing.Storage`",
}


def faults_page() -> str:
    """The page about what can go wrong."""
    return "\n".join(
        [
            "# Faults",
            "",
            "Drawn from the table in `ublk_trio/kernel_sim/faults.py` by `make docs`.",
            "",
            "Each fault is an option of the choices named in the last column, and is only offered while it is enabled:",
            '`SimKernel(choices, faults={"no-memory", "server-killed"})`. Without `faults` the ordinary ones are enabled, which are what',
            "a healthy machine does. `SimKernel.faults` is the set of what is enabled now; emptied, nothing more goes wrong.",
            "",
            *(line for layer in Layer for line in _faults_of(layer)),
        ]
    )


#: Every generated page, by file name.
PAGES = {
    "tag.md": tag_page,
    "simulator.md": simulator_page,
    "faults.md": faults_page,
    "coverage.md": coverage_page,
}


def main() -> None:
    for name, page in PAGES.items():
        (DOCS / name).write_text(page())
        print(f"wrote docs/{name}")


if __name__ == "__main__":
    main()
