"""The methods that are about the server itself: what can be called, its version, its start and its end."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable
from typing import Any, Final

import attrs
import msgspec

import ublk_trio
from ublk_trio.rpc.dispatcher import ANY_STATE, Dispatcher, Method, NoParams, State
from ublk_trio.rpc.errors import ErrorCode, RpcError

#: What `spdk_kill_instance` sends.
KILL_SIGNALS: Final = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGQUIT,
    signal.SIGHUP,
    signal.SIGKILL,
    signal.SIGUSR1,
)


@attrs.frozen(kw_only=True)
class Framework:
    """What these methods work on. `kill` sends the process a signal; it belongs to whoever owns the process."""

    dispatcher: Dispatcher
    kill: Callable[[signal.Signals], object]


class GetMethods(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Parameters of ``rpc_get_methods``."""

    current: bool = False
    include_aliases: bool = False


class KillInstance(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Parameters of ``spdk_kill_instance``. A number in a string is taken as well, as SPDK did until 2026."""

    sig_name: str


async def get_methods(framework: Framework, params: GetMethods) -> list[str]:
    """The methods' names, sorted."""
    return framework.dispatcher.names(current=params.current, include_aliases=params.include_aliases)


async def get_version(framework: Framework, params: NoParams) -> dict[str, Any]:
    """This package's own version, in the form of SPDK's."""
    found = re.match(r"(\d+)\.(\d+)\.(\d+)(.*)", ublk_trio.__version__)
    assert found is not None, ublk_trio.__version__
    major, minor, patch, suffix = found.groups()
    fields = {"major": int(major), "minor": int(minor), "patch": int(patch), "suffix": suffix}
    return {"version": f"ublk_trio v{ublk_trio.__version__}", "fields": fields}


async def start_init(framework: Framework, params: NoParams) -> bool:
    """End the start-up: from now on the methods of the running server can be called."""
    framework.dispatcher.run()
    return True


async def wait_init(framework: Framework, params: NoParams) -> bool:
    """Wait for the end of the start-up."""
    await framework.dispatcher.wait_running()
    return True


async def kill_instance(framework: Framework, params: KillInstance) -> bool:
    """Send this process a signal."""
    for number in KILL_SIGNALS:
        if params.sig_name in (number.name, str(number.value)):
            framework.kill(number)
            return True
    names = ", ".join(number.name for number in KILL_SIGNALS)
    raise RpcError(ErrorCode.INVALID_PARAMS, f"params.sig_name: expected one of {names}, got {params.sig_name[:100]!r}")


FRAMEWORK_METHODS: Final[tuple[Method[Framework, Any], ...]] = (
    Method(name="rpc_get_methods", params=GetMethods, function=get_methods, states=ANY_STATE),
    Method(name="spdk_get_version", params=NoParams, function=get_version, states=ANY_STATE),
    Method(name="framework_start_init", params=NoParams, function=start_init, states=frozenset({State.STARTUP})),
    Method(name="framework_wait_init", params=NoParams, function=wait_init, states=ANY_STATE, ends_with_client=True),
    Method(name="spdk_kill_instance", params=KillInstance, function=kill_instance),
)
