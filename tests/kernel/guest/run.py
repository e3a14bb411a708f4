"""One run: boot, follow the command to its end, and the verdict.

Who has read the init's ``exit`` has all the output: the machine is killed then, and there is no shutdown in which the end
could get lost.

*A wrong clock.* The guest measures the processor's clock against an emulated timer while it boots; on an
overloaded machine it can get that wrong by a factor of two and more. Its time-outs are then worth
nothing, so its clock is compared with ours before the command starts, and a boot with a fast one
is tried again.

*Early death.* Should `Oops: int3` (`qemu.py`) still come before the command has
started, exactly that is tried again, at most twice. Nothing else ever is.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Sequence

from tests.kernel.guest.console import write_all
from tests.kernel.guest.ending import Exit, Failure, note
from tests.kernel.guest.file_server import get_virtiofsd
from tests.kernel.guest.host_tools import require_tools
from tests.kernel.guest.kernels import Kernel, get_kernel
from tests.kernel.guest.machine import Machine
from tests.kernel.guest.options import Options

BOOT_SECONDS_MAX = 300.0
"""An emulated boot takes 6 to 10 s on an idle machine; beyond this it hangs."""

BOOTS_MAX = 3
"""The first, and two more after a boot that emulation spoilt."""

CLOCK_RATIO_MAX = 1.25
"""By how much the guest's clock may run faster than ours."""

CONSOLE_SYNC_SECONDS_MAX = 5.0
EARLY_DEATH = re.compile(r"Oops: int3\b")


class BadBoot(Exception):
    """A boot that emulation is known to spoil now and then, noticed before the command has started."""


def report_console(machine: Machine) -> None:
    said = machine.diagnostics.tail()
    text = machine.console.tail() + (f"\n-- QEMU and virtiofsd say:\n{said}" if said else "")
    print(f"-- the end of the guest's console:\n{text}\n--", file=sys.stderr, flush=True)


def guest_died(machine: Machine, why: str) -> Failure:
    report_console(machine)
    when = "after the command had started" if machine.started else "before the command started"
    return Failure(Exit.GUEST_DIED, f"the guest failed {when}: {why}")


def check_clock(machine: Machine, guest_now: float) -> None:
    """Raise `BadBoot` if the guest's clock runs fast: every time-out of the command would then come too early."""
    host_then, guest_then = machine.clocks
    host_seconds, guest_seconds = time.monotonic() - host_then, guest_now - guest_then
    # Slow is harmless, and seems so here whenever a message is late.
    if guest_seconds > CLOCK_RATIO_MAX * host_seconds + 0.1:
        raise BadBoot(f"the guest's clock is wrong: it counted {guest_seconds:.1f} s in {host_seconds:.1f} s")


def handle_message(machine: Machine, message: str, began: float) -> int | None:
    """Act on a message of the guest's init; the command's exit status if that is what it was."""
    word, _, rest = message.partition(" ")
    if word == "clock":
        machine.clocks = time.monotonic(), float(rest)
    elif word == "start":
        check_clock(machine, float(rest))
        machine.started = True
        note(f"the guest is up after {time.monotonic() - began:.1f} s, the command starts")
    elif word == "exit":
        return int(rest)
    elif word == "failed":
        raise guest_died(machine, rest)
    return None


def follow(machine: Machine, deadline: float) -> int:
    """Pass the command's output on until it ends; its exit status."""
    began = time.monotonic()
    boot_deadline = min(began + BOOT_SECONDS_MAX, deadline)
    events = machine.events(boot_deadline)
    while True:
        try:
            for event in events:
                if isinstance(event, bytes):
                    write_all(sys.stdout.fileno(), event)
                elif isinstance(event, str):
                    status = handle_message(machine, event, began)
                    if status is not None:
                        return status
                    events = machine.events(deadline)
                    break
                elif not machine.started and EARLY_DEATH.search(machine.console.text()):
                    raise BadBoot("the boot died of the known `Oops: int3` of emulation")
            else:
                where = "its console is above"
                raise guest_died(machine, f"the virtual machine ended by itself, {where}")
        except TimeoutError:
            if machine.started or deadline <= boot_deadline:
                raise
            why = f"it was not up within {BOOT_SECONDS_MAX:.0f} s: is this machine overloaded?"
            raise guest_died(machine, why) from None


def await_console(machine: Machine) -> None:
    """Let what the kernel said up to the command's end arrive: the port is faster."""
    try:
        for _event in machine.events(time.monotonic() + CONSOLE_SYNC_SECONDS_MAX):
            if machine.console.ended():
                return
    except TimeoutError:
        note("the console lags behind; complaints of the kernel may be incomplete")


def boot_once(kernel: Kernel, virtiofsd: Sequence[str], options: Options, deadline: float) -> int:
    with Machine(kernel, virtiofsd, options) as machine:
        try:
            status = follow(machine, deadline)
            if not machine.console.ended():
                await_console(machine)
        except TimeoutError:
            what = "the command was not done" if machine.started else "the guest was not up"
            mend = "a longer --timeout, or look why it hangs"
            limit = f"{options.timeout_seconds:g} s"
            raise Failure(Exit.TIMED_OUT, f"{what} within {limit}: it needs {mend}") from None
        finally:
            complaints = machine.console.complaints() if machine.started else ""
            if complaints:
                note("the kernel complained while the command ran:")
                print(complaints, file=sys.stderr, flush=True)
        if complaints and options.fail_on_kernel_warning and status == 0:
            return Exit.KERNEL_COMPLAINED
        return status


def run(options: Options) -> int:
    """Boot, run the command, and return the exit code for this process."""
    require_tools()
    kernel, virtiofsd = get_kernel(options.series), get_virtiofsd()
    how = "KVM" if options.kvm else "counted instructions" if options.icount else "emulation"
    cpus = 1 if options.icount else options.cpus
    note(f"kernel {kernel.release}, {cpus} CPUs, {how}")
    deadline = time.monotonic() + options.timeout_seconds
    why = ""
    for _attempt in range(BOOTS_MAX):
        try:
            return boot_once(kernel, virtiofsd, options, deadline)
        except BadBoot as bad:
            why = str(bad)
            note(why)
    raise Failure(Exit.GUEST_DIED, f"{BOOTS_MAX} bad boots, the last: {why}: try --cpus 1, or --kvm where there is one")
