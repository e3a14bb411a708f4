"""One boot: QEMU and the file server, and the streams between them and us.

*Nothing is left.* All sockets are pairs or of the abstract kind, the initramfs is a memfd and the
scratch disk a file without a name, so there are no names to remove; the two child processes are
killed on the way out, and die with this process (PR_SET_PDEATHSIG) if it is itself killed.
"""

from __future__ import annotations

import os
import secrets
import selectors
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, suppress

from tests.kernel.guest.console import Console, Messages, write_all
from tests.kernel.guest.file_server import raise_descriptor_limit, virtiofsd_command
from tests.kernel.guest.host_tools import SETPRIV, located
from tests.kernel.guest.initramfs import initramfs
from tests.kernel.guest.kernels import Kernel
from tests.kernel.guest.options import Options
from tests.kernel.guest.qemu import qemu_command, scratch_arguments


class Machine:
    """One boot: the two processes and the streams between them and us. `close` ends all of it."""

    def __init__(self, kernel: Kernel, virtiofsd: Sequence[str], options: Options) -> None:
        self.nonce = secrets.token_hex(16)
        self.console = Console(self.nonce, live=options.console)
        # What QEMU and virtiofsd say themselves.
        self.diagnostics = Console(self.nonce, live=options.console)
        self.started = False
        # Ours and the guest's, in seconds, when its init began.
        self.clocks = (0.0, 0.0)
        self._kernel = kernel
        self._virtiofsd = virtiofsd
        self._options = options
        self._stack = ExitStack()
        self._selector = self._stack.enter_context(selectors.DefaultSelector())
        self._messages = Messages(nonce=self.nonce)

    def __enter__(self) -> Machine:
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_exception: object) -> None:
        self._stack.close()

    # -- starting

    def _spawn(self, command: Sequence[str], descriptors: Collection[int]) -> None:
        # A session of its own: Ctrl-C on the terminal reaches us only, and we end the rest.
        errors, errors_end = self._pair()
        process = subprocess.Popen(
            [located(SETPRIV), "--pdeathsig", "KILL", "--", *command],
            stdin=subprocess.DEVNULL,
            stdout=errors_end.fileno(),
            stderr=errors_end.fileno(),
            pass_fds=descriptors,
            start_new_session=True,
        )
        self._stack.callback(end_process, process)
        errors_end.close()
        self._selector.register(errors, selectors.EVENT_READ, self.diagnostics.feed)

    def _pair(self) -> tuple[socket.socket, socket.socket]:
        ours, theirs = socket.socketpair()
        self._stack.enter_context(ours)
        self._stack.enter_context(theirs)
        return ours, theirs

    def _start(self) -> None:
        raise_descriptor_limit()
        filesystem = self._start_virtiofsd()
        output, output_end = self._pair()
        console, console_end = self._pair()
        self._output = output
        self._selector.register(console, selectors.EVENT_READ, self.console.feed)
        self._selector.register(output, selectors.EVENT_READ, None)
        image = self._initramfs()
        ends = [filesystem, output_end, console_end]
        descriptors = [image, *(end.fileno() for end in ends)]
        command = qemu_command(
            self._kernel,
            self._options,
            image=image,
            filesystem=filesystem.fileno(),
            output=output_end.fileno(),
            console=console_end.fileno(),
        )
        if self._options.scratch_bytes is not None:
            scratch = self._scratch(self._options.scratch_bytes)
            descriptors.append(scratch)
            command += scratch_arguments(scratch)
        self._spawn(command, descriptors)
        # Ours must go, or the end of the machine would not be seen as the end of the streams.
        for end in ends:
            end.close()

    def _start_virtiofsd(self) -> socket.socket:
        """Start the file server; returns QEMU's end of the connection to it.

        The listener has a name of the abstract kind, and we connect before the server exists: it
        accepts one connection, the first, which is ours.
        """
        listener = self._stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind("")
        listener.listen(1)
        connection = self._stack.enter_context(socket.socket(socket.AF_UNIX))
        connection.connect(listener.getsockname())
        command = virtiofsd_command(self._virtiofsd, listener.fileno())
        self._spawn(command, [listener.fileno()])
        listener.close()
        return connection

    def _initramfs(self) -> int:
        descriptor = os.memfd_create("initramfs")
        self._stack.callback(os.close, descriptor)
        write_all(descriptor, initramfs(self._kernel, self._options.job(self.nonce)))
        return descriptor

    def _scratch(self, size_bytes: int) -> int:
        file = tempfile.TemporaryFile()  # noqa: SIM115 - the stack closes it
        self._stack.enter_context(file)
        file.truncate(size_bytes)
        return file.fileno()

    # -- running

    def events(self, deadline: float) -> Iterator[bytes | str | None]:
        """Output (bytes) and messages (str) as they come, None for news on the console.

        Ends when QEMU does. Raises TimeoutError at `deadline` (of the monotonic clock).
        """
        while True:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise TimeoutError
            ready = self._selector.select(remaining)
            gone = False
            for key, _events in ready:
                stream = key.fileobj
                assert isinstance(stream, socket.socket)
                data = receive(stream)
                if not data:
                    self._selector.unregister(stream)
                    gone = gone or stream is self._output
                elif key.data is not None:
                    key.data(data)
                    yield None
                else:
                    yield from self._messages.feed(data)
            if gone:
                self._read_last_words()
                return

    def _read_last_words(self) -> None:
        """QEMU is gone: read what it and virtiofsd still said, which is in the sockets."""
        while ready := self._selector.select(0.2):
            for key, _events in ready:
                assert isinstance(key.fileobj, socket.socket)
                if data := receive(key.fileobj):
                    key.data(data)
                else:
                    self._selector.unregister(key.fileobj)
            if not self._selector.get_map():
                return


def receive(stream: socket.socket) -> bytes:
    try:
        return stream.recv(1 << 16)
    except ConnectionResetError:
        return b""


def end_process(process: subprocess.Popen[bytes]) -> None:
    """Kill a child's whole session and wait for it."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
