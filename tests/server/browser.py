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


class Tab:
    """Is the page in the browser, driven as a person does it."""

    def __init__(self, chrome: Any, site: Site) -> None:
        self.chrome, self.site, self.run = chrome, site, chrome.execute_script
        chrome.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        chrome.get(site.url)
        self.run("localStorage.clear()")
        self.reload()

    def reload(self) -> None:
        self.chrome.get(self.site.url)
        until(lambda: self["#write"].is_enabled())

    def __getitem__(self, selector: str) -> Any:
        return self.chrome.find_element("css selector", selector)

    def all(self, selector: str) -> list[Any]:
        return self.chrome.find_elements("css selector", selector)

    def press(self, *keys: str) -> None:
        from selenium.webdriver import ActionChains, Keys

        *held, last = [getattr(Keys, key, key) for key in keys]
        actions = ActionChains(self.chrome)
        for key in held:
            actions.key_down(key)
        actions.send_keys(last)
        for key in held:
            actions.key_up(key)
        actions.perform()

    def open_settings(self) -> None:
        self.run("document.querySelectorAll('details').forEach((each) => (each.open = true))")

    def set(self, name: str, value: str, column: int = 0) -> None:
        self.open_settings()
        field = self[f"#{name}-{column}"]
        if field.tag_name == "select":
            field.send_keys(value)
        else:
            field.clear()
            field.send_keys(value)

    def write(self, prompt: str) -> None:
        self["#prompt"].clear()
        self["#prompt"].send_keys(prompt)
        self["#write"].click()
        self.wait()

    def wait(self) -> None:
        until(lambda: self["#again"].is_enabled())

    def texts(self) -> list[str]:
        """Returns the text of each column, as its tokens have it."""
        return self.run(
            "return [...document.querySelectorAll('.column')].map((column) =>"
            " [...column.querySelectorAll('.tokens > span:not(.prompt)')]"
            ".map((span) => span.textContent).join(''))"
        )

    def requests(self) -> list[str]:
        """Lists the addresses asked for since the last call."""
        events = [json.loads(entry["message"])["message"] for entry in self.chrome.get_log("performance")]
        sent = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
        addresses = [each["request"]["url"] for each in sent]
        return [address for address in addresses if not address.startswith("data:")]
