"""One server with two scripted models and one browser for all tests of the page; each has a visitor of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import (
    Browser,
    BrowserContext,
    ConsoleMessage,
    Page,
    StorageState,
    ViewportSize,
    expect,
    sync_playwright,
)

from tests.scripted_model import save_scripted_model
from tests.web import scripts

START_SECONDS = 60
CHROMIUM = "/usr/bin/chromium"
OPTIONS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
DESKTOP: ViewportSize = {"width": 1280, "height": 800}
PHONE: ViewportSize = {"width": 390, "height": 844}
PATIENCE = 15_000  # ms for anything to appear


@dataclass
class Visitor:
    """A browser window of a new visitor, and all that went wrong in it: errors, violations, requests to elsewhere."""

    page: Page
    context: BrowserContext
    url: str
    refused: bool  # whether the test makes the server refuse something, which browsers write to the console
    complaints: list[str] = field(default_factory=list)

    def watch(self) -> None:
        self.page.on("console", self._read)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.context.on("request", lambda request: self._check(request.url))

    def _read(self, line: ConsoleMessage) -> None:
        if line.type == "error" and not (self.refused and line.text.startswith("Failed to load resource")):
            self.complaints.append(line.text)

    def _check(self, url: str) -> None:
        if not url.startswith((self.url, "data:", "blob:")):
            self.complaints.append(f"asked another origin: {url}")


expect.set_options(timeout=PATIENCE)
Visit = Callable[..., Page]


@pytest.fixture(scope="package")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the server has its models, its database and its log."""
    return tmp_path_factory.mktemp("web")


@pytest.fixture(scope="package")
def key(folder: Path) -> str:
    """An API key, as a visitor is given one."""
    command = [sys.executable, "-m", "porcelet", "keys", "create", "visitor"]
    return subprocess.run(
        command, env=_environment(folder), stdout=subprocess.PIPE, check=True, text=True
    ).stdout.strip()


@pytest.fixture(scope="package")
def address(folder: Path, key: str) -> Iterator[str]:
    """Where the server is, with the models "writer" and "endless"; it asks even this machine for the key."""
    models = [
        save_scripted_model(folder / "writer", scripts.WRITER, scripts.TEMPLATE),
        save_scripted_model(folder / "endless", scripts.ENDLESS, scripts.TEMPLATE),
    ]
    command = [sys.executable, "-m", "porcelet", "serve", "--port", "0", "--require-key", "--set", "threads=1"]
    command += ["--set", "cache_tokens=262144"]  # "endless" is to outlast a test on a fast machine too
    command += [option for model in models for option in ("--model", str(model))]
    log = folder / "stderr"
    with log.open("wb") as stderr:
        process = subprocess.Popen(command, stderr=stderr, env=_environment(folder))
    yield _address(process, log)
    process.terminate()
    assert process.wait(20) == 0


def _environment(folder: Path) -> dict[str, str]:
    return os.environ | {"PORCELET_HOME": str(folder / "home")}


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    """What a server says of its address once all its models are loaded."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        ready = re.findall(r"^serving \w+ on (http://127\.0\.0\.1:\d+) \(", log.read_text(), re.MULTILINE)
        if len(ready) == 2:
            return str(ready[0])
        time.sleep(0.05)
    process.kill()
    raise AssertionError(f"the server did not start: {log.read_text()[-2000:]}")


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    """Chromium; gone before tests elsewhere, as playwright's event loop runs in this thread as long as it is here."""
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield running
        running.close()


@pytest.fixture(scope="package")
def login(browser: Browser, address: str, key: str) -> StorageState:
    """The cookie of somebody who is logged in."""
    context = browser.new_context()
    assert context.request.post(f"{address}/login", data={"key": key}).status == 204
    state = context.storage_state()
    context.close()
    return state


@pytest.fixture
def visit(browser: Browser, address: str, login: StorageState) -> Iterator[Visit]:
    """Opens the page in a new window of somebody who is logged in: visit(locale="fr-FR", viewport=PHONE, path="/").

    Whatever the test did, the console showed no error, nothing broke the content security policy, and no other origin
    was asked for anything.
    """
    visitors: list[Visitor] = []

    def open_page(path: str = "/", locale: str = "en-GB", refused: bool = False, **options: Any) -> Page:
        settings = {"viewport": DESKTOP, "service_workers": "block", "storage_state": login} | options
        context = browser.new_context(locale=locale, **settings)
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        context.set_default_timeout(PATIENCE)
        visitor = Visitor(context.new_page(), context, address, refused)
        visitors.append(visitor)
        visitor.watch()
        visitor.page.goto(address + path)
        return visitor.page

    yield open_page
    complaints = [complaint for visitor in visitors for complaint in visitor.complaints]
    for visitor in visitors:
        visitor.context.close()
    assert complaints == []
