"""QEMU's command line, and the kernel's.

*Without cmpxchg16b.* Under QEMU 7.2 (Debian 12) 3 of the first 17 boots of 6.12 died within two seconds,
by a double fault or a NULL pointer, with what looks like the low bits of a pointer in EFLAGS, in
two of them on the instruction behind a ``cmpxchg16b`` of the kernel's allocator. Likely that
instruction's emulation leaves wrong flags for an interrupt to save, and the `Oops: int3` that
others saw in one boot of ten is the same fault. A CPU without it (``-cx16``) makes the kernel do
without: none of 40 boots of it died since.
"""

from __future__ import annotations

from tests.kernel.guest.host_tools import QEMU, located
from tests.kernel.guest.kernels import Kernel
from tests.kernel.guest.options import Options

EMULATED_CPU = "max,-cx16,-la57"
"""Everything that QEMU can emulate, but ``cmpxchg16b``, and page tables of five levels, which are slower to walk than four."""


def accelerator_arguments(options: Options) -> list[str]:
    if options.kvm:
        return ["-accel", "kvm", "-cpu", "host", "-smp", str(options.cpus)]
    if options.icount:
        # The guest's clock counts instructions, 2 ns each. String moves are grossly slow in that.
        clock = ["-icount", "shift=1,sleep=off", "-smp", "1"]
        return ["-accel", "tcg,thread=single", "-cpu", f"{EMULATED_CPU},-erms,-fsrm", *clock]
    return ["-accel", "tcg,thread=multi", "-cpu", EMULATED_CPU, "-smp", str(options.cpus)]


KERNEL_ARGUMENTS = (
    "console=ttyS0",
    "loglevel=5",  # not `quiet`: a WARNING is of level 4, and `quiet` shows only what is below that
    "printk.devkmsg=on",
    "panic=-1",
    "mitigations=off",
    "nokaslr",
    "tsc=reliable",
    "random.trust_cpu=on",
)


def scratch_arguments(descriptor: int) -> list[str]:
    # cache=unsafe: nobody needs this disk after a crash, and the host's fsync is slow.
    drive = f"file=/proc/self/fd/{descriptor},format=raw,if=none,id=scratch"
    device = "virtio-blk-pci,drive=scratch,serial=ublk_trio-scratch"
    return ["-drive", f"{drive},cache=unsafe,discard=unmap", "-device", device]


def qemu_command(
    kernel: Kernel, options: Options, *, image: int, filesystem: int, output: int, console: int
) -> list[str]:
    """The command; the others are descriptors that it inherits: the initramfs, and one end of each stream."""
    return [
        located(QEMU),
        *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"),
        *("-machine", "q35,memory-backend=memory", "-m", options.memory),
        # virtiofsd reads and writes the guest's memory, so it must be shareable.
        *("-object", f"memory-backend-memfd,id=memory,size={options.memory},share=on"),
        *accelerator_arguments(options),
        *("-kernel", str(kernel.image), "-initrd", f"/proc/self/fd/{image}"),
        *("-append", " ".join(KERNEL_ARGUMENTS)),
        *("-chardev", f"socket,id=filesystem,fd={filesystem}"),
        *("-device", "vhost-user-fs-pci,queue-size=1024,chardev=filesystem,tag=host"),
        *("-chardev", f"socket,id=console,fd={console}", "-serial", "chardev:console"),
        *("-chardev", f"socket,id=output,fd={output}", "-device", "virtio-serial-pci"),
        *("-device", "virtserialport,nr=1,chardev=output,name=ublk_trio.output"),
    ]
