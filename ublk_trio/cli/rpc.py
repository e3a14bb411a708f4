"""``rpc``: call a method of a running server."""

from __future__ import annotations

import json as json_module
from typing import Any, NoReturn

from ublk_trio.cli.exit_codes import ExitCode
from ublk_trio.cli.output import print_json
from ublk_trio.errors import UsageError
from ublk_trio.rpc import DEFAULT_PATH, call


async def rpc(
    method: str,
    /,
    *parameters: str,
    socket: str = DEFAULT_PATH,
    json: str | None = None,
) -> int:
    """Call a method of a running server, and print its result as JSON.

    Parameters
    ----------
    method
        Its name; `rpc_get_methods` lists them.
    parameters
        key=value. A value that is JSON counts as that, anything else is a string.
    socket
        The socket of the server.
    json
        The parameters, or some of them, as a JSON object.
    """
    print_json(await call(socket, method, _parse_parameters(parameters, json)))
    return ExitCode.OK


def _parse_parameters(pairs: tuple[str, ...], json: str | None) -> dict[str, Any]:
    """What is to be sent. Raises `UsageError`."""
    parameters = _parse_object(json) if json is not None else {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise UsageError(f"{pair!r} is not a parameter: write key=value")
        if key in parameters:
            raise UsageError(f"parameter {key!r} is given twice: give it once")
        parameters[key] = _parse_value(value)
    return parameters


def _parse_object(text: str) -> dict[str, Any]:
    try:
        value = json_module.loads(text, parse_constant=_refuse)
    except ValueError as error:
        raise UsageError(f"--json is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UsageError("--json is not an object: write {…}")
    return value


def _parse_value(text: str) -> Any:
    try:
        return json_module.loads(text, parse_constant=_refuse)
    except ValueError:
        return text


def _refuse(name: str) -> NoReturn:
    """Python's parser takes NaN and Infinity, which JSON does not have."""
    raise ValueError(f"{name} is not JSON")
