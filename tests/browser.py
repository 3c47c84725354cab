"""A headless Chromium, driven through a pipe by the DevTools protocol: nothing is needed but the browser."""
import base64
import json
import os
import select
import shutil
import subprocess
import time

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find():
    return next((path for path in map(shutil.which, NAMES) if path), None)


class Browser:
    """One page.  call() sends a method and waits for its answer; `errors` is what the page complained of."""

    def __init__(self, profile, *flags):
        theirs_in, self.out = os.pipe()
        self.inward, theirs_out = os.pipe()
        command = [find(), "--headless=new", "--no-sandbox", "--remote-debugging-pipe", "--hide-scrollbars",
                   "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--disable-dev-shm-usage",
                   f"--user-data-dir={profile}", *flags, "about:blank"]
        # It reads its orders from file 3 and answers on file 4, each message ended by a zero byte
        plumbing = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'
        self.process = subprocess.Popen(["bash", "-c", plumbing, "bash", *command], stdout=subprocess.DEVNULL,
                                        stderr=subprocess.DEVNULL, pass_fds=(theirs_in, theirs_out))
        os.close(theirs_in)
        os.close(theirs_out)
        self.number, self.buffer, self.errors, self.session, self.loaded = 0, b"", [], None, False
        target = self.call("Target.getTargets")["targetInfos"]
        target = next(info["targetId"] for info in target if info["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Runtime", "Log", "Page"):
            self.call(f"{domain}.enable")

    def message(self, until):
        while b"\0" not in self.buffer:
            left = until - time.monotonic()
            if left < 0 or not select.select([self.inward], [], [], left)[0]:
                raise TimeoutError("the browser does not answer")
            content = os.read(self.inward, 1 << 20)
            if not content:
                raise RuntimeError("the browser has died")
            self.buffer += content
        one, self.buffer = self.buffer.split(b"\0", 1)
        found = json.loads(one)
        method, said = found.get("method"), found.get("params", {})
        console = method == "Runtime.consoleAPICalled" and said["type"] == "error"
        logged = method == "Log.entryAdded" and said["entry"]["level"] == "error"
        if method == "Runtime.exceptionThrown" or console or logged:
            self.errors.append(said)
        self.loaded |= method == "Page.loadEventFired"
        return found

    def call(self, method, timeout=240, **params):
        self.number += 1
        order = {"id": self.number, "method": method, "params": params}
        if self.session:
            order["sessionId"] = self.session
        os.write(self.out, json.dumps(order).encode() + b"\0")
        until = time.monotonic() + timeout
        while (found := self.message(until)).get("id") != self.number:
            pass
        assert "error" not in found, (method, found)
        return found["result"]

    def open(self, url, width=1280, height=860, dark=False, scale=1, mobile=False):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale,
                  mobile=mobile)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        until = time.monotonic() + 240
        for address in ("about:blank", url):                          # so that another fragment is a new page
            self.loaded = False
            self.call("Page.navigate", url=address)
            while not self.loaded:
                self.message(until)

    def run(self, expression):
        """JavaScript -> its value; a promise is waited for."""
        found = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def key(self, key, **more):
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, **more)

    def screenshot(self, **options):
        return base64.b64decode(self.call("Page.captureScreenshot", format="png", **options)["data"])

    def close(self):
        self.process.terminate()
        self.process.wait(10)
        os.close(self.out)
        os.close(self.inward)
