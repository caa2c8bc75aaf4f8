"""Chromium for the tests of the web page, driven by playwright; with what they need, kept in ROCK_TEST_CACHE.

playwright is 130 MB with its driver, so it is no part of the development lock: it is installed with pip into a folder
of its own. Chromium is Debian's package, axe-core and TypeScript pinned packages of npm.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

CACHE = Path(os.environ.get("ROCK_TEST_CACHE") or Path.home() / ".cache" / "rock-tests") / "ui"
PLAYWRIGHT = "playwright==1.65.2"
AXE = "axe-core@4.14.1"
AXE_DIGEST = "FHfa+lmNjQZfJz1q8wKqIDwC6DExcHt/pkjNQb09a3NPjCKg2rhu5qb2S4r76ASyFNNtuFooJpZe37OgudVGtQ=="
TYPESCRIPT = "typescript@5.9.3"
TYPESCRIPT_DIGEST = "jl1vZzPDinLr9eUt3J/t7V6FgNEw9QjvBPdysz9KfQDD41fQrC2Y4vKQdiaUpFT4bXlb1RHhLpp8wtm6M5TgSw=="
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync"]  # fmt: skip


class Missing(Exception):
    """Something that the tests need cannot be installed here; the text is the reason of the skip."""


def chromium() -> str:
    """The path of Chromium. Missing."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    if os.geteuid() == 0 and shutil.which("apt-get"):
        subprocess.run(["apt-get", "install", "-y", "-q", "--no-install-recommends", "chromium"], capture_output=True,
                       timeout=600, env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"})  # fmt: skip
    if found := shutil.which("chromium"):
        return found
    raise Missing("there is no Chromium: apt-get install chromium")


def playwright() -> Any:
    """playwright's sync_playwright. Missing."""
    folder = CACHE / f"{PLAYWRIGHT}-{sys.version_info[0]}.{sys.version_info[1]}"
    if not (folder / "ready").exists():
        shutil.rmtree(folder, ignore_errors=True)
        done = subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--target",
                               str(folder), PLAYWRIGHT], capture_output=True, text=True, timeout=600)  # fmt: skip
        if done.returncode:
            raise Missing(f"{PLAYWRIGHT} cannot be installed: {done.stderr.strip().splitlines()[-1:]}")
        (folder / "ready").touch()
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    from playwright.sync_api import sync_playwright

    return sync_playwright


def _npm(package: str, digest: str) -> Path:
    """The folder of an unpacked package of npm, whose SHA-512 is checked. Missing."""
    folder = CACHE / package
    if not (folder / "package").exists():
        folder.mkdir(parents=True, exist_ok=True)
        if shutil.which("npm") is None:
            raise Missing(f"there is no npm to fetch {package}: apt-get install npm")
        done = subprocess.run(["npm", "pack", "--silent", package], cwd=folder, capture_output=True, timeout=300)
        tarball = folder / f"{package.replace('@', '-')}.tgz"
        if done.returncode or not tarball.exists():
            raise Missing(f"{package} cannot be fetched with npm")
        assert base64.b64encode(hashlib.sha512(tarball.read_bytes()).digest()).decode() == digest
        with tarfile.open(tarball) as archive:
            archive.extractall(folder / "part", filter="data")
        (folder / "part" / "package").rename(folder / "package")
        tarball.unlink()
    return folder / "package"


def axe() -> str:
    """The source of axe-core. Missing."""
    return (_npm(AXE, AXE_DIGEST) / "axe.min.js").read_text()


def typescript() -> list[str]:
    """The command of the TypeScript compiler. Missing."""
    if shutil.which("node") is None:
        raise Missing("there is no node: apt-get install nodejs")
    return ["node", str(_npm(TYPESCRIPT, TYPESCRIPT_DIGEST) / "bin" / "tsc")]


# Chromium reports a failed request on the console too; a test that provokes one names its status.
_FAILED_REQUEST = re.compile(r"Failed to load resource: .*(?:status of (\d+)|net::ERR_)")


def until(page: Any, expression: str, seconds: float = 20.0) -> None:
    """Wait until a JavaScript expression is true. playwright's own wait evaluates text in the page, which the Content
    Security Policy refuses."""
    end = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < end, f"not true within {seconds:g} s: {expression}"
        page.wait_for_timeout(50)


# Scroll the table of a screen for 8 seconds, and return the time of each frame in milliseconds.
_SCROLL = """async () => {
    const box = document.querySelector('.rows'), times = [];
    let last = performance.now();
    const end = last + 8000;
    while (last < end) {
        await new Promise(requestAnimationFrame);
        const now = performance.now();
        times.push(now - last);
        last = now;
        box.scrollTop = (box.scrollTop + 220) % (box.scrollHeight - box.clientHeight);
    }
    return times;
}"""


def frame_time(page: Any, budget: float) -> float:
    """The 95th percentile of frame times in milliseconds while the table of a screen scrolls. Other programs delay
    frames too, so a time over the budget is measured again, up to twice; the result is the smallest one."""
    found: list[float] = []
    while len(found) < 3 and (not found or found[-1] > budget):
        times = sorted(page.evaluate(_SCROLL))
        found.append(times[int(len(times) * 0.95)])
        print(f"{len(times)} frames, p50 {times[len(times) // 2]:.1f} ms, p95 {found[-1]:.1f} ms, "
              f"load {os.getloadavg()[0]:.1f}")  # fmt: skip
    return min(found)


class Watched:
    """A page whose console has to stay free of errors. allowed: HTTP statuses that the test provokes; "net" for a
    server that is gone."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.allowed: set[str] = set()
        self.problems: list[str] = []
        self.dialogs: list[str] = []
        page.on("console", self._console)
        page.on("pageerror", lambda error: self.problems.append(f"exception: {error}"))
        page.on("dialog", self._dialog)

    def _dialog(self, dialog: Any) -> None:
        self.dialogs.append(dialog.message)
        dialog.dismiss()

    def _console(self, message: Any) -> None:
        if message.type not in ("error", "warning"):
            return
        found = _FAILED_REQUEST.search(message.text)
        if found is not None and (found[1] or "net") in self.allowed:
            return
        if "net" in self.allowed and "WebSocket connection" in message.text:
            return
        self.problems.append(message.text)
