"""A server of the program and a browser at its page, for the tests of that."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest

PATIENCE = 20.0  # seconds
WORDS = ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1100,900")


class Site:
    """Is a server of this program at an address."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process, self.url = process, url

    def ask(self, what: str = "completions", **body: Any) -> dict[str, Any]:
        headers = {"content-type": "application/json"}
        request = Request(f"{self.url}/v1/{what}", json.dumps(body).encode(), headers)
        with urlopen(request, timeout=PATIENCE) as answer:
            return json.load(answer)

    def write(self, **body: Any) -> str:
        """Returns the text of a completion that is not streamed."""
        return self.ask(**body)["choices"][0]["text"]

    def figures(self) -> str:
        with urlopen(f"{self.url}/metrics", timeout=PATIENCE) as answer:
            return answer.read().decode()


@contextmanager
def serving(folder: Path, *words: str) -> Iterator[Site]:
    command = [sys.executable, "-m", "gpt_lightning", "serve", "--port", "0", *words]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    with (folder / "said.txt").open("w+") as said:
        process = subprocess.Popen(command, cwd=folder, env=environment, stderr=said, text=True)
        try:
            yield Site(process, until(lambda: _address(folder / "said.txt", process)))
        finally:
            process.kill()
            process.wait()


def _address(said: Path, process: subprocess.Popen[str]) -> str:
    text = said.read_text(encoding="utf-8")
    assert process.poll() is None, text
    return text.partition(" at ")[2].strip() if "serving" in text and text.endswith("\n") else ""


def until(found: Callable[[], Any]) -> Any:
    """Returns what is found, as soon as it is something."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if value := found():
            return value
        time.sleep(0.02)
    raise AssertionError("it has not come")


@contextmanager
def chromium() -> Iterator[Any]:
    """Starts Debian's Chromium without a window; the test is skipped where there is none."""
    webdriver = pytest.importorskip("selenium.webdriver")
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("no chromium with its chromedriver is installed")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for word in WORDS:
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    try:
        yield browser
    finally:
        browser.quit()
