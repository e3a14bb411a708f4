"""What goes wrong on the wire, and the code that it has there.

Codes of -32768 and below are JSON-RPC's, all others are SPDK's: ``-1`` for a method that cannot be called yet or any more,
``-errno`` for what the operating system, a backend or a device refused. So ``-1`` is EPERM as well; the text tells them apart.
"""

from __future__ import annotations

import errno
import logging
from enum import IntEnum

from ublk_trio.errors import KernelUnavailableError, StuckError, UblkError, UsageError, errno_name, error_line
from ublk_trio.nursery import single_error

logger = logging.getLogger("ublk_trio.rpc")

#: Characters of a message: it may quote what the client sent.
MESSAGE_CHARACTERS_MAX = 500


class ErrorCode(IntEnum):
    """The codes that are not an errno."""

    #: What came is not JSON, or breaks a bound. The connection is closed: nobody knows where the next request begins.
    PARSE_ERROR = -32700
    #: JSON, but no request.
    INVALID_REQUEST = -32600
    #: There is no such method.
    METHOD_NOT_FOUND = -32601
    #: The parameters are not what the method takes; the message begins with the field.
    INVALID_PARAMS = -32602
    #: A bug of the server; its log has the traceback.
    INTERNAL_ERROR = -32603
    #: There is such a method, but it can only be called before, or only after, the server has started up.
    INVALID_STATE = -1


#: The name of each that is no errno as well.
_NAMES = {code.value: code.name for code in ErrorCode if code is not ErrorCode.INVALID_STATE}


class RpcError(UblkError):
    """A call failed: ``.code`` is its code on the wire, ``.message`` one line.

    Raised by `call` for what the server answered; a method may raise it to choose its code.
    """

    def __init__(self, code: int, message: str) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = one_line(message)

    @property
    def name(self) -> str:
        """``INVALID_PARAMS``, ``ENODEV``."""
        return _NAMES.get(self.code) or errno_name(self.code)

    def __str__(self) -> str:
        return self.message if self.message.startswith(self.name) else f"{self.name} ({self.code}): {self.message}"


class NoServerError(UblkError):
    """Nobody answers at the socket, or the server went away before its answer; the message says what to start."""


def one_line(text: str) -> str:
    """The text on one line, of a bounded length."""
    line = " ".join(text.split())
    return line if len(line) <= MESSAGE_CHARACTERS_MAX else line[: MESSAGE_CHARACTERS_MAX - 1] + "…"


def explain(error: BaseException) -> RpcError:
    """What a client is told about an exception of a method. One that nobody expected is logged with its traceback."""
    if isinstance(error, BaseExceptionGroup):
        single = single_error(error)
        if single is not None:
            return explain(single)
    match error:
        case RpcError():
            return error
        case UsageError():
            return RpcError(ErrorCode.INVALID_PARAMS, str(error))
        case KernelUnavailableError():
            return RpcError(-error.errno, str(error))
        case StuckError():
            return RpcError(-errno.ETIMEDOUT, str(error))
        case OSError() if error.errno:
            return RpcError(-abs(error.errno), error_line(error))
    logger.error("a call failed with %s, which is a bug", type(error).__name__, exc_info=error)
    return RpcError(ErrorCode.INTERNAL_ERROR, f"internal error: {type(error).__name__}; the server's log says more")
