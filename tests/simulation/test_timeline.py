"""The page that shows a run: complete, by itself, and safe whatever is in it."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import attrs
import pytest

from ublk_trio.kernel_sim import EventLog, SeededChoices
from ublk_trio.simulation import Report, RunOptions, simulate, write_timeline
from ublk_trio.simulation.timeline import MARKS, STATES, lanes_of, page_data
from ublk_trio.uapi import IoCommand, IoOp

FETCH, COMMIT, GET_DATA = map(int, (IoCommand.FETCH_REQ, IoCommand.COMMIT_AND_FETCH_REQ, IoCommand.NEED_GET_DATA))
OPTIONS = RunOptions(seed=5)
#: What would end a script element, or begin what only another mark ends.
NASTY = "</script><script>alert(1)</script><!-- <script \u2028 & ' \" @RUN@ @TITLE@"


@pytest.fixture(scope="module")
def report() -> Report:
    return simulate(OPTIONS, SeededChoices(OPTIONS.seed))


class Page(HTMLParser):
    """The page's elements, and what stands in its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[str | None, str]] = []
        self._script: str | None = None
        self._within = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self._within = True
            self.scripts.append((dict(attrs).get("type"), ""))

    def handle_endtag(self, tag: str) -> None:
        if tag == "script":
            self._within = False

    def handle_data(self, data: str) -> None:
        if self._within:
            kind, text = self.scripts[-1]
            self.scripts[-1] = (kind, text + data)


def written(report: Report, path: Path) -> tuple[str, Page, dict[str, Any]]:
    write_timeline(path, report)
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    kind, data = page.scripts[0]
    assert kind == "application/json"
    return text, page, json.loads(data)


def test_page(report: Report, tmp_path: Path) -> None:
    """One file that fetches nothing: its data is that of the log, each event once."""
    text, page, data = written(report, tmp_path / "run.html")
    assert data == json.loads(json.dumps(page_data(report)))
    assert len(data["events"]) == len(report.log)
    assert data["digest"] == report.log.digest()
    assert len(page.scripts) == 2
    assert not [tag for tag, _ in page.tags if tag in ("link", "img", "iframe", "object", "base")]
    assert not [attributes for _, attributes in page.tags if {"src", "href"} & set(attributes)]
    assert not re.search(r"https?:|@import|url\(|fetch\(|XMLHttp|@RUN@|@TITLE@", text)
    (policy,) = [a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def test_lanes_are_whole(report: Report) -> None:
    """Every event lies in a lane that is shown, every span is one that has a colour, and none of a lane overlap."""
    data = json.loads(json.dumps(page_data(report)))
    for lane, mark, kind, _ in data["events"]:
        assert 0 <= lane < len(data["lanes"])
        assert 0 <= mark < len(MARKS)
        assert kind
    for label, _, kind, spans in data["lanes"]:
        ends = 0
        for first, after, state, _ in spans:
            assert state in STATES, label
            assert 0 <= first <= after <= len(data["events"])
            assert kind == "commands" or first >= ends
            ends = after
    kinds = {kind for _, _, kind, _ in data["lanes"]}
    assert kinds == {"faults", "choices", "run", "commands", "device", "tag"}


def test_every_state_and_mark_has_a_colour(report: Report, tmp_path: Path) -> None:
    """In the light and in the dark scheme; and the page's functions look for no other element than there is."""
    text, page, _ = written(report, tmp_path / "run.html")
    schemes = re.findall(r":root \{(.*?)\}", text, re.DOTALL)
    assert len(schemes) == 2
    for scheme in schemes:
        colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6});", scheme))
        assert set(STATES) | set(MARKS) <= set(colours)
        assert len({colours[state] for state in STATES}) == len(STATES)
    ids = {attributes.get("id") for _, attributes in page.tags}
    assert set(re.findall(r'\bat\("(\w+)"\)', page.scripts[1][1])) <= ids


def test_nothing_ends_the_script(report: Report, tmp_path: Path) -> None:
    """Whatever stands in the log stays text: it neither ends its element nor becomes one."""
    log = EventLog([*report.log, ("fault", NASTY, 0, NASTY), ("step", 1, NASTY)])
    nasty = attrs.evolve(report, log=log, problems=(NASTY,))
    _, page, data = written(nasty, tmp_path / "run.html")
    assert len(page.scripts) == 2
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in written(report, tmp_path / "other.html")[1].tags]
    assert data["problems"] == [NASTY]
    assert data["events"][-1][3] == f"number 1 {NASTY}"
    assert "innerHTML" not in page.scripts[1][1]


TAG_LIFE = EventLog(
    [
        ("ring-opened", 0, 0, 2),
        ("command", 0, 0, 1, FETCH, 0),
        ("command", 0, 0, 0, FETCH, 0),
        ("bio", 1, int(IoOp.WRITE), 0, 512),
        ("request", 0, 0, 0, 1),
        ("event", 0, 0, 0, 1, int(IoOp.WRITE), 1, 0),
        ("command", 0, 0, 0, GET_DATA, 0),
        ("event", 0, 0, 0, 0, int(IoOp.WRITE), 1, 0),
        ("command", 0, 0, 0, COMMIT, 512),
        ("event", 0, 0, 0, -19),
        ("ring-closed", 0, 0),
    ]
)


def test_a_tags_life() -> None:
    """A tag goes through its states at the events that change them; one that was never used shares a lane."""
    lanes, owners, marks = lanes_of(TAG_LIFE)
    by_label = {lane.label.strip(): lane for lane in lanes}
    assert by_label["queue 0 tag 0"].spans == [
        [2, 4, "FETCHING", ""],
        [4, 5, "QUEUED", "operation 1"],
        [5, 6, "ANNOUNCED", ""],
        [6, 7, "GETTING_DATA", ""],
        [7, 8, "SERVING", ""],
        [8, 9, "FETCHING", ""],
    ]
    assert owners[1] is by_label["other tags"]
    assert owners[3] is by_label["operations"]
    assert owners[4] is by_label["queue 0 tag 0"]
    assert marks[2:10] == ["command", "point", "point", "completion", "command", "completion", "command", "refused"]


def test_a_closed_ring_ends_its_tags() -> None:
    """What a tag was in when its ring closed ends there; a state that nothing ended lasts to the end of the run."""
    log = EventLog([*TAG_LIFE[:6], ("ring-closed", 0, 0), ("phase", "more")])
    lanes, _, _ = lanes_of(log)
    (tag,) = [lane for lane in lanes if lane.label.strip() == "queue 0 tag 0"]
    assert tag.spans[-1] == [5, 6, "ANNOUNCED", ""]
    lanes, _, _ = lanes_of(EventLog(TAG_LIFE[:6]))
    (tag,) = [lane for lane in lanes if lane.label.strip() == "queue 0 tag 0"]
    assert tag.spans[-1] == [5, 6, "ANNOUNCED", ""]


def test_a_devices_life() -> None:
    """A device's states, and each control command from its sending to its end, two of the same name in order."""
    log = EventLog(
        [
            ("control-sent", "ADD_DEV", 3),
            ("control", "ADD_DEV", 3, 0),
            ("state", 3, "LIVE"),
            ("control-sent", "DEL_DEV", 3),
            ("control-sent", "DEL_DEV", 3),
            ("state", 3, "DEAD"),
            ("control", "DEL_DEV", 3, 0),
            ("deleted", 3),
            ("control", "DEL_DEV", 3, -19),
            ("crash", 3),
            ("control-sent", "GET_FEATURES", 0xFFFFFFFF),
        ]
    )
    lanes, owners, marks = lanes_of(log)
    by_label = {lane.label.strip(): lane for lane in lanes}
    assert by_label["device 3"].spans == [[1, 2, "DEAD", ""], [2, 5, "LIVE", ""], [5, 7, "DEAD", ""]]
    assert by_label["commands"].spans == [
        [0, 1, "COMMAND", "ADD_DEV"],
        [3, 6, "COMMAND", "DEL_DEV"],
        [4, 8, "COMMAND", "DEL_DEV"],
    ]
    assert by_label["driver"].spans == [[10, 11, "COMMAND", "GET_FEATURES"]]
    assert owners[9] is by_label["faults"]
    assert (marks[8], marks[9]) == ("refused", "fault")
