"""Requests that chance has spoilt: the server says what JSON-RPC allows it to say, and goes on."""

from __future__ import annotations

import json
import logging
import random

import pytest
import trio
import trio.testing

from tests.rpc.harness import Served, open_files, served

GOOD = [
    {"jsonrpc": "2.0", "method": "echo", "params": {"value": [1, 'é\\"}', None, {"a": -1.5e3}]}, "id": 1},
    {
        "jsonrpc": "2.0",
        "method": "typed",
        "params": {"name": "a", "level": "raid1", "member": {"name": "b"}},
        "id": "x",
    },
    {"jsonrpc": "2.0", "method": "typed", "params": {"name": "a", "limits": {"rw": 1}, "base_bdevs": ["m"]}, "id": 2},
    {"jsonrpc": "2.0", "method": "fail", "params": {"errno_name": "ENODEV"}, "id": 3},
    {"jsonrpc": "2.0", "method": "rpc_get_methods", "params": {"current": True}, "id": 4},
    {"jsonrpc": "2.0", "method": "note"},
    [{"method": "note", "id": 1}, {"method": "spdk_get_version", "id": None}],
]
CODES = {-32700, -32600, -32601, -32602, -19}
SPARE = b'{}[]",:\\ \n0129.eE+-tfnu\x00\x1f\x7f\xc3\xe9\xed\xff'
#: `fail` takes any attribute of errno, which is the fake's business and no bug of the wire's.
FAKE_BUGS = ("AttributeError", "TypeError")


def spoil(data: bytes, chance: random.Random) -> bytes:
    """Change, remove, double or move some bytes."""
    spoilt = bytearray(data)
    for _ in range(chance.choice([1, 1, 1, 2, 3, 10])):
        at = chance.randrange(len(spoilt))
        length = chance.choice([1, 1, 2, 5, 20])
        match chance.randrange(5):
            case 0:
                spoilt[at] = chance.choice(SPARE)
            case 1:
                spoilt.insert(at, chance.choice(SPARE))
            case 2:
                del spoilt[at : at + length]
            case 3:
                spoilt[at:at] = spoilt[at : at + length]
            case _:
                piece = spoilt[at : at + length]
                del spoilt[at : at + length]
                spoilt += piece
        if not spoilt:
            return data
    return bytes(spoilt)


async def send_spoilt(run: Served, data: bytes) -> int:
    """Send, finish, and check whatever comes back; how many answers that was."""
    seen = 0
    async with await run.connect() as client:
        await client.send(data)
        await client.finish()
        while (answers := await client.answer()) is not None:
            for answer in answers if isinstance(answers, list) else [answers]:
                seen += 1
                assert answer["jsonrpc"] == "2.0"
                assert set(answer) in ({"jsonrpc", "id", "result"}, {"jsonrpc", "id", "error"})
                if "error" in answer and answer["error"]["code"] not in CODES:
                    assert answer["error"]["message"].split(": ")[-1].startswith(FAKE_BUGS), (data, answer)
    return seen


@pytest.mark.parametrize("seed", range(4))
async def test_spoilt_requests(
    seed: int, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """However a request is spoilt, each answer is one that JSON-RPC has, no connection breaks, and the server is well."""
    caplog.set_level(logging.ERROR)
    chance = random.Random(seed)
    before = open_files()
    async with served() as run:
        seen = 0
        for _ in range(250):
            requests = chance.choices(GOOD, k=chance.choice([1, 1, 2, 5]))
            data = b"".join(json.dumps(each, ensure_ascii=chance.random() < 0.5).encode() for each in requests)
            seen += await send_spoilt(run, spoil(data, chance))
        assert seen > 200, "most of them are answered"
        assert await run.is_well()
    assert "a connection failed" not in caplog.text
    assert open_files() == before
