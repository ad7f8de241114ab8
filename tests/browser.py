"""Headless Chromium, driven over its debugging pipe without any further package."""

import base64
import json
import os
import select
import shutil
import subprocess
import time

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for path in map(shutil.which, NAMES) if path), None)
SWITCHES = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--remote-debugging-pipe",
    "--disable-background-networking",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)
ANSWER_TIMEOUT = 60  # seconds


class Browser:
    """One tab without a network.

    `requests` are the addresses asked for other than the page's own; `errors` is what went to
    the console.
    """

    def __init__(self, profile, width=1200, height=800, dark=False):
        self.unread = b""
        self.last_id = 0
        self.session = None
        self.events, self.requests, self.errors = [], [], []
        self._start(profile)
        self._attach()
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.send("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])

    def _start(self, profile):
        # Chromium reads commands from descriptor 3 and answers on descriptor 4.
        command_read, self.command_write = os.pipe()
        self.answer_read, answer_write = os.pipe()
        chromium = [CHROMIUM, *SWITCHES, f"--user-data-dir={profile}", "about:blank"]
        shell = f'exec "$@" 3<&{command_read} 4>&{answer_write}'
        self.process = subprocess.Popen(
            ["bash", "-c", shell, "bash", *chromium],
            pass_fds=(command_read, answer_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(command_read)
        os.close(answer_write)

    def _attach(self):
        targets = self.send("Target.getTargets")["targetInfos"]
        tab = next(target["targetId"] for target in targets if target["type"] == "page")
        answer = self.send("Target.attachToTarget", targetId=tab, flatten=True)
        self.session = answer["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def _next_message(self):
        while b"\0" not in self.unread:
            ready = select.select([self.answer_read], [], [], ANSWER_TIMEOUT)[0]
            assert ready, f"the browser has sent nothing for {ANSWER_TIMEOUT} s"
            chunk = os.read(self.answer_read, 1 << 20)
            assert chunk, "the browser has ended"
            self.unread += chunk
        message, self.unread = self.unread.split(b"\0", 1)
        return json.loads(message)

    def send(self, method, **params):
        """The result of one command of the DevTools protocol."""
        self.last_id += 1
        command = {"id": self.last_id, "method": method, "params": params}
        if self.session:
            command["sessionId"] = self.session
        data = json.dumps(command).encode() + b"\0"
        while data:
            data = data[os.write(self.command_write, data) :]
        while True:
            message = self._next_message()
            if message.get("id") == self.last_id:
                assert "error" not in message, message
                return message["result"]
            self._note_event(message)

    def _note_event(self, event):
        method = event["method"]
        params = event.get("params", {})
        self.events.append(method)
        if method == "Network.requestWillBeSent":
            address = params["request"]["url"]
            if address != params["documentURL"].split("#")[0]:
                self.requests.append(address[:200])
        failed = (
            method == "Runtime.exceptionThrown"
            or (method == "Log.entryAdded" and params["entry"]["level"] == "error")
            or (method == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert"))
        )
        if failed:
            self.errors.append(params)

    def open(self, path, anchor=""):
        """Seconds until the page of a file is shown."""
        return self.go(f"file://{path}{anchor}")

    def go(self, address):
        """Seconds until the page has loaded, its script has run and it is drawn."""
        self.events.clear()
        started = time.perf_counter()
        self.send("Page.navigate", url=address)
        done = {"Page.loadEventFired", "Page.navigatedWithinDocument"}
        while not done & set(self.events):
            self._note_event(self._next_message())
        drawn = "requestAnimationFrame(() => setTimeout(resolve, 0)); setTimeout(resolve, 5000)"
        self.run(f"new Promise(resolve => {{ {drawn} }})")
        return time.perf_counter() - started

    def run(self, script):
        """The value of an expression in the page."""
        answer = self.send(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait_for(self, condition, seconds=20):
        """Wait until an expression in the page is true."""
        ends = time.perf_counter() + seconds
        while not self.run(f"Boolean({condition})"):
            assert time.perf_counter() < ends, f"{condition} is not true after {seconds} s"
            time.sleep(0.05)

    def press(self, key):
        text = {"text": key} if len(key) == 1 else {}
        self.send("Input.dispatchKeyEvent", type="keyDown", key=key, code=key, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key, code=key)
        self.run("new Promise(resolve => setTimeout(resolve, 30))")  # hashchange comes later

    def picture(self, path):
        with open(path, "wb") as file:
            file.write(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))

    def close(self):
        os.close(self.command_write)
        os.close(self.answer_read)
        self.process.kill()
        self.process.wait()
