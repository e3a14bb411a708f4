"""Whatever a client sends gets the right answer, and leaves the server unharmed.

``corpus/*.jsonl`` has a case a line:

- ``name``;
- ``send``: what is sent, piece by piece: a text; ``{"text" or "hex": …, "times": N}``; ``{"pause": SECONDS}``; ``{"end": true}`` for the
  end of what the client sends;
- ``answers``: in their order, ``{"id", "result"}``, or ``{"id", "code", "says"}`` with a part of the message; a list for a batch. Where
  the value is huge: its ``length`` or ``depth``, the ``id_length``; ``any_id`` where the order is open;
- ``then``: whether the server leaves the connection ``open``, or has it ``closed``;
- ``clients``: how many do so at once (1); ``logs``: a part of what is logged; everything that is logged must be expected.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from tests.rpc.harness import Client, Served, open_files, served

CORPUS = Path(__file__).parent / "corpus"
CASES = [
    {"kind": file.stem, **json.loads(line)}
    for file in sorted(CORPUS.glob("*.jsonl"))
    for line in file.read_text().splitlines()
]
#: What is logged about clients that are at fault, as a single line each.
ABOUT_CLIENTS = "closing the connection"


def bytes_of(piece: Any) -> bytes:
    if isinstance(piece, str):
        return piece.encode()
    data = bytes.fromhex(piece["hex"]) if "hex" in piece else piece["text"].encode()
    return data * int(piece.get("times", 1))


async def send(client: Client, pieces: list[Any]) -> None:
    for piece in pieces:
        try:
            if isinstance(piece, dict) and "pause" in piece:
                await trio.sleep(piece["pause"])
            elif isinstance(piece, dict) and "end" in piece:
                await client.finish()
            else:
                await client.send(bytes_of(piece))
        except trio.BrokenResourceError:
            return  # the server has seen enough


def depth_of(value: Any) -> int:
    return 1 + max(map(depth_of, value), default=0) if isinstance(value, list) else 0


def check(answer: Any, wanted: Any) -> None:
    """That an answer is the one that the case says."""
    if isinstance(wanted, list):
        assert isinstance(answer, list), answer
        assert len(answer) == len(wanted), answer
        for one, other in zip(answer, wanted, strict=True):
            check(one, other)
        return
    assert isinstance(answer, dict), answer
    assert answer["jsonrpc"] == "2.0"
    assert set(answer) == {"jsonrpc", "id", "error" if "code" in wanted else "result"}, str(answer)[:300]
    if "any_id" in wanted:
        return
    if "id_length" in wanted:
        assert len(answer["id"]) == wanted["id_length"]
    else:
        assert (answer["id"], type(answer["id"])) == (wanted["id"], type(wanted["id"])), str(answer)[:300]
    if "code" in wanted:
        assert set(answer["error"]) == {"code", "message"}
        assert answer["error"]["code"] == wanted["code"], str(answer)[:300]
        assert wanted.get("says", "") in answer["error"]["message"], answer
        assert "\n" not in answer["error"]["message"]
        assert len(answer["error"]["message"]) <= 500
    elif "length" in wanted:
        assert len(answer["result"]) == wanted["length"]
    elif "depth" in wanted:
        assert depth_of(answer["result"]) == wanted["depth"]
    else:
        assert answer["result"] == wanted["result"]


async def play(run: Served, case: dict[str, Any]) -> None:
    """One client of the case, from its connecting to its going."""
    async with await run.connect() as client, trio.open_nursery() as nursery:
        nursery.start_soon(send, client, case["send"])
        for wanted in case["answers"]:
            check(await client.answer(), wanted)
        if case["then"] == "closed":
            assert await client.is_closed(), "the connection is closed"
        else:
            await trio.testing.wait_all_tasks_blocked()
            answer = await client.call("echo", {"value": "still here"}, id="last")
            assert answer == {"jsonrpc": "2.0", "id": "last", "result": "still here"}


@pytest.mark.parametrize("case", CASES, ids=lambda case: ascii(f"{case['kind']}: {case['name']}"))
async def test_case(
    case: dict[str, Any], autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """Each case gets its answers in order, its connection is left as it should be, and the server answers the next client."""
    caplog.set_level(logging.WARNING)
    before = open_files()
    async with served() as run:
        async with trio.open_nursery() as nursery:
            for _ in range(case.get("clients", 1)):
                nursery.start_soon(play, run, case)
        assert await run.is_well()
        unexpected = [
            record.getMessage()
            for record in caplog.records
            if ABOUT_CLIENTS not in record.getMessage() and case.get("logs", "\0") not in caplog.text
        ]
        assert not unexpected, "nothing is logged but what the client did wrong"
        assert case.get("logs", "") in caplog.text
    assert open_files() == before, "no file is left open"


def test_the_corpus_is_large() -> None:
    """There are at least 200 cases, each with a name of its own, and every error code is among the answers."""
    assert len(CASES) >= 200
    assert len({case["name"] for case in CASES}) == len(CASES)
    codes = {answer["code"] for case in CASES for answer in case["answers"] if "code" in answer}
    assert codes > {-32700, -32600, -32601, -32602, -32603, -1, -19}
