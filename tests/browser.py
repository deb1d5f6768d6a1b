"""A headless Chromium on a leash: the DevTools protocol over a pair of pipes, with nothing but the standard library."""

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find() -> str | None:
    """The path of a Chromium, or None."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


class Browser(contextlib.AbstractContextManager):
    """One page in a browser of its own. `errors` collects what the console and uncaught exceptions say."""

    def __init__(self, patience: float = 60.0):
        self.patience, self.errors, self._last, self._buffer, self._session = patience, [], 0, b"", None
        self._folder = tempfile.mkdtemp(prefix="nanoserve-chromium-")
        pipes = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (*os.pipe(), *os.pipe())]  # away from 3 and 4
        theirs_in, self._write, self._read, theirs_out = pipes

        def leash():  # the browser reads commands from 3 and writes to 4
            os.dup2(theirs_in, 3)
            os.dup2(theirs_out, 4)

        command = [find(), "--headless=new", "--remote-debugging-pipe", f"--user-data-dir={self._folder}", "--no-first-run",
                   "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking", "--hide-scrollbars",
                   *(["--no-sandbox"] if os.getuid() == 0 else []), "about:blank"]
        self._process = subprocess.Popen(command, pass_fds=(3, 4), preexec_fn=leash, start_new_session=True,
                                         stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(theirs_in)
        os.close(theirs_out)
        try:
            target = self.call("Target.createTarget", url="about:blank")["targetId"]
            self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Page", "Runtime", "Log"):
                self.call(domain + ".enable")
        except BaseException:
            self.close()
            raise

    def call(self, method: str, **params) -> dict:
        """The result of a command of the protocol."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + self.patience
        while True:
            answer = self._receive(deadline - time.monotonic())
            if answer.get("id") == self._last:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def _receive(self, seconds) -> dict:
        while b"\0" not in self._buffer:
            if seconds < 0 or not select.select([self._read], [], [], seconds)[0]:
                raise TimeoutError("the browser does not answer")
            if not (piece := os.read(self._read, 1 << 20)):
                raise RuntimeError("the browser has ended")
            self._buffer += piece
        message, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(message)
        self._note(message.get("method"), message.get("params"))
        return message

    def _note(self, method, params):
        if method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description") or details["text"])
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(params["entry"]["text"] + " " + params["entry"].get("url", ""))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert"):
            self.errors.append(str(params["args"]))

    def run(self, script: str):
        """The value of a JavaScript expression in the page, once it is settled."""
        answer = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"].get("exception", {}).get("description", script))
        return answer["result"].get("value")

    def until(self, script: str):
        """Wait until an expression is true, and return its value."""
        deadline = time.monotonic() + self.patience
        while not (value := self.run(script)):
            assert time.monotonic() < deadline, f"it did not happen: {script}"
            time.sleep(0.02)
        return value

    def look(self, width: int, height: int, *, dark: bool = False, phone: bool = False, still: bool = False) -> None:
        """What the page is looked at with."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=2 if phone else 1,
                  mobile=phone)
        self.call("Emulation.setEmulatedMedia", features=[
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"},
            {"name": "prefers-reduced-motion", "value": "reduce" if still else "no-preference"}])

    def press(self, key: str, code: int, modifiers: int = 0) -> None:
        """Press a key and let it go; modifiers: 2 is Ctrl, 8 Shift."""
        text = {"text": "\r"} if key == "Enter" else {"text": " "} if key == " " else {}
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, modifiers=modifiers,
                      **(text if kind == "keyDown" else {}))

    def screenshot(self, whole: bool = False) -> bytes:
        """A PNG of what is seen, or of all there is."""
        return base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"])

    def close(self) -> None:
        """End the browser."""
        with contextlib.suppress(OSError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._write)
        os.close(self._read)
        shutil.rmtree(self._folder, ignore_errors=True)

    def __exit__(self, *_) -> None:
        self.close()
