"""The command line: ``python -m ublk_trio COMMAND``, installed as ``ublk-trio`` too.

What a command has to say goes to stdout, everything else to stderr. An error is one line that names the thing and the
mend; ``--debug`` adds the traceback. Exit codes are in `exit_codes`.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from typing import Annotated, NoReturn

import cyclopts
from cyclopts import App, Parameter

import ublk_trio
from ublk_trio.cli import devices, doctor, features, recover, rpc, sim, start, udev
from ublk_trio.cli.exit_codes import ExitCode
from ublk_trio.errors import KernelUnavailableError, StuckError, UblkError, UsageError, error_line
from ublk_trio.rpc import ErrorCode, NoServerError, RpcError

app = App(
    name="ublk-trio",
    help="Linux block devices written in Python, served through the kernel's ublk driver.",
    version=ublk_trio.__version__,
    help_format="plaintext",
)
app.command(start.start)
app.command(recover.recover)
app.command(devices.list_devices, name="list")
app.command(devices.stop)
app.command(features.features)
app.command(doctor.doctor)
app.command(sim.sim)
app.command(rpc.rpc)
app.command(udev.udev_rule)
app.command(udev.node_owner)
app.meta.group_parameters = cyclopts.Group("Global options", sort_key=0)


@app.meta.default
def _launch(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    debug: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Run a command.

    Parameters
    ----------
    debug
        Show tracebacks, and log what the engine does.
    """
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.DEBUG if debug else logging.WARNING,
        format="%(levelname)s: %(message)s" if not debug else "%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    try:
        code = app(tokens, backend="trio", exit_on_error=False, print_error=False, result_action="return_value")
    except (UblkError, OSError, cyclopts.CycloptsError, KeyboardInterrupt, BaseExceptionGroup) as error:
        if debug or not _is_expected(error):
            raise
        return _report(error)
    return code if isinstance(code, int) else ExitCode.OK


_EXPECTED = (UblkError, OSError, cyclopts.CycloptsError, KeyboardInterrupt)


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for each in error.exceptions:
            yield from _leaves(each)
    else:
        yield error


def _is_expected(error: BaseException) -> bool:
    return all(isinstance(leaf, _EXPECTED) for leaf in _leaves(error))


def _report(group: BaseException) -> ExitCode:
    """One line per error on stderr; the exit code of the first."""
    codes = []
    for error in _leaves(group):
        print(f"ublk-trio: {_line(error)}", file=sys.stderr)
        codes.append(_exit_code(error))
    return codes[0]


def _line(error: BaseException) -> str:
    return "interrupted" if isinstance(error, KeyboardInterrupt) else error_line(error)


def _exit_code(error: BaseException) -> ExitCode:
    match error:
        case RpcError() if error.code in (ErrorCode.METHOD_NOT_FOUND, ErrorCode.INVALID_PARAMS):
            return ExitCode.USAGE
        case UsageError() | cyclopts.CycloptsError():
            return ExitCode.USAGE
        case KernelUnavailableError() | NoServerError():
            return ExitCode.UNAVAILABLE
        case StuckError():
            return ExitCode.STUCK
        case KeyboardInterrupt():
            return ExitCode.INTERRUPTED
        case _:
            return ExitCode.FAILED


def main(arguments: list[str] | None = None) -> NoReturn:
    """Entry point of ``ublk-trio`` and ``python -m ublk_trio``."""
    try:
        code = app.meta(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except cyclopts.CycloptsError as error:
        print(f"ublk-trio: {' '.join(str(error).split())}", file=sys.stderr)
        code = ExitCode.USAGE
    sys.exit(int(code or 0))
