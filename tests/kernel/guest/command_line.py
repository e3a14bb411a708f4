"""The command line of ``vm.py``."""

from __future__ import annotations

import argparse
import os
import re
import signal
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from tests.kernel.guest.ending import Exit, Failure, Stopped, note
from tests.kernel.guest.file_server import get_virtiofsd
from tests.kernel.guest.host_tools import apt_get_install, missing_tools, require_tools
from tests.kernel.guest.kernels import SUITES, get_kernel
from tests.kernel.guest.options import Options
from tests.kernel.guest.run import run


def size_in_bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+)([KMGT]?)", text)
    if match is None or int(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write for example 512M or 4G")
    return int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}[match[2]]


def memory_size(text: str) -> str:
    size_in_bytes(text)
    return text


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def existing_directory(text: str) -> Path:
    path = Path(text).absolute()
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is not a directory")
    return path


def assignment(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII) is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vm.py",
        description="Run a command as root under a real kernel that has ublk_drv.",
        epilog="exit codes besides the command's own: "
        + ", ".join(f"{code.value} {code.name.lower().replace('_', ' ')}" for code in Exit),
    )
    commands = parser.add_subparsers(dest="action", required=True)
    run_parser = commands.add_parser("run", help="boot, run COMMAND, exit with its exit code")
    add = run_parser.add_argument
    add("--kernel", choices=SUITES, required=True)
    add("--cpus", type=positive, default=2, metavar="N")
    add("--memory", type=memory_size, default="4G", metavar="SIZE")
    add("--timeout", type=positive, default=900, metavar="SECONDS", help="boot and command")
    add("--icount", action="store_true", help="a clock that counts instructions; one CPU")
    add("--kvm", action="store_true", help="use KVM instead of emulation")
    add("--udev", action="store_true", help="run systemd-udevd in the guest")
    add("--console", action="store_true", help="the guest's console on stderr, as it comes")
    add("--scratch", type=size_in_bytes, metavar="SIZE", help="a disk: $UBLK_TRIO_SCRATCH")
    add("--fail-on-kernel-warning", action="store_true", help="exit 121 if the kernel complains")
    add("--cwd", type=existing_directory, metavar="DIR", help="default: where you are")
    add("--env", type=assignment, action="append", default=[], metavar="NAME=VALUE")
    run_parser.usage = "vm.py run --kernel VERSION [option]... -- COMMAND [ARG]..."
    fetch_parser = commands.add_parser("fetch", help="only bring kernels into the cache")
    fetch_parser.add_argument("--kernel", choices=SUITES, action="append", required=True)
    commands.add_parser("check", help="say what this machine lacks, and how to mend it")
    return parser


def run_options(parser: argparse.ArgumentParser, asked: argparse.Namespace, command: list[str]) -> Options:
    if not command:
        parser.error("run needs -- and a COMMAND after it")
    if asked.icount and asked.kvm:
        parser.error("--icount counts emulated instructions: it cannot go with --kvm")
    passed = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return Options(
        series=asked.kernel,
        cpus=asked.cpus,
        memory=asked.memory,
        timeout_seconds=asked.timeout,
        icount=asked.icount,
        kvm=asked.kvm,
        udev=asked.udev,
        console=asked.console,
        scratch_bytes=asked.scratch,
        fail_on_kernel_warning=asked.fail_on_kernel_warning,
        directory=asked.cwd or Path.cwd(),
        environment={**passed, **dict(asked.env)},
        command=command,
    )


def check() -> int:
    missing = list(missing_tools())
    for problem, _package in missing:
        print(problem)
    if missing:
        print("mend: " + apt_get_install([package for _problem, package in missing]))
    return Exit.HOST_NOT_READY if missing else 0


def fetch(series: Sequence[str]) -> int:
    require_tools()
    for one in series:
        print(f"{one}: {get_kernel(one).release}")
    print("virtiofsd: " + get_virtiofsd()[-1])
    return 0


def act(arguments: list[str]) -> int:
    own, command = arguments, []
    if "--" in arguments:
        split = arguments.index("--")
        own, command = arguments[:split], arguments[split + 1 :]
    parser = build_parser()
    asked = parser.parse_args(own)
    if asked.action == "check":
        return check()
    if asked.action == "fetch":
        return fetch(asked.kernel)
    return run(run_options(parser, asked, command))


def stop(signal_number: int, _frame: FrameType | None) -> NoReturn:
    for number in STOP_SIGNALS:  # from here on only the way out, which is short
        signal.signal(number, signal.SIG_IGN)
    raise Stopped(signal_number)


STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main(arguments: list[str]) -> int:
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, stop)
    try:
        return act(arguments)
    except Failure as failure:
        note(str(failure))
        return failure.code
    except Stopped as stopped:
        note(f"stopped by {signal.Signals(stopped.signal_number).name}")
        return 128 + stopped.signal_number
    except BrokenPipeError:
        return 128 + signal.SIGPIPE
