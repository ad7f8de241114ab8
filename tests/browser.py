"""Headless Chromium over its debugging pipe, without any further package: what the page's tests and its benchmark drive."""

import base64
import json
import os
import select
import shutil
import subprocess
import time

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)


class Browser:
    """One tab, no network. `requests` are the addresses asked for other than the page's own, `errors` what went to the console."""

    def __init__(self, profile, width=1200, height=800, dark=False):
        ours, theirs = os.pipe(), os.pipe()  # it reads commands from descriptor 3 and answers on 4
        switches = "--headless=new --no-sandbox --disable-gpu --no-first-run --remote-debugging-pipe --disable-background-networking"
        command = [
            CHROMIUM,
            *switches.split(),
            "--host-resolver-rules=MAP * ~NOTFOUND",
            f"--user-data-dir={profile}",
            "about:blank",
        ]
        shell = f'exec "$@" 3<&{ours[0]} 4>&{theirs[1]}'
        self.process = subprocess.Popen(
            ["bash", "-c", shell, "bash", *command],
            pass_fds=(ours[0], theirs[1]),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(ours[0])
        os.close(theirs[1])
        self.write, self.read, self.rest, self.number = ours[1], theirs[0], b"", 0
        self.session, self.events, self.requests, self.errors = None, [], [], []
        target = next(
            t for t in self.send("Target.getTargets")["targetInfos"] if t["type"] == "page"
        )
        self.session = self.send(
            "Target.attachToTarget", targetId=target["targetId"], flatten=True
        )["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.send(f"{domain}.enable")
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        self.send(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}],
        )

    def _message(self):
        while b"\0" not in self.rest:
            assert select.select([self.read], [], [], 60)[0], (
                "the browser has said nothing for a minute"
            )
            piece = os.read(self.read, 1 << 20)
            assert piece, "the browser has gone"
            self.rest += piece
        one, self.rest = self.rest.split(b"\0", 1)
        return json.loads(one)

    def send(self, method, **params):
        self.number += 1
        body = {"id": self.number, "method": method, "params": params} | (
            {"sessionId": self.session} if self.session else {}
        )
        data = json.dumps(body).encode() + b"\0"
        while data:
            data = data[os.write(self.write, data) :]
        while True:
            answer = self._message()
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]
            self._note(answer)

    def _note(self, event):
        params = event.get("params", {})
        if (
            event["method"] == "Network.requestWillBeSent"
            and params["request"]["url"] != params["documentURL"].split("#")[0]
        ):
            self.requests.append(params["request"]["url"][:200])
        if (
            event["method"] == "Runtime.exceptionThrown"
            or event["method"] == "Log.entryAdded"
            and params["entry"]["level"] == "error"
        ):
            self.errors.append(params)
        if event["method"] == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert"):
            self.errors.append(params)
        self.events.append(event["method"])

    def open(self, path, anchor=""):
        """Seconds until the page has loaded and its script has run."""
        self.events.clear()
        started = time.perf_counter()
        self.send("Page.navigate", url=f"file://{path}{anchor}")
        while (
            "Page.loadEventFired" not in self.events
            and "Page.navigatedWithinDocument" not in self.events
        ):
            self._note(self._message())
        self.run(
            "new Promise(f => { requestAnimationFrame(() => setTimeout(f, 0)); setTimeout(f, 5000) })"
        )  # drawn
        return time.perf_counter() - started

    def run(self, script):
        """The value of an expression in the page."""
        answer = self.send(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key):
        for kind in ("keyDown", "keyUp"):
            self.send(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                **({"text": key} if len(key) == 1 and kind == "keyDown" else {}),
            )
        self.run("new Promise(f => setTimeout(f, 30))")  # hashchange comes later

    def picture(self, path):
        with open(path, "wb") as file:
            file.write(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))

    def close(self):
        os.close(self.write)
        os.close(self.read)
        self.process.kill()
        self.process.wait()
