"""Backends by name: ``kind:argument[,key=value…]``, as on the command line and in the configuration.

`KINDS` lists what there is, with a line of help each; `register` adds to it. A comma belongs to the argument unless
``key=`` follows it, so most paths need no care; one that holds ``,word=`` can't be written as a SPEC.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import attrs

from ublk_trio.backends.base import Backend
from ublk_trio.backends.ceph import CephCluster
from ublk_trio.backends.file import File
from ublk_trio.backends.memory import Memory
from ublk_trio.backends.null import Null
from ublk_trio.backends.rbd import Rbd
from ublk_trio.backends.sizes import format_size, parse_size
from ublk_trio.errors import UsageError

__all__ = ["KINDS", "Kind", "Option", "format_size", "parse_backend", "parse_size", "register"]

_OPTION: Final = re.compile(r",(?=[A-Za-z_][A-Za-z0-9_-]*=)")


@attrs.frozen(kw_only=True)
class Option:
    """One ``key=value``: `parse` turns the text into what the backend's keyword takes, or raises `UsageError`."""

    parse: Callable[[str], Any]
    help: str


@attrs.frozen(kw_only=True)
class Kind:
    """One kind of backend that a SPEC can name.

    `make` is called with the parsed argument, and the given options by keyword; it must not block.
    """

    name: str
    argument: str
    help: str
    make: Callable[..., Backend]
    parse_argument: Callable[[str], Any] = str
    options: Mapping[str, Option] = attrs.field(factory=dict)

    @property
    def form(self) -> str:
        """How a SPEC of this kind is written: ``memory:SIZE[,block_size=…]``."""
        return f"{self.name}:{self.argument}" + "".join(f"[,{key}=…]" for key in sorted(self.options))


#: Every kind, by name.
KINDS: Final[dict[str, Kind]] = {}


def register(kind: Kind) -> None:
    """Adds a kind to `KINDS`. Raises `UsageError` when the name is taken or can't stand in front of a colon."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", kind.name):
        raise UsageError(f"backend kind {kind.name!r}: use lower case letters, digits and _, starting with a letter")
    if kind.name in KINDS:
        raise UsageError(f"backend kind {kind.name!r} is registered already: choose another name")
    KINDS[kind.name] = kind


def parse_backend(spec: str) -> Backend:
    """The backend that `spec` describes, not opened.

    Raises `UsageError` with one line that names what is wrong and what would be right. `BackendError` from a backend's
    constructor passes through (memory larger than the address space).
    """
    name, colon, rest = spec.partition(":")
    kind = KINDS.get(name)
    if kind is None:
        raise UsageError(f"unknown backend {name!r}: {_known(name, KINDS)}")
    if not colon or not rest:
        raise UsageError(f"backend {spec!r}: {kind.argument} is missing: write {kind.form}")
    argument, *pairs = _OPTION.split(rest)
    if not argument or argument.startswith(",") or _OPTION.match(f",{argument}"):
        raise UsageError(f"backend {spec!r}: {kind.argument} is missing: write {kind.form}")
    try:
        parsed = kind.parse_argument(argument)
    except UsageError as error:
        raise UsageError(f"backend {spec!r}: {error}") from error
    return kind.make(parsed, **_parse_options(spec, kind, pairs))


def _parse_options(spec: str, kind: Kind, pairs: Iterable[str]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for pair in pairs:
        key, _, value = pair.partition("=")
        option = kind.options.get(key)
        if option is None:
            raise UsageError(f"backend {spec!r}: unknown option {key!r}: {_known(key, kind.options)}")
        if key in options:
            raise UsageError(f"backend {spec!r}: option {key!r} is given twice: give it once")
        try:
            options[key] = option.parse(value)
        except UsageError as error:
            raise UsageError(f"backend {spec!r}: {key}: {error}") from error
    return options


def _known(name: str, known: Iterable[str]) -> str:
    names = sorted(known)
    close = difflib.get_close_matches(name.lower(), names, n=1)
    return f"known are {', '.join(names)}" + (f"; did you mean {close[0]}?" if close else "")


def _parse_switch(text: str) -> bool:
    if text not in ("on", "off"):
        raise UsageError(f"{text!r} is not a switch: write on or off")
    return text == "on"


def _parse_image(text: str) -> tuple[str, str, str]:
    """Pool, namespace and image, written as Ceph's rbd takes them."""
    parts = text.split("/")
    if len(parts) not in (2, 3) or not all(parts):
        raise UsageError(f"{text!r} names no image: write POOL/IMAGE or POOL/NAMESPACE/IMAGE")
    return parts[0], parts[1] if len(parts) == 3 else "", parts[-1]


def _make_rbd(
    place: tuple[str, str, str], *, config_file: str | None = None, user: str | None = None, **options: Any
) -> Rbd:
    pool, namespace, image = place
    cluster = CephCluster(user=user, config_file=config_file)
    return Rbd(pool, image, namespace=namespace, cluster=cluster, **options)


_BLOCK_SIZE: Final = Option(parse=parse_size, help="logical block: 512, 1K, 2K or 4K")

register(
    Kind(
        name="memory",
        argument="SIZE",
        help="a sparse disk in this process's memory; gone when the process ends",
        make=Memory,
        parse_argument=parse_size,
        options={"block_size": _BLOCK_SIZE},
    )
)
register(
    Kind(
        name="null",
        argument="SIZE",
        help="keeps nothing: reads give zeroes, writes are dropped; to measure everything but the disk",
        make=Null,
        parse_argument=parse_size,
        options={"block_size": _BLOCK_SIZE},
    )
)
register(
    Kind(
        name="file",
        argument="PATH",
        help="a regular file, of the size that the disk shall have, or another block device",
        make=File,
        options={
            "direct": Option(parse=_parse_switch, help="on bypasses the page cache (O_DIRECT)"),
            "read_only": Option(parse=_parse_switch, help="on refuses writes, and shares the file with other readers"),
            "block_size": Option(parse=parse_size, help="logical block; left out, the smallest that the file allows"),
        },
    )
)
register(
    Kind(
        name="rbd",
        argument="POOL/[NAMESPACE/]IMAGE",
        help="an image of a Ceph cluster, by Ceph's librbd (Debian's librbd1)",
        make=_make_rbd,
        parse_argument=_parse_image,
        options={
            "user": Option(parse=str, help="who to be, without client.; left out, admin"),
            "config_file": Option(parse=str, help="Ceph's configuration; left out, where Ceph's programs look for it"),
            "read_only": Option(parse=_parse_switch, help="on opens it for reading"),
            "block_size": _BLOCK_SIZE,
        },
    )
)
