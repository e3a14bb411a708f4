"""Requests and answers: JSON-RPC 2.0 as a program reads and writes it, without any stream.

Two parsers see a request. msgspec's is strict: it refuses what is not UTF-8, lone surrogates, NaN, numbers that do not fit. Python's
own is the one that can tell of a key that is given twice, which is a mistake here, as it is for SPDK. Then msgspec checks types.

Answers are ASCII: some clients decode what they read piece by piece, and would trip over a character that a read cut in two.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any, Final, Literal, TypeVar

import attrs
import msgspec
import msgspec.inspect

from ublk_trio.rpc.errors import ErrorCode, RpcError, one_line

P = TypeVar("P")

#: The id of an answer to something that has none.
NO_ID: Final = None
_FIELD: Final = re.compile(r"^Object (?P<what>missing required|contains unknown) field `(?P<field>.*)`$", re.DOTALL)


class _Object(dict[str, Any]):
    """A JSON object that remembers a key that was given twice."""

    twice: str | None = None


def _object(pairs: list[tuple[str, Any]]) -> _Object:
    made = _Object()
    for key, value in pairs:
        if key in made:
            made.twice = key
        made[key] = value
    return made


class _Envelope(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The members of a request. SPDK's server does without "jsonrpc", and refuses members that it does not know."""

    method: str
    jsonrpc: Literal["2.0"] = "2.0"
    params: dict[str, Any] | list[Any] | None = None
    id: str | int | float | msgspec.UnsetType | None = msgspec.UNSET


@attrs.frozen(kw_only=True)
class Request:
    """One call. `params` is an object, an array or None, as it came."""

    method: str
    params: Any
    id: str | int | float | None
    #: A notification (no id) is carried out and never answered, whatever comes of it.
    notification: bool


def decode(data: bytes) -> Any:
    """The JSON value. Raises `RpcError` (PARSE_ERROR)."""
    try:
        msgspec.json.decode(data)
        return json.loads(data, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise RpcError(ErrorCode.PARSE_ERROR, f"parse error: {_lower(str(error))}") from error


def parse_request(value: Any) -> Request:
    """The request that a decoded value is. Raises `RpcError` (INVALID_REQUEST)."""
    try:
        if isinstance(value, _Object) and value.twice is not None:
            raise _Wrong(f"{_quoted(value.twice)} is given twice")
        envelope = _convert(value, _Envelope, "")
    except _Wrong as wrong:
        raise RpcError(ErrorCode.INVALID_REQUEST, f"invalid request: {wrong}") from wrong
    notification = isinstance(envelope.id, msgspec.UnsetType)
    return Request(
        method=envelope.method,
        params=value.get("params"),  # as it came: msgspec makes new objects, which do not know what was given twice
        id=None if isinstance(envelope.id, msgspec.UnsetType) else envelope.id,
        notification=notification,
    )


def id_of(value: Any) -> str | int | float | None:
    """The id for the answer to a request that is wrong: its own, if that can be told."""
    found = value.get("id") if isinstance(value, dict) else None
    return found if isinstance(found, str | int | float) and not isinstance(found, bool) else NO_ID


def parse_params(params: Any, schema: type[P]) -> P:
    """The parameters as the method takes them; None is the same as none. Raises `RpcError` (INVALID_PARAMS).

    The message begins with the field and says what is wrong with it: ``params.num_queues: expected int, got str``.
    """
    try:
        _check_given_once(params, "params")
        return _convert({} if params is None else params, schema, "params")
    except _Wrong as wrong:
        raise RpcError(ErrorCode.INVALID_PARAMS, str(wrong)) from wrong


def result_text(id: str | int | float | None, result: object) -> str:
    """An answer. Raises `ValueError` or `TypeError` for a result that JSON does not have."""
    return _encode({"jsonrpc": "2.0", "id": id, "result": msgspec.to_builtins(result, str_keys=True)})


def error_text(id: str | int | float | None, error: RpcError) -> str:
    """An answer that says what went wrong."""
    return _encode({"jsonrpc": "2.0", "id": id, "error": {"code": error.code, "message": error.message}})


def request_text(method: str, params: object, id: int) -> str:
    """A request."""
    given = {} if params is None else {"params": msgspec.to_builtins(params, str_keys=True)}
    return _encode({"jsonrpc": "2.0", "method": method, "id": id, **given})


def _encode(message: dict[str, Any]) -> str:
    return json.dumps(message, allow_nan=False)


def suggestion(name: str, known: Iterable[str]) -> str:
    """``; did you mean NAME?``, or nothing."""
    close = difflib.get_close_matches(name[:100], sorted(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


class _Wrong(Exception):
    """A value does not fit; the text names the field and what is wrong."""


def _convert(value: Any, schema: type[P], root: str) -> P:
    try:
        return msgspec.convert(value, schema, strict=True)
    except msgspec.ValidationError as error:
        raise _Wrong(_explain(str(error), schema, root)) from error


def _explain(text: str, schema: type[object], root: str) -> str:
    """msgspec's text with the field in front: ``Expected `int`, got `str` - at `$.depth` ``."""
    # A field's name is the client's and may hold anything, so nothing here may take longer than its length allows.
    what, at, place = text.rpartition(" - at `")
    if not at:
        what, place = text, ""
    inner = place.removeprefix("key in ").removeprefix("$").removesuffix("`")
    path = root + inner
    if field := _FIELD.match(what):
        name, unknown = field["field"], field["what"] == "contains unknown"
        # Only the fields of the outermost object are looked up: a schema within it would have to be found first.
        what = f"unknown{_known(name, [] if inner else list(_fields(schema)))}" if unknown else "missing"
        path = f"{path}.{name[:100]}"
    elif what.startswith("Invalid enum value"):
        what = _lower(what) + _known("", _choices(schema, inner.removeprefix(".")))
    else:
        what = _lower(what.replace("`", ""))
    return f"{path.removeprefix('.')}: {what}" if path else what


def _known(name: str, known: Sequence[str]) -> str:
    return (f"; known are {', '.join(known)}" if known else "") + suggestion(name, known)


def _fields(schema: type[object]) -> dict[str, msgspec.inspect.Type]:
    info = msgspec.inspect.type_info(schema)
    assert isinstance(info, msgspec.inspect.StructType)
    return {field.encode_name: field.type for field in info.fields}


def _choices(schema: type[object], field: str) -> Sequence[str]:
    """The values that a field can have, if they are few and it is the outermost object's."""
    kind = _fields(schema).get(field)
    members = kind.types if isinstance(kind, msgspec.inspect.UnionType) else (kind,)
    found: list[str] = []
    for member in members:
        if isinstance(member, msgspec.inspect.LiteralType):
            found += map(str, member.values)
        elif isinstance(member, msgspec.inspect.EnumType):
            found += [str(choice.value) for choice in member.cls]
    return found


def _check_given_once(value: Any, path: str) -> None:
    """Raises if a key is given twice anywhere within. Nesting is bounded by the splitter."""
    if isinstance(value, list):
        for index, item in enumerate(value):
            _check_given_once(item, f"{path}[{index}]")
    elif isinstance(value, dict):
        if isinstance(value, _Object) and value.twice is not None:
            raise _Wrong(f"{path}.{value.twice}: given twice")
        for key, item in value.items():
            if isinstance(item, dict | list):
                _check_given_once(item, f"{path}.{key}")


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:] if text[1:2].islower() else text


def _quoted(name: str) -> str:
    return repr(one_line(name)[:100])
