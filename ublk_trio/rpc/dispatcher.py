"""The table of methods: names, typed parameters, functions; and which of them can be called now.

A table is a tuple of `Method`s, written out where its functions are. `Dispatcher.register` joins it with the object that the functions
work on. The wire, and whoever replays a saved configuration, call through the same `Dispatcher`.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable
from enum import Enum
from typing import Any, Generic, TypeVar

import attrs
import msgspec
import trio

from ublk_trio.rpc.errors import ErrorCode, RpcError
from ublk_trio.rpc.messages import parse_params, suggestion

logger = logging.getLogger("ublk_trio.rpc")

S = TypeVar("S")
P = TypeVar("P", bound=msgspec.Struct)


class State(Enum):
    """How far the server is."""

    #: It reads its configuration, or waits for ``framework_start_init``.
    STARTUP = "startup"
    RUNTIME = "runtime"


ANY_STATE = frozenset(State)


class NoParams(msgspec.Struct, forbid_unknown_fields=True):
    """What a method takes that takes nothing."""


class AnyParams(msgspec.Struct):
    """What a method takes that looks at nothing: whatever it is given."""


@attrs.frozen(kw_only=True, eq=False)
class Method(Generic[S, P]):
    """One method. `function` gets the registered service and the checked parameters; what it returns is the result.

    It fails with an `OSError` (its errno becomes the code), a `UsageError` (invalid parameters) or an `RpcError`.
    A method runs to its first wait before the connection's next request begins; so those that wait for nothing are
    over in the order in which they were sent.
    """

    name: str
    #: Its fields are the parameters, by their names on the wire. It must forbid unknown ones, unless it is `AnyParams`.
    params: type[P]
    function: Callable[[S, P], Awaitable[object]]
    #: Deprecated names, which still work.
    aliases: tuple[str, ...] = ()
    states: frozenset[State] = frozenset({State.RUNTIME})
    #: Cancelled when its client goes away: only for what nobody else has an interest in, such as a mere wait.
    ends_with_client: bool = False

    def __attrs_post_init__(self) -> None:
        strict = self.params.__struct_config__.forbid_unknown_fields
        assert strict or self.params is AnyParams, f"{self.name}: a misspelt parameter must not pass"


class Dispatcher:
    """Every method that can be called, by name and alias."""

    def __init__(self, *, state: State = State.RUNTIME) -> None:
        self._methods: dict[str, tuple[Method[Any, Any], Any]] = {}
        self._warned: set[str] = set()
        self._running = trio.Event()
        if state is State.RUNTIME:
            self._running.set()

    def register(self, methods: Iterable[Method[S, Any]], service: S) -> None:
        """Add a table, whose functions work on `service`. A name that is taken is a bug."""
        for method in methods:
            for name in (method.name, *method.aliases):
                assert name not in self._methods, f"two methods are called {name}"
                self._methods[name] = (method, service)

    @property
    def state(self) -> State:
        """Which methods can be called now."""
        return State.RUNTIME if self._running.is_set() else State.STARTUP

    def run(self) -> None:
        """Go over to `State.RUNTIME`; there is no way back."""
        self._running.set()

    async def wait_running(self) -> None:
        """Wait for `State.RUNTIME`."""
        await self._running.wait()

    def names(self, *, current: bool = False, include_aliases: bool = False) -> list[str]:
        """The methods' names, sorted; ``current``: only of those that can be called now."""
        return sorted(
            name
            for name, (method, _) in self._methods.items()
            if (include_aliases or name == method.name) and (not current or self.state in method.states)
        )

    def find(self, name: str) -> Method[Any, Any]:
        """The method of that name or alias. Raises `RpcError` (METHOD_NOT_FOUND, INVALID_STATE)."""
        method, _ = self._find(name)
        return method

    async def call(self, name: str, params: object = None) -> object:
        """Call a method with parameters as they came from JSON, and return its result.

        Raises `RpcError` for an unknown method, a wrong state or wrong parameters, else whatever the method raises.
        Waits only where the method does. Cancellation is the method's own matter.
        """
        method, service = self._find(name)
        if name != method.name and name not in self._warned:
            self._warned.add(name)
            logger.warning("the method %s is deprecated: use %s", name, method.name)
        return await method.function(service, parse_params(params, method.params))

    def _find(self, name: str) -> tuple[Method[Any, Any], Any]:
        found = self._methods.get(name)
        if found is None:
            hint = suggestion(name, self._methods)
            raise RpcError(ErrorCode.METHOD_NOT_FOUND, f"Method not found: {name[:100]!r}{hint}")
        if self.state not in found[0].states:
            when = "after" if self.state is State.STARTUP else "before"
            raise RpcError(
                ErrorCode.INVALID_STATE, f"{found[0].name} can only be called {when} the server has started up"
            )
        return found
