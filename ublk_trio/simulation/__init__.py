"""Seeded runs of the whole engine on the simulated kernel: what ``python -m ublk_trio sim`` does.

A run starts, stops, cancels and kills devices, while applications read and write and check every byte. All that is free
in it, what the run consists of as well as what the kernel, Trio and the backends do, is decided by one `Choices`; time
is virtual. So a run is its options and its list of choices, and replays exactly.
"""

from ublk_trio.simulation.faults import FAULTS, parse_faults
from ublk_trio.simulation.recording import Recording, RecordingError, compare, load_recording, save_recording
from ublk_trio.simulation.run import Report, RunOptions, simulate
from ublk_trio.simulation.timeline import write_timeline

__all__ = [
    "FAULTS",
    "Recording",
    "RecordingError",
    "Report",
    "RunOptions",
    "compare",
    "load_recording",
    "parse_faults",
    "save_recording",
    "simulate",
    "write_timeline",
]
