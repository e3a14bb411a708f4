"""The reference pages name everything that there is, and nothing that there is not."""

from __future__ import annotations

import argparse
import inspect
import json
import re
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import attrs
import msgspec
import pytest

import ublk_trio
import ublk_trio.backends
import ublk_trio.kernel_sim
import ublk_trio.rpc
from tests.conformance import __main__ as conformance
from tests.kernel.guest import command_line
from ublk_trio import DeviceOptions, Limits, Memory, SimKernel, device, open_target
from ublk_trio.backends import KINDS
from ublk_trio.cli import app, devices, serving, sim
from ublk_trio.cli.doctor import Finding
from ublk_trio.cli.exit_codes import ExitCode
from ublk_trio.control import open_control
from ublk_trio.rpc import FRAMEWORK_METHODS, ErrorCode
from ublk_trio.rpc import Bounds as RpcBounds
from ublk_trio.rpc.errors import MESSAGE_CHARACTERS_MAX
from ublk_trio.service.methods import METHODS
from ublk_trio.simulation import FAULTS

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CLI = (ROOT / "docs" / "cli.md").read_text()
RPC = (ROOT / "docs" / "rpc.md").read_text()
API = (ROOT / "docs" / "api.md").read_text()
#: Public to the other modules of the simulator only.
FOR_THE_SIMULATOR = {
    "changed", "char_to_open", "drop", "free_id", "identity", "interrupt", "new_bio", "next_cpu",
    "put_device", "run", "undisturbed", "violation",
}  # fmt: skip
COMMANDS = ("start", "recover", "list", "stop", "features", "doctor", "sim", "rpc", "udev-rule", "node-owner")
#: What the page calls a positional argument.
POSITIONAL = {"IDS": "ID", "PARAMETERS": "KEY=VALUE"}


def section(page: str, heading: str) -> str:
    """What stands under a heading, up to the next of its level or above."""
    level = heading.index(" ")
    _, found, rest = page.partition(f"\n{heading}\n")
    assert found, f"there is no heading {heading!r}"
    return re.split(rf"^#{{1,{level}}} ", rest, maxsplit=1, flags=re.MULTILINE)[0]


def rows(text: str) -> Iterator[list[str]]:
    """The cells of every table row, without the heads' rules."""
    for line in text.splitlines():
        if line.startswith("|") and not line.startswith("|-"):
            yield [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def table_after(text: str, head: str) -> list[list[str]]:
    """The rows of the first table whose first column is called so."""
    _, found, rest = text.partition(f"\n| {head} |")
    assert found, f"there is no table of {head!r}"
    body = rest.split("\n\n")[0]
    return list(rows(body[body.index("\n|---") :]))


def code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


# The command line -----------------------------------------------------------------------------------------------------


def arguments_of(command: str) -> dict[str, Any]:
    return {argument.names[0]: argument for argument in app[command].assemble_argument_collection()}


@pytest.mark.parametrize("command", COMMANDS)
def test_options(command: str) -> None:
    """Each command's table lists exactly its options, with their defaults."""
    documented = {code(row[0])[0]: row[1] for row in table_after(section(CLI, f"## {command}"), "option")}
    arguments = arguments_of(command)
    assert set(documented) == {POSITIONAL.get(name, name) for name in arguments}
    for name, argument in arguments.items():
        default = argument.field_info.default
        if default not in (None, inspect.Parameter.empty, False, ()):
            assert documented[name] == f"`{default}`", name
        elif default is False:
            assert documented[name] == "off", name


def test_commands() -> None:
    """There are these commands, this global option, and no others."""
    assert [code(row[0])[0] for row in table_after(CLI, "command")] == list(COMMANDS)
    assert {name for name in app if not name.startswith("-")} == set(COMMANDS)
    documented = [code(row[0])[0] for row in table_after(CLI, "global option")]
    assert documented == [a.names[0] for a in app.meta.assemble_argument_collection() if a.names[0] != "TOKENS"]


def test_exit_codes() -> None:
    documented = [(int(row[0]), row[1]) for row in table_after(section(CLI, "## Exit codes"), "code")]
    assert documented == [(code.value, code.name) for code in ExitCode]


def test_specs() -> None:
    """Every kind of backend is listed in its form and words; every key of any of them is explained."""
    spec = section(CLI, "## SPEC: what a disk is made of")
    assert {code(row[0])[0]: row[1] for row in table_after(spec, "form")} == {k.form: k.help for k in KINDS.values()}
    assert {code(row[0])[0] for row in table_after(spec, "key")} == {key for k in KINDS.values() for key in k.options}


async def test_list_keys() -> None:
    """`list --json` prints the documented keys, and the text's columns are the first of them."""
    documented = [code(row[0])[0] for row in table_after(section(CLI, "## list"), "key")]
    kernel = SimKernel()
    async with open_target(kernel) as target, open_control(kernel) as control:
        live = await target.start_device(Memory(1 << 20))
        row = await devices._describe(kernel, control, live.dev_id)  # type: ignore[arg-type]
    assert row is not None
    assert documented == list(row)
    assert documented[:9] == list(devices._COLUMNS)


async def test_start_keys(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """`start --json` prints the documented keys for a disk that is live."""
    monkeypatch.setattr(serving, "write_record", lambda *args, **kwargs: None)
    disk = serving.Disk(spec="memory:1M", backend=Memory(1 << 20), options=DeviceOptions())
    async with open_target(SimKernel()) as target:
        await serving._start_one(target, disk, json=True)
    documented = [code(row[0])[0] for row in table_after(section(CLI, "## start"), "key")]
    assert re.findall(r'"(\w+)":', capsys.readouterr().out) == documented


def test_doctor_keys() -> None:
    documented = [code(row[0])[0] for row in table_after(section(CLI, "## doctor"), "key")]
    assert documented == [field.name for field in attrs.fields(Finding)]


def test_sim_faults() -> None:
    """Every fault is listed in its words."""
    documented = {code(row[0])[0]: row[1] for row in table_after(section(CLI, "## sim"), "fault")}
    assert documented == FAULTS


def test_sim_keys(capsys: pytest.CaptureFixture[str]) -> None:
    """`sim --json` prints the documented keys."""
    assert sim.sim(steps=5, json=True) == 0
    documented = [key for row in table_after(section(CLI, "## sim"), "key") for key in code(row[0])]
    assert documented == list(json.loads(capsys.readouterr().out))


# The Python interface -------------------------------------------------------------------------------------------------


def members_of(name: str) -> set[str]:
    """What a public class itself offers by name; not what it inherits from Python."""
    item = getattr(ublk_trio, name)
    if not inspect.isclass(item) or issubclass(item, Exception) or item is ublk_trio.Kernel:
        return set()
    own = set(vars(item)) | set(getattr(item, "__annotations__", {}))
    return {member for member in own if not member.startswith("_")}


@pytest.mark.parametrize("name", ublk_trio.__all__)
def test_public_name(name: str) -> None:
    """Every public name has its heading, and every public member of it is named below."""
    text = section(API, f"### `{name}`")
    named = set(re.findall(r"\w+", " ".join(code(text))))
    # These are documented where they are defined: in Kernel and Backend.
    inherited = set(vars(ublk_trio.Kernel)) | FOR_THE_SIMULATOR if name.endswith("Kernel") else set()
    if issubclass_of_backend(name):
        inherited |= members_of("Backend") | {
            "path",
            "direct",
            "write",
            "flush",
            "discard",
            "write_zeroes",
            "size",
            "settle",
        }
    assert members_of(name) - inherited <= named


def issubclass_of_backend(name: str) -> bool:
    item = getattr(ublk_trio, name)
    return inspect.isclass(item) and issubclass(item, ublk_trio.Backend) and item is not ublk_trio.Backend


def test_no_name_that_is_not_there() -> None:
    """Every heading that is a name is a public one."""
    assert set(re.findall(r"^### `(\w+)`$", API, re.MULTILINE)) == set(ublk_trio.__all__)


@pytest.mark.parametrize("options", [DeviceOptions, Limits], ids=lambda options: options.__name__)
def test_options_of_python(options: type[Any]) -> None:
    """Fields and defaults of what is made of options, as they are."""
    text = section(API, f"### `{options.__name__}`")
    documented = {code(row[0])[0]: code(row[1])[0] for row in table_after(text, "field")}
    fields = {field.name: field.default for field in attrs.fields(options)}
    assert documented == {
        name: str(default) if isinstance(default, Enum) else repr(default) for name, default in fields.items()
    }


def test_bounds_of_a_stop() -> None:
    """The bounds are the constants."""
    stopping = section(API, "### Stopping")
    assert f"within {device.REFUSE_SECONDS:g} seconds" in stopping
    assert f"DEL_DEV gets {device.DELETE_SECONDS:g} seconds" in stopping


@pytest.mark.parametrize(
    "name", ["Delay", "ErrorInjection", "File", "Limited", "Memory", "Null", "Passthru", "RealKernel", "SimKernel"]
)
def test_signatures(name: str) -> None:
    """What a user calls to make one is written as it is: parameters, order, defaults."""
    parameters = inspect.signature(getattr(ublk_trio, name)).parameters.values()
    bare = inspect.Signature([parameter.replace(annotation=inspect.Parameter.empty) for parameter in parameters])
    assert f"{name}{bare}" in " ".join(section(API, f"### `{name}`").split())


@pytest.mark.parametrize(
    "module", [ublk_trio.backends, ublk_trio.kernel_sim, ublk_trio.rpc], ids=lambda module: module.__name__
)
def test_public_module(module: Any) -> None:
    """What the public modules export is named."""
    assert set(module.__all__) <= set(re.findall(r"\w+", " ".join(code(API))))


# Remote calls ---------------------------------------------------------------------------------------------------------


def test_rpc_errors() -> None:
    """Every code that is no errno is listed."""
    documented = {int(row[0]): row[1] for row in table_after(section(RPC, "## Errors"), "code")}
    assert documented == {code.value: code.name for code in ErrorCode}
    assert f"at most {MESSAGE_CHARACTERS_MAX} characters" in " ".join(section(RPC, "## Errors").split())


def test_rpc_bounds() -> None:
    """Fields and defaults of Bounds, as they are."""
    documented = {code(row[0])[0]: code(row[1])[0] for row in table_after(section(RPC, "## Bounds"), "field")}
    assert documented == {field.name: repr(field.default) for field in attrs.fields(RpcBounds)}


def test_rpc_methods() -> None:
    """The methods of every server are listed, with their parameters."""
    documented = {
        code(row[0])[0]: code(row[1]) for row in table_after(section(RPC, "## Methods of every server"), "method")
    }
    assert documented == {method.name: list(method.params.__struct_fields__) for method in FRAMEWORK_METHODS}


def test_service_methods() -> None:
    """Every method of the disk service is listed with exactly its parameters, those that are required in bold."""
    documented = {
        method: {name: bool(bold) for bold, name in re.findall(r"(\*\*)?`(\w+)`", row[1])}
        for row in table_after(section(RPC, "## Methods of the disk service"), "method")
        for method in code(row[0])
    }
    assert documented == {
        method.name: {field.name: field.required for field in msgspec.structs.fields(method.params)}
        for method in METHODS
    }


def test_the_tests_of_the_comparison() -> None:
    """Every test that the page names is there, and each row has one or says what is not here."""
    page = (ROOT / "docs" / "spdk.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", page)
    assert len(named) > 50
    for path, name in named:
        text = (ROOT / path).read_text()
        assert (
            re.search(rf"^(?:async )?def {name}\(", text, re.MULTILINE)
            if name
            else "\ndef test_" in text.replace("async def", "def")
        ), (path, name)
    for row in rows(page):
        assert row[-1] == "test" or row[-1] or any("**not" in cell or "**no " in cell for cell in row), row


# All pages ------------------------------------------------------------------------------------------------------------


def anchors_of(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page: Path) -> None:
    """A link within the project leads somewhere."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors_of(linked), target


def test_index() -> None:
    """docs/README.md leads to every page."""
    index = (ROOT / "docs" / "README.md").read_text()
    assert set(re.findall(r"\]\(([\w-]+\.md)\)", index)) == {p.name for p in PAGES if p.parent != ROOT} - {"README.md"}


def shell_lines() -> Iterator[str]:
    for page in PAGES:
        for block in re.findall(r"^```sh\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
            yield from (line.partition("   #")[0].strip() for line in block.splitlines() if line.strip())


@pytest.mark.parametrize("line", sorted(set(shell_lines())))
def test_shell_lines(line: str) -> None:
    """What a page names in a shell block that is not run is there: make's target, the tests' file, the options."""
    words = re.sub(r"^([A-Z_]+=\S* )+", "", line).split()
    match words:
        case ["make", *targets]:
            targets = [target for target in targets if "=" not in target]
            known = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert set(targets) <= set(known)
        case ["python3", "tests/kernel/vm.py", *arguments]:
            own = arguments[: arguments.index("--")] if "--" in arguments else arguments
            assert isinstance(command_line.build_parser().parse_args(own), argparse.Namespace)
        case [".venv/bin/python", "-m", "pytest", *paths]:
            for path in paths:
                assert path.startswith("-") or (ROOT / path.partition("::")[0]).exists(), path
        case [".venv/bin/python", "-m", "tests.conformance", *arguments]:
            assert isinstance(conformance.build_parser().parse_args(arguments), argparse.Namespace)
        case ["python", "-m", "ublk_trio", command, *_]:
            assert command in COMMANDS
        case _:
            pytest.fail("say in test_docs_reference.py how to check this line")
