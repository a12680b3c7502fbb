"""`porcelet serve` without a word more: two models, of which the little one says on the page what it can be asked."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect

from porcelet import hub
from tests.web.conftest import PHONE, START_SECONDS
from tests.web.test_chat import ask, last_answer, serious_findings
from tests.web.test_static import texts

LOCALES = {"en": "en-GB", "fr": "fr-FR", "zh": "zh-CN"}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, default_model: Path) -> Iterator[str]:
    """Where a server is that was told nothing but its port."""
    folder = tmp_path_factory.mktemp("serve")
    command = [sys.executable, "-m", "porcelet", "serve", "--port", "0"]
    with (folder / "stderr").open("wb") as stderr:
        process = subprocess.Popen(command, stderr=stderr, env=os.environ | {"XDG_DATA_HOME": str(folder)})
    deadline = time.monotonic() + START_SECONDS
    line = rf"^serving {hub.R1_MINI} on (\S+) "
    while not (ready := re.search(line, (folder / "stderr").read_text(), re.MULTILINE)):
        assert process.poll() is None and time.monotonic() < deadline, (folder / "stderr").read_text()
        time.sleep(0.05)
    yield ready[1]
    process.terminate()
    assert process.wait(20) == 0


@pytest.fixture
def page(browser: Browser, url: str, request: pytest.FixtureRequest) -> Iterator[Page]:
    """The page in a new visitor's browser, in English unless the test is of another language."""
    language = getattr(request, "param", "en")
    opened = browser.new_page(locale=LOCALES[language])
    opened.goto(url)
    expect(opened.locator("#model")).to_have_value(hub.DEFAULT_MODEL)
    yield opened
    opened.close()


def test_both_models_are_listed(url: str) -> None:
    """The default model is the first, DeepSeek's names stand for it, and the little one is beside it."""
    roots = {model["id"]: model["root"] for model in httpx.get(f"{url}/v1/models").json()["data"]}
    assert list(roots)[:2] == [hub.DEFAULT_MODEL, hub.R1_MINI] and roots[hub.R1_MINI] == hub.R1_MINI
    assert {root for name, root in roots.items() if name.startswith("deepseek-")} == {hub.DEFAULT_MODEL}
    session = httpx.get(f"{url}/api/session").json()
    assert session["default_model"] == hub.DEFAULT_MODEL
    examples = {model["name"]: tuple(model["examples"]) for model in session["models"]}
    assert examples == {hub.DEFAULT_MODEL: (), hub.R1_MINI: hub.examples_of(hub.resolve(hub.R1_MINI))}


def test_reasoning_is_apart_from_the_answer(url: str) -> None:
    """An API client gets the thoughts as `reasoning_content`, and an expression as the content."""
    asked: dict[str, Any] = {"model": hub.R1_MINI, "messages": [{"role": "user", "content": "3 7 12 = 33"}]}
    done = httpx.post(f"{url}/v1/chat/completions", json=asked | {"temperature": 0}, timeout=20).json()
    message = done["choices"][0]["message"]
    assert "=" in message["reasoning_content"] and re.fullmatch(r"[\d+*/() -]+", message["content"])
    assert done["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("page", LOCALES, indirect=True)
def test_page_says_what_it_can_be_asked(page: Page, request: pytest.FixtureRequest) -> None:
    """With the little model chosen, its examples stand in the suggestions' place, with a sentence about them."""
    purpose = page.get_by_text(texts()[request.node.callspec.params["page"]]["countdown"])
    suggestion = page.locator("#suggestions button").first
    expect(purpose).to_be_hidden()
    expect(suggestion).to_be_visible()
    page.locator("#model").select_option(hub.R1_MINI)
    expect(purpose).to_be_visible()
    expect(suggestion).to_be_hidden()
    expect(page.locator("#examples button")).to_have_text(list(hub.examples_of(hub.resolve(hub.R1_MINI))))
    assert serious_findings(page) == []
    page.set_viewport_size(PHONE)
    expect(page.locator("#examples button").last).to_be_in_viewport()
    page.locator("#model").select_option(hub.DEFAULT_MODEL)
    expect(suggestion).to_be_visible()
    expect(purpose).to_be_hidden()


def test_an_example_is_asked_and_answered(page: Page) -> None:
    """A click on an example writes it; the thoughts unfold line by line, and no sign is lost from the answer."""
    page.locator("#model").select_option(hub.R1_MINI)
    example = page.locator("#examples button").first
    question = example.inner_text()
    example.click()
    expect(page.get_by_label("Message", exact=True)).to_have_value(question)
    ask(page, question)
    answer = last_answer(page)
    expect(answer.locator(".speed")).to_be_visible()
    expect(answer.locator("> .prose")).to_have_text(re.compile(r"^[\d+*/() -]+\s*$"))
    answer.locator("summary").click()
    expect(answer.locator(".thinking .prose")).to_contain_text("=")
