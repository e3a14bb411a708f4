"""Headless Chromium for tests: does with a page what a person does, and tells what a person would see.

Speaks the DevTools protocol with it over a pair of pipes (``--remote-debugging-pipe``): JSON, each message ended by a zero byte. So there is
no port, no second program and no package between. Every answer is waited for with a limit.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import attrs

PROGRAM: Final = "chromium"
#: The browser needs one or two; on an emulated or crowded machine many more.
_ANSWER_SECONDS_MAX: Final = 60.0
#: Where the browser looks for its two pipes: commands, answers.
_PIPES: Final = (3, 4)
_OPTIONS: Final = (
    "--headless",
    "--remote-debugging-pipe",
    # Its sandbox needs namespaces or a setuid program, which an ordinary user may not have; the pages are ours.
    "--no-sandbox",
    "--disable-gpu",
    # A container's /dev/shm may be too small for a screen.
    "--disable-dev-shm-usage",
    # Whatever a browser asks the network for on its own.
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-quic",
    "--disable-sync",
    "--no-first-run",
    "--no-default-browser-check",
)
#: Keeps what is written on canvases: [text, x, y] each, in the order of writing.
_KEEP_WRITTEN: Final = """
window.written = [];
const fillText = CanvasRenderingContext2D.prototype.fillText;
CanvasRenderingContext2D.prototype.fillText = function (text, x, y, ...rest) {
  written.push([String(text), x, y]);
  return fillText.call(this, text, x, y, ...rest);
};
"""
#: Counts in a picture, for each of [red, green, blue, x, y, width, height], the pixels in there that have about that colour.
_COUNT: Final = """
(async (picture, places, differenceMax) => {
  const bitmap = await createImageBitmap(new Blob([Uint8Array.from(atob(picture), one => one.charCodeAt(0))]));
  const pen = new OffscreenCanvas(bitmap.width, bitmap.height).getContext("2d");
  pen.drawImage(bitmap, 0, 0);
  const {data} = pen.getImageData(0, 0, bitmap.width, bitmap.height);
  const is = (pixel, channel, value) => Math.abs(data[4 * pixel + channel] - value) <= differenceMax;
  return places.map(([red, green, blue, left, top, width, height]) => {
    let count = 0;
    for (let y = Math.max(top, 0); y < Math.min(top + height, bitmap.height); y++)
      for (let x = Math.max(left, 0); x < Math.min(left + width, bitmap.width); x++)
        count += is(y * bitmap.width + x, 0, red) && is(y * bitmap.width + x, 1, green) && is(y * bitmap.width + x, 2, blue);
    return count;
  });
})
"""
Colour = tuple[int, int, int]
#: How far a channel may be from a colour that is still taken for it: what is smoothed at an edge is not.
_CHANNEL_DIFFERENCE_MAX: Final = 10


class BrowserError(Exception):
    """The browser, or the script that it was given, failed."""


@attrs.frozen(kw_only=True)
class Place:
    """A rectangle of a window, and a colour that so many pixels of it must have."""

    what: str
    colour: Colour
    x: float
    y: float
    width: float = 1
    height: float = 1
    pixels_min: int = 1

    def in_pixels(self) -> list[int]:
        left, top, right, bottom = map(round, (self.x, self.y, self.x + self.width, self.y + self.height))
        return [*self.colour, left, top, right - left, bottom - top]


class Browser:
    """A browser of its own, with a profile in ``directory``. Raises `OSError` when there is none; end it with `close`."""

    def __init__(self, program: str, directory: Path) -> None:
        self._log = directory / "chromium.log"
        self._received: deque[bytearray] = deque()
        self._begun = bytearray()
        self._last_id = 0
        self._pages: dict[str, Page] = {}
        pipes = [os.pipe(), os.pipe()]
        theirs = (pipes[0][0], pipes[1][1])
        # Out of the way of the numbers that they get in the browser.
        moved = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in theirs]
        try:
            self._pid = os.posix_spawnp(
                program,
                [program, *_OPTIONS, f"--user-data-dir={directory / 'profile'}", "about:blank"],
                {**os.environ, "HOME": str(directory), "TMPDIR": str(directory)},
                file_actions=[
                    (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                    (os.POSIX_SPAWN_OPEN, 1, str(self._log), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644),
                    (os.POSIX_SPAWN_DUP2, 1, 2),
                    *((os.POSIX_SPAWN_DUP2, old, new) for old, new in zip(moved, _PIPES, strict=True)),
                ],
                setpgroup=0,
            )
        except OSError:
            os.close(pipes[0][1])
            os.close(pipes[1][0])
            raise
        finally:
            for end in (*theirs, *moved):
                os.close(end)
        self._commands, self._answers = pipes[0][1], pipes[1][0]
        try:
            self._counter = self._attach()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the browser and all of its processes."""
        os.killpg(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        os.close(self._commands)
        os.close(self._answers)

    def open(self, path: Path, *, width: int, height: int, dark: bool = False) -> Page:
        """Load a file into a window of that size, as one who prefers that scheme. The page keeps what it complained about."""
        page = self._attach()
        for domain in ("Runtime", "Log", "Network", "Page"):
            page.do(f"{domain}.enable")
        page.do("Page.addScriptToEvaluateOnNewDocument", source=_KEEP_WRITTEN)
        page.resize(width, height)
        page.prefer(dark=dark)
        page.do("Page.navigate", url=path.as_uri())
        deadline = time.monotonic() + _ANSWER_SECONDS_MAX
        while not page.loaded:
            self._read(deadline, f"{path.name} to load")
        page.settle()
        return page

    def _attach(self) -> Page:
        target = self.do(None, "Target.createTarget", url="about:blank")["targetId"]
        session = self.do(None, "Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self._pages[session] = Page(self, session, target)
        return page

    def do(self, session: str | None, method: str, **arguments: Any) -> dict[str, Any]:
        """One command of the protocol, and its result. Raises `BrowserError` when it fails or takes too long."""
        self._last_id += 1
        message = {"id": self._last_id, "method": method, "params": arguments}
        if session is not None:
            message["sessionId"] = session
        unsent = memoryview(json.dumps(message).encode() + b"\0")
        while unsent:
            unsent = unsent[os.write(self._commands, unsent) :]
        deadline = time.monotonic() + _ANSWER_SECONDS_MAX
        while True:
            answer = self._read(deadline, method)
            if answer.get("id") == self._last_id:
                if "error" in answer:
                    raise BrowserError(f"{method}: {answer['error']}")
                result: dict[str, Any] = answer["result"]
                return result

    def _read(self, deadline: float, what: str) -> dict[str, Any]:
        """The next message; an event goes to its page as well."""
        while not self._received:
            ready, _, _ = select.select([self._answers], [], [], max(0.0, deadline - time.monotonic()))
            new = os.read(self._answers, 1 << 20) if ready else b""
            if not new:
                why = "has ended" if ready else f"takes more than {_ANSWER_SECONDS_MAX:.0f} s"
                raise BrowserError(f"Chromium {why}, at {what}; its words:\n{self._log.read_text(errors='replace')}")
            *ends, rest = new.split(b"\0")
            for end in ends:
                self._received.append(self._begun + end)
                self._begun = bytearray()
            self._begun += rest
        message: dict[str, Any] = json.loads(self._received.popleft())
        page = self._pages.get(message.get("sessionId", ""))
        if page is not None and "method" in message:
            page.happened(message["method"], message["params"])
        return message

    def count_pixels(self, picture: str, places: Sequence[Place]) -> list[int]:
        """For each place, how many of its pixels have its colour in a picture in base64."""
        questions = json.dumps([place.in_pixels() for place in places])
        script = f"{_COUNT}({json.dumps(picture)}, {questions}, {_CHANNEL_DIFFERENCE_MAX})"
        counts: list[int] = self._counter.evaluate(script)
        return counts


class Page:
    """A page in a window. `complaints`: errors and warnings of its console; `requests`: what it asked for, itself included."""

    def __init__(self, browser: Browser, session: str, target: str) -> None:
        self._browser = browser
        self._session = session
        self._target = target
        self.loaded = False
        self.complaints: list[str] = []
        self.requests: list[str] = []

    def do(self, method: str, **arguments: Any) -> dict[str, Any]:
        return self._browser.do(self._session, method, **arguments)

    def close(self) -> None:
        self._browser.do(None, "Target.closeTarget", targetId=self._target)

    def happened(self, event: str, fields: dict[str, Any]) -> None:
        """An event of the protocol."""
        if event == "Page.loadEventFired":
            self.loaded = True
        elif event == "Network.requestWillBeSent":
            self.requests.append(fields["request"]["url"])
        elif event == "Runtime.exceptionThrown":
            details = fields["exceptionDetails"]
            self.complaints.append(details.get("exception", {}).get("description", details["text"]))
        elif event == "Runtime.consoleAPICalled" and fields["type"] in ("error", "warning", "assert"):
            self.complaints.append(f"console.{fields['type']}: {[one.get('value') for one in fields['args']]}")
        elif event == "Log.entryAdded" and fields["entry"]["level"] in ("error", "warning"):
            self.complaints.append(fields["entry"]["text"])

    def evaluate(self, script: str) -> Any:
        """An expression's value; if it is a promise, what it is resolved to. Raises `BrowserError` if it throws."""
        result = self.do("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in result:
            raise BrowserError(f"{script[:200]}: {result['exceptionDetails']}")
        return result["result"].get("value")

    def settle(self) -> None:
        """Wait until what has been done is on the screen."""
        self.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def text(self, selector: str) -> str:
        """What can be read in an element: nothing in one that is hidden, or not there."""
        text = self.evaluate(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''")
        assert isinstance(text, str)
        return text

    def box(self, selector: str) -> tuple[float, float, float, float]:
        """An element's left, top, width and height in the window."""
        left, top, width, height = self.evaluate(
            f"(({{left, top, width, height}}) => [left, top, width, height])"
            f"(document.querySelector({json.dumps(selector)}).getBoundingClientRect())"
        )
        return left, top, width, height

    def lacking(self, places: Sequence[Place]) -> list[str]:
        """What of all that cannot be seen on the screen."""
        picture = self.do("Page.captureScreenshot", format="png", optimizeForSpeed=True)["data"]
        counts = self._browser.count_pixels(picture, places)
        return [place.what for place, count in zip(places, counts, strict=True) if count < place.pixels_min]

    def written(self) -> list[tuple[str, float, float]]:
        """What was written on canvases since the last call, each place once."""
        written = self.evaluate("written.splice(0)")
        return list(dict.fromkeys((text, x, y) for text, x, y in written))

    def resize(self, width: int, height: int) -> None:
        self.do("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def prefer(self, *, dark: bool) -> None:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.do("Emulation.setEmulatedMedia", features=[scheme])

    def key(self, key: str) -> None:
        """Press a key, named as `KeyboardEvent.key` names it."""
        for kind in ("rawKeyDown", "keyUp"):
            self.do("Input.dispatchKeyEvent", type=kind, key=key)
        self.settle()

    def point(self, x: float, y: float) -> None:
        """Move the mouse there."""
        self._mouse("mouseMoved", x, y)
        self.settle()

    def click(self, x: float, y: float) -> None:
        self._mouse("mouseMoved", x, y)
        for kind in ("mousePressed", "mouseReleased"):
            self._mouse(kind, x, y, button="left", clickCount=1)
        self.settle()

    def wheel(self, x: float, y: float, *, down: float, shift: bool = False) -> None:
        """Turn the wheel over that place, by so many pixels."""
        self._mouse("mouseWheel", x, y, deltaX=0, deltaY=down, modifiers=8 if shift else 0)
        self.settle()

    def _mouse(self, kind: str, x: float, y: float, **more: Any) -> None:
        self.do("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)
