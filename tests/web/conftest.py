"""One server with two scripted models and one browser, for all tests of the page; each test has a visitor of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, expect, sync_playwright

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
DESKTOP = {"width": 1280, "height": 800}
PHONE = {"width": 390, "height": 844}
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


@pytest.fixture(scope="session")
def address() -> str:
    return "http://127.0.0.1:8765"


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield running
        running.close()


@pytest.fixture
def visit(browser: Browser, address: str) -> Iterator[Visit]:
    """Opens the page as a new visitor: visit(locale="fr-FR", color_scheme="dark", viewport=PHONE, path="/").

    Whatever the test did, the console showed no error, nothing broke the content security policy, and no other origin
    was asked for anything.
    """
    visitors: list[Visitor] = []

    def open_page(path: str = "/", locale: str = "en-GB", refused: bool = False, **options: Any) -> Page:
        settings = {"viewport": DESKTOP, "service_workers": "block", "accept_downloads": True} | options
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
