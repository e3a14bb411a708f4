"""The page of a run in a real browser: what a person sees, points at and clicks. Needs Debian's chromium."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest

from tests.simulation.browser import PROGRAM, Browser, Colour, Page, Place
from tests.simulation.test_cli_sim import sim
from ublk_trio.kernel_sim import EventLog, SeededChoices
from ublk_trio.simulation import Report, RunOptions, simulate, write_timeline
from ublk_trio.simulation.timeline import MARKS, STATES, page_data

pytestmark = pytest.mark.skipif(shutil.which(PROGRAM) is None, reason="needs a browser: apt-get install chromium")

#: Wide enough for a few hundred events at a time, and high enough for every lane of the runs below.
WINDOW = {"width": 1700, "height": 1000}
NARROW = {"width": 420, "height": 800}
LANES_MAX, EVENTS_MAX = 30, 350
#: Too many for a narrow window, or scrolling could not fail; and so with a single fault.
LANES_MIN, FAULTS_MIN = 20, 2
#: Of the drawing: the labels' column, a lane's height.
LABELS_PIXELS, LANE_PIXELS = 150, 18
#: The zoom at which marks and spans of neighbouring events do not cover each other.
PIXELS_AN_EVENT_MIN = 11
VIEWS_MAX = 40


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    started = Browser(PROGRAM, tmp_path_factory.mktemp("browser"))
    yield started
    started.close()


@attrs.frozen
class Shown:
    """A page's file, and the run that it has to show."""

    path: Path
    report: Report
    data: dict[str, Any] = attrs.field(init=False)

    @data.default
    def _data(self) -> dict[str, Any]:
        data: dict[str, Any] = json.loads(json.dumps(page_data(self.report)))
        return data

    @property
    def lanes(self) -> list[Any]:
        """``[label, device, kind, [[first event, event after the last, state, text], …]]`` each."""
        lanes: list[Any] = self.data["lanes"]
        return lanes

    @property
    def events(self) -> list[Any]:
        """``[lane, mark, kind, text]`` each."""
        events: list[Any] = self.data["events"]
        return events

    def colours(self, *, dark: bool) -> dict[str, Colour]:
        """By name, as the style sheet has them: the light scheme stands first."""
        schemes = re.findall(r":root \{(.*?)\}", self.path.read_text(), re.DOTALL)
        # What the dark scheme leaves out stays as it is in the light one.
        pairs = itertools.chain.from_iterable(re.findall(r"--(\w+): #(\w{6});", one) for one in schemes[: 1 + dark])
        return {name: (int(code[:2], 16), int(code[2:4], 16), int(code[4:], 16)) for name, code in pairs}


def is_telling(report: Report) -> bool:
    """Whether a run has everything that a timeline can show, but for the states of recovery, in few lanes, but not too few."""
    shown = Shown(Path(), report)
    marks = Counter(mark for _, mark, *_ in shown.events)
    states = {state for *_, spans in shown.lanes for _, _, state, _ in spans}
    return (
        len(marks) == len(MARKS)
        and states >= set(STATES) - {"QUIESCED", "FAIL_IO"}
        and LANES_MIN <= len(shown.lanes) <= LANES_MAX
        and marks[list(MARKS).index("fault")] >= FAULTS_MIN
        and len(shown.events) <= EVENTS_MAX
    )


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Shown:
    """The page that ``sim --replay FILE --timeline PAGE`` writes."""
    directory = tmp_path_factory.mktemp("run")
    every = (RunOptions(seed=seed, steps=20) for seed in range(300))
    report = next(
        one for one in (simulate(options, SeededChoices(options.seed)) for options in every) if is_telling(one)
    )
    recording, page = directory / "run.jsonl", directory / "run.html"
    assert sim("--seed", str(report.options.seed), "--steps", "20", "--record", recording) == 0
    assert sim("--replay", recording, "--timeline", page) == 0
    return Shown(page, report)


@pytest.fixture(scope="module")
def every_state(shown: Shown, tmp_path_factory: pytest.TempPathFactory) -> Shown:
    """The same, and then a device in the states of recovery."""
    more = [
        ("control-sent", "ADD_DEV", 99),
        ("control", "ADD_DEV", 99, 0),
        *(("state", 99, state) for state in ("LIVE", "QUIESCED", "FAIL_IO")),
        ("control-sent", "DEL_DEV", 99),
        ("deleted", 99),
        ("control", "DEL_DEV", 99, 0),
    ]
    report = attrs.evolve(shown.report, log=EventLog([*shown.report.log, *more]), problems=("a problem", "another"))
    path = tmp_path_factory.mktemp("states") / "run.html"
    write_timeline(path, report)
    return Shown(path, report)


# ---------------------------------------------------------------- what a person sees


@attrs.frozen(kw_only=True)
class View:
    """Which event and lane of the drawing is where in the window: as is written at its edges."""

    left: float
    right: float
    lane_tops: list[float]
    labels: list[str]
    event_0_x: float
    pixels_an_event: float

    def x_of(self, event: int) -> float:
        return self.event_0_x + event * self.pixels_an_event

    def has(self, event: int) -> bool:
        return self.left <= self.x_of(event) <= self.right - self.pixels_an_event


def look(page: Page) -> View:
    """What is drawn now. It must have been drawn anew since the last look."""
    written = page.written()
    left, top, width, _ = page.box("#drawing")
    # The screen has whole pixels.
    left, top = round(left), round(top)
    (axis,) = {y for text, _, y in written if text == "event"}
    ticks = sorted({(int(text), x) for text, x, y in written if y == axis and text.isdigit()})
    assert len(ticks) > 1, "the axis has numbers"
    (begin, begin_x), (end, end_x) = ticks[0], ticks[-1]
    pixels_an_event = (end_x - begin_x) / (end - begin)
    labels = sorted((y, text) for text, x, y in written if y > axis and x < LABELS_PIXELS)
    assert len(labels) > 1, "there are lanes"
    return View(
        left=left + LABELS_PIXELS,
        right=left + width,
        lane_tops=[top + y - LANE_PIXELS / 2 for y, _ in labels],
        labels=[text for _, text in labels],
        # A number stands 3 pixels right of its tick.
        event_0_x=left + begin_x - 3 - begin * pixels_an_event,
        pixels_an_event=pixels_an_event,
    )


def check_heading(page: Page, shown: Shown, colours: dict[str, Colour]) -> None:
    """The run's command line and digest, its problems, and a legend of every state and mark that it has."""
    assert page.text("h1") == shown.data["title"]
    assert page.text("#digest") == f"{len(shown.events)} events, sha256 {shown.data['digest']}"
    assert page.text("#problems").split("\n") == (shown.data["problems"] or [""])
    states = {state for *_, spans in shown.lanes for _, _, state, _ in spans}
    wanted = {name: f"{name}: {text}" for name, text in STATES.items() if name in states} | dict(MARKS)
    assert page.text("#legend").split("\n") == list(wanted.values())
    swatches = []
    for number, name in enumerate(wanted, 1):
        x, y, width, height = page.box(f"#legend li:nth-child({number}) canvas")
        what = f"{name} in the legend"
        swatches.append(Place(what=what, colour=colours[name], x=x, y=y, width=width, height=height, pixels_min=3))
    assert page.lacking(swatches) == []


def check_drawing(page: Page, shown: Shown, colours: dict[str, Colour]) -> None:
    """A lane for each queue and tag, under its name; each state as a colour; each event as a mark of its kind."""
    view = look_at_all(page)
    while view.pixels_an_event < PIXELS_AN_EVENT_MIN:
        page.key("+")
        view = look(page)
    page.key("Home")
    view = look(page)
    seen: set[int] = set()
    for _ in range(VIEWS_MAX):
        assert view.labels == [label.strip() for label, *_ in shown.lanes]
        visible = [event for event in range(len(shown.events)) if view.has(event)]
        lacking = page.lacking(
            [
                *labels_of(view, shown, colours),
                *marks_of(view, shown, visible, colours),
                *states_of(view, shown, visible, colours),
            ]
        )
        assert lacking == []
        seen |= set(visible)
        if len(seen) == len(shown.events):
            return
        page.key("PageDown")
        view = look(page)
    raise AssertionError(f"after {VIEWS_MAX} pages only {len(seen)} events were in view")


def labels_of(view: View, shown: Shown, colours: dict[str, Colour]) -> Iterator[Place]:
    for (label, _, kind, _), top in zip(shown.lanes, view.lane_tops, strict=True):
        colour = colours["faint" if kind in ("tag", "commands") else "text"]
        x, width = view.left - LABELS_PIXELS, LABELS_PIXELS - 5
        yield Place(what=label, colour=colour, x=x, y=top, width=width, height=LANE_PIXELS, pixels_min=5)


def marks_of(view: View, shown: Shown, visible: list[int], colours: dict[str, Colour]) -> Iterator[Place]:
    for event in visible:
        lane, number, kind, text = shown.events[event]
        mark = list(MARKS)[number]
        # Commands rise from below, completions hang from above.
        begin, end = {"command": (10, 16), "completion": (2, 8), "refused": (2, 8)}.get(mark, (2, 16))
        yield Place(
            what=f"{mark} of event {event}, {kind} {text}, in the lane {view.labels[lane]}",
            colour=colours[mark],
            x=view.x_of(event) - 4,
            y=view.lane_tops[lane] + begin,
            width=8,
            height=end - begin,
            pixels_min={"point": 3, "choice": 2}.get(mark, 6),
        )


def states_of(view: View, shown: Shown, visible: list[int], colours: dict[str, Colour]) -> Iterator[Place]:
    for (label, _, kind, spans), top in zip(shown.lanes, view.lane_tops, strict=True):
        states = {event: state for begin, end, state, _ in spans for event in range(begin, end)}
        for event in visible:
            state = states.get(event, "band" if kind in ("device", "faults") else "back")
            # Between this event and the next, above a span's words and beside the marks.
            x, y = view.x_of(event) + view.pixels_an_event / 2, top + (3 if kind == "device" else 4)
            yield Place(
                what=f"{state} in the lane {label.strip()} after event {event}", colour=colours[state], x=x, y=y
            )


# ---------------------------------------------------------------- what a person does


def look_at_all(page: Page) -> View:
    """The whole run, and nothing selected but the first event."""
    page.key("0")
    page.written()
    page.key("Home")
    return look(page)


def check_pointing(page: Page, shown: Shown) -> None:
    """What is under the pointer is told beside it; a click shows it in the box and in the list; keys lead on."""
    for number in range(len(MARKS)):
        view = look_at_all(page)
        event = next(index for index, one in enumerate(shown.events) if one[1] == number and view.has(index))
        lane, _, kind, text = shown.events[event]
        x, y = view.x_of(event), view.lane_tops[lane] + LANE_PIXELS / 2
        page.wheel(x, y, down=-500)
        view = look(page)
        assert abs(view.x_of(event) - x) < view.pixels_an_event, "the wheel zooms in on what is under the pointer"
        page.point(view.x_of(event), y)
        assert f"{event} {kind}: {text}" in page.text("#tip").split("\n")
        _, _, width, height = page.box("#tip")
        assert min(width, height) > 0, "it is told where a person sees it"
        page.click(view.x_of(event), y)
        assert page.text("#details").split("\n")[:2] == [f"event {event} {kind}", text]
        assert page.text(".row.selected").split() == f"{event} {kind} {text}".split()
        page.key("ArrowRight")
        assert page.text("#details").startswith(f"event {event + 1} ")
    view = look_at_all(page)
    event, lane = next(
        (span[0], lane) for lane, (*_, spans) in enumerate(shown.lanes) for span in spans if span[2] == "SERVING"
    )
    page.point(view.x_of(event) + 1, view.lane_tops[lane] + LANE_PIXELS / 2)
    assert f"{view.labels[lane]}: SERVING, {STATES['SERVING']}, events {event} to " in page.text("#tip")
    # "next fault" goes through them all, and then begins again.
    faults = [index for index, one in enumerate(shown.events) if list(MARKS)[one[1]] == "fault"]
    x, y, width, height = page.box("#fault")
    for event in [*faults, faults[0]]:
        page.click(x + width / 2, y + height / 2)
        assert page.text("#details").startswith(f"event {event} {shown.events[event][2]}")


def check_one_device(page: Page, shown: Shown) -> None:
    """A chosen device is shown alone, beside what belongs to none."""
    device = max(lane[1] for lane in shown.lanes if lane[1] is not None)
    for choice, wanted in ((str(device), {None, device}), ("", {lane[1] for lane in shown.lanes})):
        page.written()
        page.evaluate(
            f"(box => {{ box.value = {choice!r}; box.dispatchEvent(new Event('change')); }})(document.querySelector('#device'))"
        )
        page.settle()
        assert look(page).labels == [label.strip() for label, owner, *_ in shown.lanes if owner in wanted]


def check_narrow(page: Page, shown: Shown) -> None:
    """In a narrow window nothing is cut off at the side: lanes, box and list are there, and the last lane can be reached."""
    page.written()
    page.resize(**NARROW)
    page.settle()
    assert page.evaluate("document.documentElement.scrollWidth") <= NARROW["width"]
    assert page.evaluate("document.documentElement.scrollHeight") <= NARROW["height"]
    for part in ("#drawing", "#details", "#list"):
        left, top, width, height = page.box(part)
        assert left >= 0, part
        assert left + width <= NARROW["width"], part
        assert top + height <= NARROW["height"], part
        assert width >= 300, part
        assert height >= 60, part
    left, top, width, height = page.box("#drawing")
    assert height >= NARROW["height"] / 3
    page.wheel(left + width / 2, top + height / 2, down=5000, shift=True)
    page.written()
    page.key("+")
    view = look(page)
    assert view.labels == [label.strip() for label, *_ in shown.lanes][-len(view.labels) :]
    assert view.lane_tops[-1] + LANE_PIXELS <= top + height
    page.resize(**WINDOW)
    page.settle()


def check(browser: Browser, shown: Shown, *, dark: bool) -> None:
    """All of it. Raises `AssertionError` for whatever a person would miss."""
    page = browser.open(shown.path, **WINDOW, dark=dark)
    try:
        assert page.complaints == []
        check_heading(page, shown, shown.colours(dark=dark))
        check_drawing(page, shown, shown.colours(dark=dark))
        check_pointing(page, shown)
        check_one_device(page, shown)
        # The scheme changes in the evening, say, while the page is open.
        page.prefer(dark=not dark)
        check_heading(page, shown, shown.colours(dark=not dark))
        check_narrow(page, shown)
        assert page.complaints == []
        assert page.requests == [shown.path.as_uri()], "it asked for something"
    finally:
        page.close()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_person_sees_the_run(browser: Browser, shown: Shown, dark: bool) -> None:
    """Lanes, states, every command, completion and fault; details of what is pointed at; no error, no network."""
    check(browser, shown, dark=dark)


def test_a_person_sees_every_state(browser: Browser, every_state: Shown) -> None:
    """A device's states of recovery have their colours too, and a run's problems stand above it."""
    assert {state for *_, spans in every_state.lanes for _, _, state, _ in spans} == set(STATES)
    check(browser, every_state, dark=False)


# ---------------------------------------------------------------- can these tests fail?

#: What is wrong with a page, the text that is right, and what stands there instead.
PLANTED = [
    ("its script does not parse", "const run = JSON.parse(", "const run = JSON.parse(("),
    ("an exception on the way", "function drawFaultLines() {", "function drawFaultLines() { nothing();"),
    ("the last lane is missing", "row < to; row++) drawLane", "row < to - 1; row++) drawLane"),
    ("lanes have no names", "pen.fillText(lane.label.trim(),", "pen.fillText('',"),
    ("commands are not marked", 'mark === "command" || mark === "completion"', 'mark === "completion"'),
    ("completions look like commands", 'if (mark === "command") {', 'if (mark !== "refused") {'),
    ("faults are not marked", "pen.moveTo(x + 4, middle - 4); pen.lineTo(x - 4, middle + 4);\n    pen.stroke();", ""),
    ("states have one colour", "pen.fillStyle = colours[state] || colours.faint;", "pen.fillStyle = colours.faint;"),
    ("a span ends too early", "right = Math.min(xOf(after)", "right = Math.min(xOf(after - 1)"),
    ("the dark scheme is not read anew", "{ readColours(); fillLegend(); later(); }", "{ later(); }"),
    ("pointing tells nothing", 'lines.length ? "block" : "none"', '"none"'),
    ("a click selects the neighbour", "found.near >= 0 ? found.near", "found.near >= 0 ? found.near + 1"),
    ("the list does not follow", "  follow(selected);\n", ""),
    (
        "the next fault is the same",
        "faults.find(number => number > selected)",
        "faults.find(number => number >= selected)",
    ),
    ("a device's lanes are not chosen", "lane.device === Number(wanted)", "lane.device !== Number(wanted)"),
    ("cut off in a narrow window", "body { display: flex;", "body { min-width: 600px; display: flex;"),
    ("lanes cannot be scrolled", 'at("space").style.height =', 'at("space").style.width ='),
    ("it asks the network", "<title>", '<link rel="stylesheet" href="http://127.0.0.1:9/page.css"><title>'),
]


@pytest.mark.parametrize(("right", "wrong"), [one[1:] for one in PLANTED], ids=[one[0] for one in PLANTED])
def test_a_broken_page_is_noticed(browser: Browser, shown: Shown, right: str, wrong: str, tmp_path: Path) -> None:
    """The checks above can fail: each of these bugs is found by them."""
    text = shown.path.read_text()
    assert text.count(right) == 1
    broken = attrs.evolve(shown, path=tmp_path / "broken.html")
    broken.path.write_text(text.replace(right, wrong))
    with pytest.raises(AssertionError):
        check(browser, broken, dark=False)
