"""A file becomes the calls that it stands for, and each mistake in one is a line that names its place."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ublk_trio import DataMode, SimKernel, UsageError
from ublk_trio.rpc import Dispatcher
from ublk_trio.service.config_file import Entry, apply_config, read_config
from ublk_trio.service.cpumask import format_cpumask
from ublk_trio.service.methods import METHODS
from ublk_trio.service.methods_config import save
from ublk_trio.service.service import Service, open_service

GOOD = """\
# what we serve
[target]
cpumask = "0x1"

[[bdev]]
kind = "malloc"
name = "m0"
size = "1M"

[[ bdev ]]  # another
kind = "null"
name = "n0"
num_blocks = 100
block_size = 4096
limits = { rw_ios_per_sec = 20000 }

[[disk]]
bdev = "m0"
id = 3
queues = 2

[[disk]]
bdev = "n0"
recovery = "off"
"""


def write(directory: Path, text: str, name: str = "disks.toml") -> str:
    path = directory / name
    path.write_text(text)
    return str(path)


def calls(entries: list[Entry]) -> list[tuple[str, dict[str, Any]]]:
    return [(entry.call.method, dict(entry.call.params)) for entry in entries]


def dispatcher_of(service: Service) -> Dispatcher:
    dispatcher = Dispatcher()
    dispatcher.register(METHODS, service)
    return dispatcher


def test_toml(tmp_path: Path) -> None:
    """Bdevs with their limits, the target, the disks, in that order."""
    assert calls(read_config(write(tmp_path, GOOD))) == [
        ("bdev_malloc_create", {"name": "m0", "num_blocks": 2048, "block_size": 512}),
        ("bdev_null_create", {"name": "n0", "num_blocks": 100, "block_size": 4096}),
        ("bdev_set_qos_limit", {"name": "n0", "rw_ios_per_sec": 20000}),
        ("ublk_create_target", {"cpumask": "0x1"}),
        ("ublk_start_disk", {"bdev_name": "m0", "ublk_id": 3, "num_queues": 2}),
        ("ublk_start_disk", {"bdev_name": "n0", "recovery": "off"}),
    ]


@pytest.mark.parametrize(
    ("replace", "by", "line", "says"),
    [
        ("cpumask", "cpumsk", 3, "unknown"),
        ('kind = "malloc"', 'kind = "maloc"', 5, "did you mean bdev_malloc_create"),
        ('kind = "malloc"\n', "", 5, "no kind"),
        ('"1M"', '"1MB"', 8, "1M"),
        ('"1M"', "1", 8, "num_blocks"),
        ('"1M"', '"1000"', 8, "multiple"),
        ("num_blocks = 100", 'num_blocks = "many"', 13, "expected int, got str"),
        ("num_blocks = 100", "", 10, "num_blocks: missing"),
        ("limits = { rw_ios", "limits = { rw_io", 15, "rw_ios_per_sec"),
        ("limits = {", "limits = 7 # {", 15, "table"),
        ("queues = 2", "queus = 2", 20, "queues"),
        ("queues = 2", "queues = 0", 20, ">= 1"),
        ("id = 3", "id = -3", 19, ">= 0"),
        ('recovery = "off"', 'recovery = "of"', 24, "off"),
        ('bdev = "n0"', 'bdev = "x0"', 22, "no bdev 'x0'"),
        ("[target]", "[target", 2, "not TOML"),
        ("[target]", "[targets]", None, "targets"),
        ('[[disk]]\nbdev = "m0"', '[disk]\nbdev = "m0"', None, "disk"),
    ],
)
async def test_mistakes_in_toml(tmp_path: Path, replace: str, by: str, line: int | None, says: str) -> None:
    """Syntax, unknown keys, wrong types and values, and what the calls refuse: file and line, and what would be right."""
    assert replace in GOOD
    path = write(tmp_path, GOOD.replace(replace, by, 1))
    with pytest.raises(UsageError) as raised:
        async with open_service(SimKernel()) as service:
            await apply_config(dispatcher_of(service), service, read_config(path))
    text = str(raised.value)
    assert says in text
    assert len(text.splitlines()) == 1
    assert text.startswith(path)
    if line is not None:
        assert f":{line}:" in text or f"line {line}," in text, text


@pytest.mark.parametrize(
    ("document", "place", "says"),
    [
        ("{", "", "not JSON"),
        ("[" * 100_000, "", "not JSON"),
        ("[]", "", "subsystems"),
        ({"subsystems": 1}, "", "subsystems"),
        ({"subsystems": [1]}, "subsystems[0]", "subsystem"),
        ({"subsystems": [{"subsystem": "bdev", "config": 1}]}, "subsystems[0].config", "list"),
        ({"subsystems": [{"subsystem": "bdev", "config": [{}]}]}, "subsystems[0].config[0]", "method"),
        ({"subsystems": [{"subsystem": "bdev", "config": [{"method": "x", "p": 1}]}]}, "config[0]", "'p'"),
        (
            {"subsystems": [{"subsystem": "bdev", "config": [{"method": "x", "params": 1}]}]},
            "config[0].params",
            "object",
        ),
        ({"subsystems": [{"subsystem": "ublk", "config": [{"method": "x"}]}]}, "config[0]", "not found"),
    ],
)
async def test_mistakes_in_json(tmp_path: Path, document: Any, place: str, says: str) -> None:
    """What is not JSON, not a saved configuration, or not a call: the place within the file, and what is wrong."""
    path = write(tmp_path, document if isinstance(document, str) else json.dumps(document), "saved.json")
    with pytest.raises(UsageError) as raised:
        async with open_service(SimKernel()) as service:
            await apply_config(dispatcher_of(service), service, read_config(path))
    text = str(raised.value)
    assert text.startswith(path)
    assert place in text
    assert says in text
    assert len(text.splitlines()) == 1


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    """Not there, a directory, not UTF-8: one line with the errno's name, or what is wrong."""
    with pytest.raises(UsageError, match="ENOENT"):
        read_config(tmp_path / "missing.json")
    with pytest.raises(UsageError, match="EISDIR"):
        read_config(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b"# \xff")
    with pytest.raises(UsageError, match="UTF-8"):
        read_config(tmp_path / "latin.toml")


async def test_foreign_subsystems(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file of SPDK's has subsystems that are not ours: a warning each, if they hold anything, and the rest is made."""
    document = {
        "subsystems": [
            {"subsystem": "keyring", "config": []},
            {"subsystem": "nvmf", "config": [{"method": "nvmf_set_config", "params": {}}]},
            {"subsystem": "bdev", "config": [{"method": "bdev_wait_for_examine"}]},
            {"subsystem": "scsi", "config": None},
        ]
    }
    with caplog.at_level(logging.WARNING):
        entries = read_config(write(tmp_path, json.dumps(document), "saved.json"))
    assert calls(entries) == [("bdev_wait_for_examine", {})]
    assert [record.getMessage().split(": ")[-1] for record in caplog.records] == [
        "subsystem nvmf is not one of ours, and is left out"
    ]


async def test_half_way(tmp_path: Path) -> None:
    """A failure ends it, and what was made goes with the service; with keep_going the rest is made, and all failures told."""
    path = write(tmp_path, GOOD.replace('name = "n0"', 'name = "m0"'))
    kernel = SimKernel()
    with pytest.raises(UsageError, match="already"):
        async with open_service(kernel) as service:
            await apply_config(dispatcher_of(service), service, read_config(path))
    assert not kernel.leftovers()
    async with open_service(kernel) as service:
        failures = await apply_config(dispatcher_of(service), service, read_config(path), keep_going=True)
        assert [disk.ublk_id for disk in service.disks] == [3]
    assert ["already" in str(failures[0]), "no bdev 'n0'" in str(failures[-1])] == [True, True]


# Saved and made again ---------------------------------------------------------------------------------------------------

BDEVS = st.lists(
    st.tuples(
        st.sampled_from(["malloc", "null"]),
        st.sampled_from([512, 4096]),
        st.integers(16, 64),
        st.none() | st.uuids(),
    ),
    max_size=5,
)
DISKS = st.lists(
    st.tuples(
        st.integers(1, 4),
        st.integers(1, 32),
        st.sampled_from([None, "off", "fail"]),
        st.booleans(),
        st.sampled_from([None, *DataMode]),
    ),
    max_size=5,
)


def modes_of(service: Service) -> list[DataMode]:
    return [disk.device.options.mode for disk in service.disks if disk.device is not None]


@settings(max_examples=50, deadline=None)
@given(bdevs=BDEVS, disks=DISKS, masked=st.booleans(), user_copy=st.booleans())
def test_what_is_saved_makes_the_same_again(
    bdevs: Any, disks: Any, masked: bool, user_copy: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The saved configuration of a service that was made from one is the same, byte for byte; workers only with a mask. Its disks
    move data as before."""
    import trio

    mask = {"cpumask": format_cpumask({min(os.sched_getaffinity(0))})} if masked else {}
    kernel = SimKernel()
    asked = [disk for disk in disks if user_copy or disk[-1] is not DataMode.USER_COPY][: len(bdevs)]

    async def run() -> None:
        async with open_service(SimKernel()) as first:
            call = dispatcher_of(first).call
            for number, (kind, block_size, blocks, uuid) in enumerate(bdevs):
                params = {"name": f"b{number}", "block_size": block_size, "num_blocks": blocks * 8}
                await call(f"bdev_{kind}_create", params | ({} if uuid is None else {"uuid": str(uuid)}))
            if disks:
                await call("ublk_create_target", mask | {"disable_user_copy": not user_copy})
            for number, (queues, depth, recovery, read_only, mode) in enumerate(asked):
                params = {"bdev_name": f"b{number}", "ublk_id": 9 - number, "num_queues": queues, "queue_depth": depth}
                more = {"read_only": read_only} | ({} if recovery is None else {"recovery": recovery})
                await call("ublk_start_disk", params | more | ({} if mode is None else {"mode": mode.value}))
            saved = json.dumps(save(first))
            modes = modes_of(first)
            assert modes == [mode or DataMode.COPY for *_, mode in asked]
        assert ('"disable_user_copy": true' in saved) == (not user_copy and bool(disks))
        path = write(tmp_path_factory.mktemp("config"), saved, "saved.json")
        async with open_service(kernel) as second:
            await apply_config(dispatcher_of(second), second, read_config(path))
            assert json.dumps(save(second)) == saved
            assert modes_of(second) == modes
            assert len(kernel.workers) == (1 if masked and disks else 0)

    trio.run(run)
