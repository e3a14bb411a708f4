"""Configuration files: SPDK's JSON, as ``save_config`` writes it, and a shorter form in TOML. Both become the same calls.

```toml
[target]                        # may be left out
cpumask = "0x3"

[[bdev]]
kind = "malloc"                 # bdev_malloc_create, and so on; all other keys are its parameters
name = "m0"
size = "64M"                    # instead of num_blocks; block_size is 512 if it is left out
limits = { rw_ios_per_sec = 10000 }

[[disk]]
bdev = "m0"
id = 0                          # what is left out is as in ublk_start_disk
queues = 1
depth = 128
```

Bdevs are made in the order in which they stand, then the target, then the disks. Of a JSON file, subsystems that are not ours are
left out with a warning: a file of SPDK's has many. Within ours, what only tunes SPDK is passed over with a warning, and what makes something
that cannot be had here is an error.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import attrs

from ublk_trio.backends import parse_size
from ublk_trio.errors import UblkError, UsageError, errno_text
from ublk_trio.rpc import Dispatcher, ErrorCode, RpcError
from ublk_trio.service.methods_config import SUBSYSTEMS
from ublk_trio.service.methods_setup import TUNING
from ublk_trio.service.service import Call, Service

logger = logging.getLogger("ublk_trio.service")

#: Bytes of a file: more is a mistake.
FILE_BYTES_MAX: Final = 16 << 20
_DISK_KEYS: Final = {
    "bdev": "bdev_name",
    "id": "ublk_id",
    "queues": "num_queues",
    "depth": "queue_depth",
    "recovery": "recovery",
    "mode": "mode",
    "read_only": "read_only",
    "unprivileged": "unprivileged",
}
_ONLY_TUNE: Final = TUNING.keys() | {"iobuf_set_options"}
_HEADER: Final = re.compile(r"\s*\[\[?\s*([A-Za-z]+)\s*\]\]?\s*(?:#.*)?")
#: The parameter that the text of an error begins with.
_FIELD: Final = re.compile(r"params\.([A-Za-z_]+)")


@attrs.frozen(kw_only=True)
class Entry:
    """A call that a file asks for, and where in the file."""

    call: Call
    #: ``disks.toml:12``, or ``saved.json: subsystems[1].config[0]``.
    where: str
    #: The lines of the keys that parameters came from, where that is known.
    lines: Mapping[str, str] = attrs.field(factory=dict)

    def blame(self, error: UblkError | OSError) -> UsageError:
        """The error, with the place in the file."""
        text = error.message if isinstance(error, RpcError) else str(error)
        if isinstance(error, RpcError) and error.code == ErrorCode.METHOD_NOT_FOUND:
            text += "; what it makes cannot be had here: take it out, or carry on without it (--keep-going)"
        field = _FIELD.match(text)
        where = self.lines.get(field.group(1), self.where) if field is not None else self.where
        return UsageError(f"{where}: {self.call.method}: {text}")


def read_config(path: str | os.PathLike[str]) -> list[Entry]:
    """The calls of a file; a name that ends with ``.toml`` is TOML, any other JSON.

    Raises `UsageError`, one line that names file and place, when it cannot be read or is not what it should be.
    """
    name = os.fspath(path)
    try:
        if os.path.getsize(name) > FILE_BYTES_MAX:
            raise UsageError(f"{name}: more than {FILE_BYTES_MAX} bytes: this is no configuration")
        text = Path(name).read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{name}: {errno_text(error.errno or 0)}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{name}: not UTF-8 at byte {error.start}") from error
    return list(_read_toml(name, text) if name.endswith(".toml") else _read_json(name, text))


async def apply_config(
    dispatcher: Dispatcher, service: Service, entries: list[Entry], *, keep_going: bool = False
) -> list[UsageError]:
    """Make the calls, in order; a bdev that is still expected then is a failure.

    Returns what failed, with ``keep_going``; without, raises it at once.
    """
    failures = []
    expecting: dict[str, Entry] = {}
    for entry in entries:
        try:
            await dispatcher.call(entry.call.method, dict(entry.call.params))
        except (UblkError, OSError) as error:
            failure = entry.blame(error)
            if not keep_going:
                raise failure from error
            failures.append(failure)
        for name in service.expected:
            expecting.setdefault(name, entry)
    for name, expected in service.expected.items():
        missing = " and ".join(service.missing(expected.bases))
        failures.append(expecting[name].blame(UsageError(f"bdev {name} waits for {missing}, which nothing makes")))
    if failures and not keep_going:
        raise failures[0]
    return failures


# JSON -------------------------------------------------------------------------------------------------------------------


def _read_json(name: str, text: str) -> Iterator[Entry]:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{name}: not JSON: {error}") from error
    subsystems = document.get("subsystems") if isinstance(document, dict) else None
    if not isinstance(subsystems, list):
        raise UsageError(f'{name}: not a saved configuration: it has no list "subsystems"')
    for number, subsystem in enumerate(subsystems):
        place = f"{name}: subsystems[{number}]"
        if not isinstance(subsystem, dict) or not isinstance(subsystem.get("subsystem"), str):
            raise UsageError(f'{place}: not an object with a "subsystem"')
        calls = subsystem.get("config")
        if subsystem["subsystem"] not in SUBSYSTEMS:
            _warn_of_foreign(place, subsystem["subsystem"], calls)
            continue
        if calls is None:
            continue
        if not isinstance(calls, list):
            raise UsageError(f"{place}.config: not a list")
        for index, call in enumerate(calls):
            where = f"{place}.config[{index}]"
            if isinstance(call, list):
                # A batch, as newer releases of SPDK can save it.
                for number, each in enumerate(call):
                    yield _json_call(f"{where}[{number}]", each)
            else:
                yield _json_call(where, call)


def _warn_of_foreign(place: str, subsystem: str, calls: Any) -> None:
    """One line, if there is anything in it: which of its calls make something, and do not here."""
    if not calls:
        return
    methods = [call.get("method") for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []
    making = sorted({method for method in methods if isinstance(method, str) and method not in _ONLY_TUNE})
    made = f", with what these make: {', '.join(making)}" if making else ""
    logger.warning("%s: subsystem %s is not one of ours, and is left out%s", place, subsystem, made)


def _json_call(where: str, call: Any) -> Entry:
    if not isinstance(call, dict) or not isinstance(call.get("method"), str):
        raise UsageError(f'{where}: not a call: it has no "method"')
    unknown = sorted(call.keys() - {"method", "params"})
    if unknown:
        raise UsageError(f"{where}: unknown key {unknown[0]!r}: a call has method and params")
    params = call.get("params")
    if params is not None and not isinstance(params, dict):
        raise UsageError(f"{where}.params: not an object")
    return Entry(call=Call(method=call["method"], params=params or {}), where=where)


# TOML -------------------------------------------------------------------------------------------------------------------


class _Lines:
    """Where each table of a TOML file begins, and each of its keys stands."""

    def __init__(self, name: str, text: str) -> None:
        self._name = name
        self._tables: dict[str, list[tuple[int, dict[str, int]]]] = {}
        keys: dict[str, int] = {}
        for number, line in enumerate(text.splitlines(), start=1):
            header = _HEADER.fullmatch(line)
            if header is not None:
                keys = {}
                self._tables.setdefault(header.group(1), []).append((number, keys))
            elif "=" in line:
                keys.setdefault(line.partition("=")[0].strip().strip("\"'"), number)

    def table(self, kind: str, index: int) -> str:
        tables = self._tables.get(kind, [])
        return f"{self._name}:{tables[index][0]}" if index < len(tables) else self._name

    def keys(self, kind: str, index: int) -> dict[str, str]:
        tables = self._tables.get(kind, [])
        return {key: f"{self._name}:{line}" for key, line in tables[index][1].items()} if index < len(tables) else {}


def _read_toml(name: str, text: str) -> Iterator[Entry]:
    try:
        document = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UsageError(f"{name}: not TOML: {error}") from error
    unknown = sorted(document.keys() - {"target", "bdev", "disk"})
    if unknown:
        raise UsageError(f"{name}: unknown table {unknown[0]!r}: known are [target], [[bdev]] and [[disk]]")
    lines = _Lines(name, text)
    for index, table in enumerate(_tables(name, document, "bdev")):
        yield from _bdev(lines, index, table)
    target = document.get("target", {})
    if not isinstance(target, dict):
        raise UsageError(f"{name}: target is not a table: write [target]")
    if target or "disk" in document:
        where = lines.table("target", 0)
        call = Call(method="ublk_create_target", params=target)
        yield Entry(call=call, where=where, lines=lines.keys("target", 0))
    for index, table in enumerate(_tables(name, document, "disk")):
        yield _disk(lines, index, table)


def _tables(name: str, document: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    tables = document.get(kind, [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise UsageError(f"{name}: {kind} is not a list of tables: write [[{kind}]]")
    return tables


def _bdev(lines: _Lines, index: int, table: dict[str, Any]) -> Iterator[Entry]:
    where, keys = lines.table("bdev", index), lines.keys("bdev", index)
    params = dict(table)
    kind = params.pop("kind", None)
    if not isinstance(kind, str):
        raise UsageError(f'{keys.get("kind", where)}: [[bdev]] has no kind: write for example kind = "malloc"')
    limits = params.pop("limits", None)
    if "size" in params:
        _count_blocks(keys.get("size", where), params)
    yield Entry(call=Call(method=f"bdev_{kind}_create", params=params), where=where, lines=keys)
    if limits is not None:
        if not isinstance(limits, dict) or "name" not in params:
            raise UsageError(f"{keys.get('limits', where)}: limits is a table, of a bdev with a name")
        call = Call(method="bdev_set_qos_limit", params={"name": params["name"], **limits})
        yield Entry(call=call, where=keys.get("limits", where))


def _count_blocks(where: str, params: dict[str, Any]) -> None:
    size = params.pop("size")
    block_size = params.setdefault("block_size", 512)
    if not isinstance(size, str) or type(block_size) is not int or block_size <= 0:
        raise UsageError(f'{where}: size is a text such as "64M"; for a number of blocks write num_blocks')
    try:
        length = parse_size(size)
    except UsageError as error:
        raise UsageError(f"{where}: size: {error}") from error
    if length % block_size:
        raise UsageError(f"{where}: size {size} is not a multiple of block_size {block_size}")
    params["num_blocks"] = length // block_size


def _disk(lines: _Lines, index: int, table: dict[str, Any]) -> Entry:
    where, keys = lines.table("disk", index), lines.keys("disk", index)
    unknown = sorted(table.keys() - _DISK_KEYS.keys())
    if unknown:
        known = ", ".join(_DISK_KEYS)
        raise UsageError(f"{keys.get(unknown[0], where)}: unknown key {unknown[0]!r} in [[disk]]: known are {known}")
    call = Call(method="ublk_start_disk", params={_DISK_KEYS[key]: value for key, value in table.items()})
    return Entry(call=call, where=where, lines={_DISK_KEYS.get(key, key): line for key, line in keys.items()})
