"""Every method of SPDK's surface takes its parameters by SPDK's names, needs no others than SPDK does, and answers in SPDK's form."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import attrs
import msgspec
import pytest

from tests.search import broken_invariant
from tests.service import bench as bench_module
from tests.service.bench import INVALID, Bench, open_bench, refused
from tests.test_recover import calm_kernel, dead_device
from ublk_trio import Recovery
from ublk_trio.rpc import FRAMEWORK_METHODS, Dispatcher, ErrorCode, Framework, RpcError, State
from ublk_trio.service import methods_ublk
from ublk_trio.service.methods import METHODS
from ublk_trio.service.service import Service, open_service

UUID: Final = "0e5b3c40-1d0f-4f7f-9b6a-3a3f8f6b0001"
BLOCKS: Final = {"block_size": 512, "num_blocks": 2048}
LATENCIES: Final = {f"{kind}_latency": 5 for kind in ("avg_read", "p99_read", "avg_write", "p99_write")}

BASE: Final = ("bdev_malloc_create", {"name": "a", **BLOCKS})
OTHER: Final = ("bdev_malloc_create", {"name": "b", **BLOCKS})
NULL: Final = ("bdev_null_create", {"name": "n", **BLOCKS})
FILE: Final = ("bdev_aio_create", {"name": "f", "filename": "FILE", "block_size": 512})
DELAY: Final = ("bdev_delay_create", {"name": "d", "base_bdev_name": "a", **LATENCIES})
ERROR: Final = ("bdev_error_create", {"base_name": "a"})
PASSTHRU: Final = ("bdev_passthru_create", {"name": "p", "base_bdev_name": "a"})
RAID: Final = ("bdev_raid_create", {"name": "r", "raid_level": "raid1", "base_bdevs": ["a", "b"]})
TARGET: Final[tuple[str, dict[str, Any]]] = ("ublk_create_target", {})
DISK: Final = ("ublk_start_disk", {"bdev_name": "a", "ublk_id": 1, "num_queues": 1, "queue_depth": 64})
SHOWN: Final = {"ublk_device": "/dev/ublkb1", "id": 1, "queue_depth": 64, "num_queues": 1, "bdev_name": "a"}


def true(result: object) -> bool:
    return result is True


def has(*keys: str) -> Callable[[Any], bool]:
    return lambda result: set(keys) <= result.keys()


def list_of(*keys: str) -> Callable[[Any], bool]:
    """A list of objects, each with at least these keys; one at least."""
    return lambda result: isinstance(result, list) and bool(result) and all(has(*keys)(each) for each in result)


def equal(expected: object) -> Callable[[Any], bool]:
    return lambda result: type(result) is type(expected) and result == expected


def version(result: Any) -> bool:
    fields = result["fields"]
    return (
        result.keys() == {"version", "fields"}
        and isinstance(result["version"], str)
        and {key: type(value) for key, value in fields.items()}
        == {"major": int, "minor": int, "patch": int, "suffix": str}
    )


@attrs.frozen
class Case:
    """A call with every parameter that SPDK's method has."""

    method: str
    params: dict[str, Any]
    #: Those of them that cannot be left out.
    needs: tuple[str, ...]
    answers: Callable[[Any], bool]
    #: What is called before.
    after: tuple[tuple[str, dict[str, Any]], ...] = ()
    #: One of those that cannot all be left out.
    any_of: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.method}-{self.params.get('raid_level', '')}"


BDEV_KEYS: Final = ("name", "product_name", "block_size", "num_blocks", "uuid", "claimed", "supported_io_types")
CASES: Final = [
    Case("rpc_get_methods", {"current": True, "include_aliases": True}, (), lambda names: "ublk_start_disk" in names),
    Case("spdk_get_version", {}, (), version),
    Case("spdk_kill_instance", {"sig_name": "SIGTERM"}, ("sig_name",), true),
    Case("framework_wait_init", {}, (), true),
    Case("framework_get_subsystems", {}, (), list_of("subsystem", "depends_on")),
    Case("framework_get_config", {"name": "bdev"}, ("name",), list_of("method", "params"), (BASE,)),
    Case("bdev_get_bdevs", {"name": "a", "timeout": 10}, (), list_of(*BDEV_KEYS), (BASE,)),
    Case("bdev_get_iostat", {"name": "a"}, (), has("tick_rate", "ticks", "bdevs"), (BASE,)),
    Case(
        "bdev_set_qos_limit",
        {"name": "a", "rw_ios_per_sec": 1000, "rw_mbytes_per_sec": 9, "r_mbytes_per_sec": 9, "w_mbytes_per_sec": 9},
        ("name",),
        true,
        (BASE,),
        any_of=("r_mbytes_per_sec",),
    ),
    Case(
        "bdev_malloc_create",
        {"name": "a", **BLOCKS, "uuid": UUID, "physical_block_size": 4096, "optimal_io_boundary": 8},
        ("block_size", "num_blocks"),
        equal("a"),
    ),
    Case(
        "bdev_null_create",
        {"name": "n", **BLOCKS, "uuid": UUID, "physical_block_size": 4096},
        ("name", "block_size", "num_blocks"),
        equal("n"),
    ),
    Case("bdev_null_resize", {"name": "n", "new_size": 2}, ("name", "new_size"), true, (NULL,)),
    Case(
        "bdev_aio_create",
        {"name": "f", "filename": "FILE", "block_size": 512, "readonly": True, "fallocate": False},
        ("name", "filename"),
        equal("f"),
    ),
    Case("bdev_aio_rescan", {"name": "f"}, ("name",), true, (FILE,)),
    Case(
        "bdev_delay_create",
        {"name": "d", "base_bdev_name": "a", **LATENCIES},
        ("name", "base_bdev_name", *LATENCIES),
        equal("d"),
        (BASE,),
    ),
    Case(
        "bdev_delay_update_latency",
        {"delay_bdev_name": "d", "latency_type": "p99_write", "latency_us": 7},
        ("delay_bdev_name", "latency_type", "latency_us"),
        true,
        (BASE, DELAY),
    ),
    Case("bdev_error_create", {"base_name": "a"}, ("base_name",), true, (BASE,)),
    *(
        Case(
            "bdev_error_inject_error",
            {
                "name": "EE_a",
                "io_type": io_type,
                "error_type": error_type,
                "num": 1,
                "queue_depth": 1,
                "corrupt_offset": 1,
                "corrupt_value": 2,
            },
            ("name", "io_type", "error_type"),
            true,
            (BASE, ERROR),
        )
        for io_type in ("clear", "read", "write", "unmap", "flush", "all")
        for error_type in ("failure", "pending", "corrupt_data", "nomem")
    ),
    *(
        Case(
            "bdev_raid_create",
            {"name": "r", "strip_size_kb": strip, "raid_level": level, "base_bdevs": ["a", "b"]},
            ("name", "raid_level", "base_bdevs", *needs),
            true,
            (BASE, OTHER),
        )
        for level, strip, needs in (("raid0", 4, ("strip_size_kb",)), ("raid1", 0, ()), ("concat", 4, ()))
    ),
    Case("bdev_passthru_create", {"name": "p", "base_bdev_name": "a"}, ("name", "base_bdev_name"), equal("p"), (BASE,)),
    Case("bdev_malloc_delete", {"name": "a"}, ("name",), true, (BASE,)),
    Case("bdev_null_delete", {"name": "n"}, ("name",), true, (NULL,)),
    Case("bdev_aio_delete", {"name": "f"}, ("name",), true, (FILE,)),
    Case("bdev_delay_delete", {"name": "d"}, ("name",), true, (BASE, DELAY)),
    Case("bdev_error_delete", {"name": "EE_a"}, ("name",), true, (BASE, ERROR)),
    Case("bdev_passthru_delete", {"name": "p"}, ("name",), true, (BASE, PASSTHRU)),
    Case("bdev_raid_delete", {"name": "r"}, ("name",), true, (BASE, OTHER, RAID)),
    Case("iobuf_get_stats", {}, (), list_of("module", "small_pool", "large_pool")),
    Case("ublk_create_target", {"cpumask": "CPUS", "disable_user_copy": True}, (), true),
    Case("ublk_destroy_target", {}, (), true, (TARGET,)),
    Case("ublk_start_disk", DISK[1], ("bdev_name",), equal(1), (TARGET, BASE)),
    Case("ublk_stop_disk", {"ublk_id": 1}, ("ublk_id",), true, (TARGET, BASE, DISK)),
    Case("ublk_get_disks", {"ublk_id": 1}, (), equal([SHOWN]), (TARGET, BASE, DISK)),
]


def filled(params: dict[str, Any], path: Path) -> dict[str, Any]:
    """With a file, and a CPU of this process."""
    found = {"FILE": str(path), "CPUS": f"[{min(os.sched_getaffinity(0))}]"}
    return {name: found.get(value, value) if isinstance(value, str) else value for name, value in params.items()}


async def prepare(bench: Bench, case: Case, path: Path) -> None:
    """Make what the call needs."""
    bench.dispatcher.register(FRAMEWORK_METHODS, Framework(dispatcher=bench.dispatcher, kill=lambda number: None))
    for method, params in case.after:
        await bench.call(method, **filled(params, path))


async def check(case: Case, path: Path) -> None:
    """With all of its parameters; with those alone that it needs; and not without one of these, or with one more."""
    params = filled(case.params, path)
    async with open_bench(target=False) as bench:
        await prepare(bench, case, path)
        for needed in case.needs:
            with refused(INVALID, needed):
                await bench.call(case.method, **{name: value for name, value in params.items() if name != needed})
        with refused(INVALID, "no_such_parameter"):
            await bench.call(case.method, **params, no_such_parameter=1)
        answer = await bench.call(case.method, **params)
        assert case.answers(answer), answer
    async with open_bench(target=False) as bench:
        await prepare(bench, case, path)
        least = await bench.call(case.method, **{name: params[name] for name in case.needs + case.any_of})
        assert type(least) is type(answer)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file for an aio bdev."""
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1 << 20))
    return path


@pytest.mark.parametrize("case", CASES, ids=str)
async def test_takes_and_answers(case: Case, path: Path) -> None:
    """As the module says."""
    await check(case, path)


OURS: Final = {"recovery": "requeue", "mode": "get-data", "read_only": True}
SAVED: Final = [
    *(case for case in CASES if case.method.endswith("_create") or case.method == "bdev_set_qos_limit"),
    Case("ublk_start_disk", DISK[1] | OURS, (), equal(1), (TARGET, BASE)),
    Case("ublk_start_disk", DISK[1] | {"read_only": True}, (), equal(1), (TARGET, BASE)),
    Case("ublk_create_target", {"disable_user_copy": True}, (), true),
]


@pytest.mark.parametrize("case", SAVED, ids=str)
async def test_what_was_given_is_saved(case: Case, path: Path) -> None:
    """Every parameter of a call that makes something is in what is saved, with its value, in an order that can be made again."""
    given = {name: value for name, value in filled(case.params, path).items() if value not in (0, False)}
    async with open_bench(target=False) as bench:
        await prepare(bench, case, path)
        await bench.call(case.method, **given)
        subsystem = case.method.split("_", maxsplit=1)[0]
        saved = await bench.call("framework_get_config", name=subsystem)
        found = [call["params"] for call in saved if call["method"] == case.method]
        assert any(given.items() <= params.items() for params in found), found
        calls = [call for name in ("bdev", "ublk") for call in await bench.call("framework_get_config", name=name)]
    async with open_bench(target=False) as again:
        for call in calls:
            await again.call(call["method"], **call["params"])


async def test_killing() -> None:
    """The process gets the signal that was named."""
    dispatcher = Dispatcher()
    killed: list[signal.Signals] = []
    dispatcher.register(FRAMEWORK_METHODS, Framework(dispatcher=dispatcher, kill=killed.append))
    await dispatcher.call("spdk_kill_instance", {"sig_name": "SIGTERM"})
    assert killed == [signal.SIGTERM]


async def test_start_up_ends_once() -> None:
    """``framework_start_init`` is true, and ends it; before, the disk service cannot be called."""
    dispatcher = Dispatcher(state=State.STARTUP)
    dispatcher.register(FRAMEWORK_METHODS, Framework(dispatcher=dispatcher, kill=lambda number: None))
    assert await dispatcher.call("framework_start_init") is True
    assert await dispatcher.call("framework_wait_init") is True
    with refused(int(ErrorCode.INVALID_STATE)):
        await dispatcher.call("framework_start_init")


async def test_recovering() -> None:
    """``ublk_recover_disk`` takes ``bdev_name`` and ``ublk_id``, both needed, and answers with the id."""
    kernel = calm_kernel()
    params = {"bdev_name": "a", "ublk_id": 0}
    async with dead_device(kernel, Recovery.REISSUE) as dead, open_service(kernel) as service:
        dispatcher = Dispatcher()
        dispatcher.register(METHODS, service)
        await dispatcher.call("ublk_create_target")
        await dispatcher.call(
            "bdev_malloc_create", {"name": "a", "block_size": 512, "num_blocks": dead.disk.size // 512}
        )
        for needed in params:
            with refused(INVALID, needed):
                await dispatcher.call("ublk_recover_disk", {key: params[key] for key in params if key != needed})
        answer = await dispatcher.call("ublk_recover_disk", params)
        assert answer == 0
        assert answer is not False
        assert await dead.results() == [4096, 4096]


# Planted bugs -----------------------------------------------------------------------------------------------------------


def case_of(method: str) -> Case:
    return next(case for case in CASES if case.method == method)


def altered(monkeypatch: pytest.MonkeyPatch, method: str, **changes: Any) -> None:
    table = tuple(attrs.evolve(each, **changes) if each.name == method else each for each in METHODS)
    monkeypatch.setattr(bench_module, "METHODS", table)


def the_id_is_needed(monkeypatch: pytest.MonkeyPatch) -> Case:
    params = msgspec.defstruct("GetDisks", [("ublk_id", int)], forbid_unknown_fields=True)
    altered(monkeypatch, "ublk_get_disks", params=params)
    return case_of("ublk_get_disks")


def another_name(monkeypatch: pytest.MonkeyPatch) -> Case:
    params = msgspec.defstruct("StopDisk", [("ublk_id", int)], forbid_unknown_fields=True, rename={"ublk_id": "id"})
    altered(monkeypatch, "ublk_stop_disk", params=params)
    return case_of("ublk_stop_disk")


def another_form(monkeypatch: pytest.MonkeyPatch) -> Case:
    async def planted(service: Service, params: Any) -> str:
        await methods_ublk.start_disk(service, params)
        return "1"

    altered(monkeypatch, "ublk_start_disk", function=planted)
    return case_of("ublk_start_disk")


@pytest.mark.parametrize("plant", [the_id_is_needed, another_name, another_form])
async def test_a_planted_bug_is_found(
    plant: Callable[[pytest.MonkeyPatch], Case], monkeypatch: pytest.MonkeyPatch, path: Path
) -> None:
    """A parameter that SPDK does not need, one that is called otherwise, and an answer of another type."""
    case = plant(monkeypatch)
    with broken_or_refused():
        await check(case, path)


@contextmanager
def broken_or_refused() -> Iterator[None]:
    """A right call that is refused is an invariant that broke, too."""
    with broken_invariant():
        try:
            yield
        except RpcError as error:
            raise AssertionError("a right call was refused") from error
