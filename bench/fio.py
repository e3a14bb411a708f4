"""fio as the programs here run it: one job at random on a disk, and what it found."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import trio


async def run_fio(path: str, load: str, seconds: float, *options: str) -> dict[str, Any]:
    """What fio says of ``load``, ``randread`` or ``randwrite``, on a disk: its figures of that direction.

    Exits the program if fio met an error; `trio.TooSlowError` if it did not end.
    """
    command = [
        *("fio", "--name=bench", f"--filename={path}", f"--rw={load}", "--direct=1", "--norandommap"),
        *("--time_based", f"--runtime={seconds}", "--output-format=json", "--allow_file_create=0"),
        # Trying out the CPU's clock costs as much as all the rest of fio's start.
        *("--thread", "--clocksource=clock_gettime"),
        *options,
    ]
    with trio.fail_after(seconds + 120):
        done = await trio.run_process(command, capture_stdout=True, stderr=subprocess.STDOUT, check=False)
    text = done.stdout.decode()
    if done.returncode != 0:
        raise SystemExit(f"fio failed: {text.strip()}")
    job = json.loads(text[text.index("{") :])["jobs"][0]
    if job["error"]:
        raise SystemExit(f"fio met error {job['error']}")
    found: dict[str, Any] = job[load.removeprefix("rand")]
    return found
