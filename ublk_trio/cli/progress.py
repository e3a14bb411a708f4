"""Live progress of a workload on stderr: a line that is redrawn on a terminal, nothing elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

from ublk_trio.workload import WorkloadReport


class Progress:
    """Shows reports while they change. Use as a context manager."""

    def __init__(self, *, seconds: float) -> None:
        self._seconds = seconds
        self._reports: list[WorkloadReport] = []
        console = Console(stderr=True)
        self._live = Live(get_renderable=self._render, console=console, transient=True) if console.is_terminal else None

    def add(self, report: WorkloadReport) -> None:
        """Show one more."""
        self._reports.append(report)

    def _render(self) -> Text:
        return Text("\n".join(str(report) for report in self._reports))

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
