"""Headless Chromium, driven over its debugging pipe: real clicks, real keys, real downloads, no further package."""

import base64
import json
import os
import select
import shutil
import subprocess
from pathlib import Path
from urllib.parse import quote

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
QUIET = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage", "--mute-audio")
PATIENCE = 30  # seconds that an answer may take
PRESSED = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}


def chromium() -> str:
    """The browser's program; without one the test is skipped, but not in CI, which installs it."""
    result = next(filter(None, map(shutil.which, NAMES)), "")
    if not result:
        assert not os.environ.get("CI"), "CI needs chromium: see .ci/run"
        pytest.skip("no chromium here")
    return result


class Browser:
    """One page in one browser. Commands are those of https://chromedevtools.github.io/devtools-protocol/."""

    def __init__(self, profile: Path):
        ours, its_output = os.pipe()
        its_input, our_end = os.pipe()

        def give_pipes() -> None:  # the browser reads commands from 3 and writes answers to 4
            high = os.dup2(its_input, 203), os.dup2(its_output, 204)
            os.dup2(high[0], 3), os.dup2(high[1], 4)

        command = [chromium(), *QUIET, "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]
        self.process = subprocess.Popen(
            command, preexec_fn=give_pipes, pass_fds=(3, 4), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(its_input), os.close(its_output)
        self.reading, self.writing = os.fdopen(ours, "rb"), os.fdopen(our_end, "wb")
        self.buffer, self.number, self.session, self.events = b"", 0, {}, []
        target = self.send("Target.getTargets")["targetInfos"][0]["targetId"]
        self.session = {"sessionId": self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        self.send("Page.enable")
        self.send("Network.enable")

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self.reading.close(), self.writing.close()

    def message(self) -> dict:
        while b"\0" not in self.buffer:
            assert select.select([self.reading], [], [], PATIENCE)[0], "the browser does not answer"
            more = os.read(self.reading.fileno(), 1 << 20)
            assert more, "the browser has ended"
            self.buffer += more
        line, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(line)

    def send(self, method: str, **params: object) -> dict:
        """The result of a command; events that come meanwhile are kept."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params, **self.session}
        self.writing.write(json.dumps(message).encode() + b"\0")
        self.writing.flush()
        while (answer := self.message()).get("id") != self.number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def wait_for(self, method: str) -> dict:
        """The next event of this name, or the one that came already."""
        while True:
            for event in self.events:
                if event["method"] == method:
                    self.events.remove(event)
                    return event["params"]
            self.events.append(self.message())

    def open(self, page: Path) -> None:
        self.events = [event for event in self.events if event.get("method") != "Page.loadEventFired"]
        self.send("Page.navigate", url="file://" + quote(str(page)))
        self.wait_for("Page.loadEventFired")

    def value(self, expression: str) -> object:
        """What an expression of JavaScript is worth on the page."""
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def texts(self, selector: str) -> list[str]:
        return self.value(f"[...document.querySelectorAll({json.dumps(selector)})].map((node) => node.textContent)")

    def press(self, *keys: str, code: str = "") -> None:
        """Press keys one after the other; code: the place of the key on the keyboard, where it matters."""
        for key in keys:
            named = {"key": key, "code": code, "windowsVirtualKeyCode": PRESSED.get(key, 0)}
            self.send("Input.dispatchKeyEvent", type="keyDown", **named, **({"text": key} if len(key) == 1 else {}))
            self.send("Input.dispatchKeyEvent", type="keyUp", **named)

    def click(self, selector: str) -> None:
        """Click into the middle of an element, as a mouse does."""
        place = self.value(
            f"(() => {{ const node = document.querySelector({json.dumps(selector)}); node.scrollIntoView("
            "{block: 'center'}); const box = node.getBoundingClientRect(); "
            "return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            where = {"x": place[0], "y": place[1], "button": "left", "clickCount": 1}
            self.send("Input.dispatchMouseEvent", type=kind, **where)

    def download(self, selector: str, folder: Path) -> Path:
        """Click, and the file that the browser then has saved."""
        session, self.session = self.session, {}
        self.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder), eventsEnabled=True)
        self.session = session
        self.click(selector)
        name = self.wait_for("Browser.downloadWillBegin")["suggestedFilename"]
        while self.wait_for("Browser.downloadProgress")["state"] != "completed":
            pass
        return folder / name

    def screenshot(self, path: Path, width: int, height: int, dark: bool = False) -> None:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot")["data"]))
