"""The command line: ``python -m ublk_trio COMMAND``, installed as ``ublk-trio`` too.

What a command has to say goes to stdout, everything else to stderr. An error is one line that names the thing and the
mend; ``--debug`` adds the traceback. Exit codes are in `exit_codes`.

A command is named by where it is, and imported when it is called: most need neither the simulator nor the remote calls, which take as
long to import as all the rest. So the modules of commands import those within the functions that need them.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from typing import Annotated, NoReturn

import cyclopts
from cyclopts import App, Parameter

import ublk_trio
from ublk_trio.cli.exit_codes import ExitCode
from ublk_trio.errors import KernelUnavailableError, StuckError, UblkError, UsageError, error_line

app = App(
    name="ublk-trio",
    help="Linux block devices written in Python, served through the kernel's ublk driver.",
    version=ublk_trio.__version__,
    help_format="plaintext",
)
app.command("ublk_trio.cli.start:start")
app.command("ublk_trio.cli.recover:recover")
app.command("ublk_trio.cli.devices:list_devices", name="list")
app.command("ublk_trio.cli.devices:stop")
app.command("ublk_trio.cli.features:features")
app.command("ublk_trio.cli.doctor:doctor")
app.command("ublk_trio.cli.sim:sim")
app.command("ublk_trio.cli.rpc:rpc")
app.command("ublk_trio.cli.udev:udev_rule")
app.command("ublk_trio.cli.udev:node_owner")
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
    from ublk_trio.rpc import ErrorCode, NoServerError, RpcError

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
    given = sys.argv[1:] if arguments is None else arguments
    if "--version" not in given and all(word.startswith("-") for word in given):
        # The overview says what each command does.
        app.resolved_commands()
    try:
        code = app.meta(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except cyclopts.CycloptsError as error:
        print(f"ublk-trio: {' '.join(str(error).split())}", file=sys.stderr)
        code = ExitCode.USAGE
    sys.exit(int(code or 0))
