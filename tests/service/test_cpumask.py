"""A cpumask means the same to `parse_cpumask` as to Linux and to SPDK's programs, and what is none is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ublk_trio import UsageError
from ublk_trio.service.cpumask import format_cpumask, format_list, parse_cpumask

ALL = range(300)


@pytest.mark.parametrize(
    ("text", "cpus"),
    [
        ("0x3", {0, 1}),
        ("3", {0, 1}),
        ("0XF0", {4, 5, 6, 7}),
        (" 0x1 ", {0}),
        ("00000000,0000000a", {1, 3}),
        ("[0]", {0}),
        ("[0,2-4]", {0, 2, 3, 4}),
        ("[ 1 - 2 , 7 ]", {1, 2, 7}),
        ("[3,3,3]", {3}),
    ],
)
def test_forms(text: str, cpus: set[int]) -> None:
    """Hexadecimal with or without 0x, in Linux's groups, and lists in brackets."""
    assert parse_cpumask(text, allowed=ALL) == cpus


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "0",
        "0x",
        "0x0",
        "x",
        "0xg",
        "-1",
        ",",
        "1.5",
        "1\n2",
        "0x٣",
        "0x1" + "0" * 80,
        "f" * 5000,
        "[]",
        "[",
        "[1",
        "1]",
        "[1,]",
        "[1--2]",
        "[2-1]",
        "[a]",
        "[-1]",
        "[0-300]",
        "[99999]",
        "[123456]",
        "[٣]",
    ],
)
def test_refusals(text: str) -> None:
    """What is empty, malformed, or names a CPU that there is not, is one line that says so."""
    with pytest.raises(UsageError) as raised:
        parse_cpumask(text, allowed=ALL)
    assert "cpumask" in str(raised.value)
    assert len(str(raised.value)) < 6000
    assert "\n" not in str(raised.value).replace(text, "") or "\n" in text


@given(st.sets(st.integers(0, 299), min_size=1))
def test_both_forms_read_back(cpus: set[int]) -> None:
    """What is printed is read back as the same set."""
    assert parse_cpumask(format_cpumask(cpus), allowed=ALL) == cpus
    assert parse_cpumask(format_list(cpus), allowed=ALL) == cpus
