"""A table of states and of what can happen in each: how often it was done there, and that the rest was refused."""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Generic, Protocol, TypeVar

import attrs

from ublk_trio.kernel_sim import linux_errno


class Named(Protocol):
    """What can head a row or a column."""

    @property
    def name(self) -> str | None: ...


Row = TypeVar("Row", bound=Named)
Column = TypeVar("Column", bound=Named)
Cell = tuple[Row, Column]


@attrs.define(kw_only=True)
class Table(Generic[Row, Column]):
    """``legal`` says what may succeed; the counts are what runs did."""

    rows: Sequence[Row]
    columns: Sequence[Column]
    legal: Collection[tuple[Row, Column]]
    #: Legal cells that runs cannot reach, with the reason; what is counted there was done in another way.
    elsewhere: Mapping[tuple[Row, Column], str] = attrs.Factory(dict)
    accepted: Counter[tuple[Row, Column]] = attrs.Factory(Counter)
    #: By cell and by what the refusal said.
    refused: Counter[tuple[tuple[Row, Column], str]] = attrs.Factory(Counter)
    #: Cells of rows or columns that the table does not have.
    unknown: set[str] = attrs.Factory(set)

    def count(self, row: Row, column: Column, refusal: str = "") -> None:
        """It was done once: accepted, or refused with ``refusal``."""
        if row not in self.rows or column not in self.columns:
            self.unknown.add(f"{row!r} x {column!r}")
        elif refusal:
            self.refused[(row, column), refusal] += 1
        else:
            self.accepted[row, column] += 1

    def count_result(self, row: Row, column: Column, result: int) -> None:
        """It was done once: with a result of the kernel's, which is a refusal when it is negative."""
        self.count(row, column, errno_name(-result) if result < 0 else "")

    def refusals(self, row: Row, column: Column) -> dict[str, int]:
        return {why: times for (cell, why), times in sorted(self.refused.items(), key=str) if cell == (row, column)}

    def problems(self) -> list[str]:
        """Whatever keeps the table from being covered to 100 %, in words; nothing when it is."""
        found = [f"there is no cell for {what}" for what in sorted(self.unknown)]
        for row in self.rows:
            for column in self.columns:
                cell, times = (row, column), self.accepted[row, column]
                where = f"{row.name} x {column.name}"
                if cell in self.legal:
                    found += [f"{where}: legal, and never reached"] * (not times)
                else:
                    found += [f"{where}: illegal, and accepted"] * bool(times)
                    found += [f"{where}: illegal, and never tried"] * (not times and not self.refusals(row, column))
        return found

    def markdown(self, *, corner: str, row_names: Mapping[Row, str] | None = None) -> list[str]:
        """The table, and above it how much of it was reached."""
        cells = [(row, column) for row in self.rows for column in self.columns]
        legal = [cell for cell in cells if cell in self.legal]
        illegal = [cell for cell in cells if cell not in self.legal]
        reached = sum(self.accepted[cell] > 0 for cell in legal)
        rejected = sum(not self.accepted[cell] and bool(self.refusals(*cell)) for cell in illegal)
        lines = [
            f"Legal cells: {reached} of {len(legal)} reached. Illegal cells: {rejected} of {len(illegal)} rejected.",
            "",
            f"| {corner} | " + " | ".join(column.name or "" for column in self.columns) + " |",
            "|---" * (len(self.columns) + 1) + "|",
        ]
        for row in self.rows:
            name = row_names[row] if row_names is not None else row.name
            lines.append(f"| {name} | " + " | ".join(self._cell(row, column) for column in self.columns) + " |")
        return lines

    def _cell(self, row: Row, column: Column) -> str:
        parts = [f"**{self.accepted[row, column]}**"] if (row, column) in self.legal else []
        parts += [f"{why} {times}" for why, times in self.refusals(row, column).items()]
        return ", ".join(parts) + (" (see below)" if (row, column) in self.elsewhere else "")


def errno_name(code: int) -> str:
    """The symbol of a Linux errno, on any machine."""
    for name in ("EOPNOTSUPP",):
        if linux_errno.number(name) == code:
            return name
    return errno.errorcode[code]
