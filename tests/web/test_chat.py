"""The chat as a person uses it: a real browser, the real server, two models that say what they are told.

"writer" thinks a little, then answers with everything Markdown has. "endless" thinks, or without thinking talks, until
it is stopped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from uuid import UUID

import pytest
from playwright.sync_api import Locator, Page, Route, expect

from tests.web.conftest import PHONE

AXE = files("axe_playwright_python") / "axe.min.js"
Visit = Callable[..., Page]


def choose(page: Page, model: str, effort: str) -> None:
    page.get_by_label("Model", exact=True).select_option(model)
    page.get_by_label("Thinking effort").select_option(effort)


def ask(page: Page, question: str) -> None:
    page.get_by_label("Message", exact=True).fill(question)
    page.get_by_role("button", name="Send", exact=True).click()


def ask_and_wait(page: Page, question: str, effort: str = "off") -> Locator:
    choose(page, "writer", effort)
    ask(page, question)
    expect(last_answer(page).locator(".speed")).to_be_visible()
    return last_answer(page)


def last_answer(page: Page) -> Locator:
    return page.locator(".answer").last


def drawn(answer: Locator) -> str:
    """The elements of an answer; that one can be reached by keyboard follows a frame after it is too wide."""
    expect(answer.locator(".math:not(:has(.katex))")).to_have_count(0)
    return answer.locator("> .prose").inner_html().replace(' tabindex="0"', "")


def options(page: Page) -> Locator:
    return page.get_by_role("button", name="Options of this conversation")


def serious_findings(page: Page) -> list[str]:
    """What axe-core finds that keeps people from using the page."""
    if not page.evaluate("'axe' in window"):
        page.evaluate(AXE.read_text())
    page.evaluate("new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(resolve)))")
    found = page.evaluate("axe.run()")["violations"]
    return [
        f"{violation['id']}: {node['html'][:200]}"
        for violation in found
        if violation["impact"] in ("serious", "critical")
        for node in violation["nodes"]
    ]


# ---- asking and answering -------------------------------------------------------------------------------------------


def test_first_visit_to_first_answer(visit: Visit) -> None:
    """A visitor types, presses Enter, sees an answer, and finds the conversation in the sidebar under its title."""
    page = visit()
    expect(page.get_by_role("heading", name="What is on your mind?")).to_be_visible()
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    assert serious_findings(page) == []
    choose(page, "writer", "off")
    page.keyboard.press("Tab")
    page.get_by_label("Message", exact=True).fill("Why is the sky blue today?")
    page.keyboard.press("Enter")
    expect(last_answer(page).locator(".speed")).to_have_text(re.compile(r"^\d+ tokens · [\d.,]+ tokens/s$"))
    expect(page.get_by_role("heading", name="What is on your mind?")).to_be_hidden()
    listed = page.get_by_role("navigation").get_by_role("link", name="Why is the sky blue today?")
    expect(listed.first).to_have_attribute("aria-current", "page")
    expect(page).to_have_title("Why is the sky blue today? · porcelet")
    expect(page.get_by_role("meter")).to_have_attribute("aria-label", re.compile(r"\d+ of [\d,]+ tokens"))


def test_answer_is_drawn_with_all_that_markdown_has(visit: Visit) -> None:
    """Tables, coloured code and formulas are drawn; a price is no formula, a picture from elsewhere is a link."""
    answer = ask_and_wait(visit(), "Show me everything")
    expect(answer.locator("h4")).to_have_count(1)
    expect(answer.locator("table tr")).to_have_count(5)
    expect(answer.locator("figcaption .language")).to_have_text("Python")
    expect(answer.locator("pre .hljs-keyword").first).to_be_visible()
    expect(answer.locator(".math.display .katex-display")).to_have_count(2)
    expect(answer.locator(".math:not(.display) .katex")).to_have_count(3)
    expect(answer).to_contain_text("costs $5 and one for $10")
    expect(answer).to_contain_text("or <b>this</b> and [that](javascript:alert(1))")
    expect(answer.locator("a")).to_have_text(["the paper", "a picture"])
    for link in answer.locator("a").all():
        assert "noopener" in (link.get_attribute("rel") or "")


def test_growing_answer_is_the_answer_drawn_at_once(visit: Visit) -> None:
    """What was drawn piece by piece while it streamed is, element for element, what a reload draws at once."""
    page = visit()
    streamed = drawn(ask_and_wait(page, "Draw twice"))
    page.reload()
    expect(last_answer(page).locator(".speed")).to_be_visible()
    assert drawn(last_answer(page)) == streamed


def test_thinking_is_folded_with_a_live_timer(visit: Visit) -> None:
    """While the model thinks, seconds and rate run in one folded line; it opens by keyboard; stopping keeps it."""
    page = visit()
    choose(page, "endless", "max")
    ask(page, "Think for ever")
    thinking = last_answer(page).locator("summary")
    expect(thinking).to_have_text(re.compile(r"^Thinking… \d+ s · [\d.,]+ tokens/s$"))
    expect(last_answer(page).locator(".thinking .prose")).to_be_hidden()
    thinking.press("Enter")
    expect(last_answer(page).locator(".thinking .prose")).to_contain_text("well so")
    page.get_by_role("button", name="Stop the answer").click()
    expect(last_answer(page)).to_contain_text("Stopped.")
    expect(thinking).to_have_text(re.compile(r"^Thought for \d+ s$"))


def test_stop_keeps_what_came(visit: Visit) -> None:
    """Escape stops an answer; what had come stays, and the next question can be asked."""
    page = visit()
    choose(page, "endless", "off")
    ask(page, "Talk for ever")
    expect(last_answer(page)).to_contain_text("tick tock")
    page.keyboard.press("Escape")
    expect(last_answer(page)).to_contain_text("Stopped.")
    expect(last_answer(page)).to_contain_text("tick tock")
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()


def test_reload_in_the_middle_goes_on(visit: Visit) -> None:
    """After a reload the answer goes on where it is by now, from its first word, and can be stopped."""
    page = visit()
    choose(page, "endless", "off")
    ask(page, "Talk while I reload")
    expect(last_answer(page)).to_contain_text("tick tock tick")
    before = last_answer(page).locator(".prose").last.inner_text()
    page.reload()
    expect(last_answer(page)).to_contain_text("tick tock tick")
    page.wait_for_function(
        "known => document.querySelector('.answer:last-child > .prose').innerText.length > known", arg=len(before)
    )
    assert last_answer(page).locator("> .prose").inner_text().startswith(before)
    page.get_by_role("button", name="Stop the answer").click()
    expect(last_answer(page)).to_contain_text("Stopped.")


def test_lost_connection_is_retried_calmly(visit: Visit) -> None:
    """When the network goes away, a notice says so; when it is back the answer goes on, each word there once."""
    page = visit(refused=True)
    choose(page, "endless", "off")
    page.evaluate("""() => {
        const original = window.fetch;
        let streams = 0;  // the first connection breaks after a moment, the second cannot be made
        window.fetch = async (address, options) => {
            if (!String(address).includes("/api/streams/") || options.method !== "GET" || ++streams > 2) {
                return original(address, options);
            }
            if (streams === 2) throw new TypeError("no network");
            const response = await original(address, options);
            const reader = response.body.getReader();
            const broken = new ReadableStream({
                async pull(controller) {
                    if (window.cut) controller.error(new TypeError("network error"));
                    else controller.enqueue((await reader.read()).value);
                },
            });
            return new Response(broken, {headers: response.headers});
        };
    }""")
    ask(page, "Talk through a tunnel")
    expect(last_answer(page)).to_contain_text("tick tock")
    page.evaluate("window.cut = true")
    expect(page.get_by_text("Connection lost. Trying again…")).to_be_visible()
    expect(page.get_by_text("Connection lost. Trying again…")).to_be_hidden()
    page.get_by_role("button", name="Stop the answer").click()
    expect(last_answer(page)).to_contain_text("Stopped.")
    words = last_answer(page).locator("> .prose").inner_text().split()
    assert words == (["tick", "tock"] * len(words))[: len(words)]


def test_regenerate_and_switch_versions(visit: Visit) -> None:
    """Answering again makes a second version beside the first; the switcher goes between them and remembers."""
    page = visit()
    first = ask_and_wait(page, "Answer twice")
    first.get_by_role("button", name="Answer again").click()
    expect(page.get_by_role("group", name="Version 2 of 2")).to_be_visible()
    expect(last_answer(page).locator(".speed")).to_be_visible()
    page.get_by_role("button", name="Previous version").press("Enter")
    expect(page.get_by_role("group", name="Version 1 of 2")).to_be_visible()
    expect(page.get_by_role("button", name="Next version")).to_be_focused()
    expect(page.locator(".answer")).to_have_count(1)
    page.reload()
    expect(page.get_by_role("group", name="Version 1 of 2")).to_be_visible()


def test_edit_makes_a_branch(visit: Visit) -> None:
    """An edited question is a new branch with its own answer; the old branch is one click away, whole."""
    page = visit()
    ask_and_wait(page, "The first question")
    ask_and_wait(page, "The second question")
    page.locator(".question").first.hover()
    page.locator(".question").first.get_by_role("button", name="Edit").click()
    field = page.get_by_role("textbox", name="Edit")
    expect(field).to_be_focused()
    field.fill("The first question, put better")
    field.press("Enter")
    expect(page.locator(".question")).to_have_count(1)
    expect(page.locator(".bubble")).to_have_text("The first question, put better")
    expect(last_answer(page).locator(".speed")).to_be_visible()
    page.get_by_role("button", name="Previous version").click()
    expect(page.locator(".bubble")).to_have_text(["The first question", "The second question"])


def test_escape_leaves_an_edit(visit: Visit) -> None:
    """Escape gives the question back as it was, and the focus to the button that began the edit."""
    page = visit()
    ask_and_wait(page, "Leave me as I am")
    edit = page.locator(".question").get_by_role("button", name="Edit")
    edit.focus()
    edit.press("Enter")
    page.get_by_role("textbox", name="Edit").fill("something else")
    page.keyboard.press("Escape")
    expect(page.locator(".bubble")).to_have_text("Leave me as I am")
    expect(edit).to_be_focused()


def test_text_typed_while_sending_stays(visit: Visit) -> None:
    """What is typed while a question is on its way stays; a refused question comes back in front of it, files too."""
    page = visit(refused=True)
    choose(page, "writer", "off")
    waiting: list[Route] = []
    page.route("**/messages", lambda route: waiting.append(route))
    field = page.get_by_label("Message", exact=True)
    ask(page, "refused question")
    expect(field).to_have_value("")
    field.press_sequentially("typed since")
    error = {"message": "the prompt has 9001 tokens", "code": "context_length_exceeded", "type": "", "param": None}
    page.wait_for_timeout(100)
    waiting[0].fulfill(status=400, json={"error": error})
    expect(field).to_have_value("refused question\ntyped since")
    expect(page.get_by_role("alert").first).to_contain_text("The conversation is too long")
    expect(page.get_by_role("alert").first).to_contain_text("9001 tokens")
    page.reload()
    expect(field).to_have_value("refused question\ntyped since")
    expect(page.get_by_role("link", name="New conversation")).to_have_count(0)  # the empty one is gone again


def test_lost_response_is_asked_once(visit: Visit) -> None:
    """A question whose response was lost is sent again under the same id, and double keys send it once."""
    page = visit(refused=True)
    choose(page, "writer", "off")
    sent: list[str] = []

    def lose(route: Route) -> None:
        sent.append(json.loads(route.request.post_data or "{}")["id"])
        if len(sent) == 1:
            route.abort()
        else:
            route.continue_()

    page.route("**/messages", lose)
    field = page.get_by_label("Message", exact=True)
    field.fill("Asked once")
    field.evaluate("""(field) => {
        const enter = () => field.dispatchEvent(new KeyboardEvent("keydown", {key: "Enter", cancelable: true}));
        enter();
        enter();
    }""")
    expect(page.get_by_role("alert").first).to_contain_text("The server does not answer.")
    assert len(sent) == 1
    page.reload()
    expect(field).to_have_value("Asked once")
    page.get_by_role("button", name="Send", exact=True).click()
    expect(last_answer(page).locator(".speed")).to_be_visible()
    assert len(sent) == 2
    assert sent[0] == sent[1]
    assert UUID(sent[0]).version == 4


def test_sending_stays_in_its_conversation(visit: Visit) -> None:
    """A question whose response comes after another conversation was opened shows nothing there."""
    page = visit()
    choose(page, "writer", "off")
    waiting: list[Route] = []
    page.route("**/messages", lambda route: waiting.append(route))
    ask(page, "Too slow for me")
    page.wait_for_timeout(300)
    page.get_by_label("Message", exact=True).focus()
    page.keyboard.press("Control+Shift+O")
    waiting[0].continue_()
    expect(page.get_by_role("navigation").get_by_role("link", name="Too slow for me").first).to_be_visible()
    expect(page.locator(".question")).to_have_count(0)
    expect(page.get_by_role("heading", name="What is on your mind?")).to_be_visible()


def test_keys_of_an_input_method_do_not_send(visit: Visit) -> None:
    """The Enter that confirms a word of an input method is not for the page, in Safari's way of telling neither."""
    page = visit()
    page.get_by_label("Message", exact=True).fill("pinyin")
    for how in ("isComposing: true", "keyCode: 229"):
        page.evaluate(f"""() => document.getElementById("prompt").dispatchEvent(
            new KeyboardEvent("keydown", {{key: "Enter", cancelable: true, {how}}}))""")
    expect(page.get_by_label("Message", exact=True)).to_have_value("pinyin")
    expect(page.locator(".question")).to_have_count(0)


def test_focus_is_never_lost(visit: Visit) -> None:
    """Answering again, switching versions and an answer's end leave the focus on something that can be pressed."""
    page = visit()
    ask_and_wait(page, "Keep the focus")
    page.get_by_role("button", name="Answer again").press("Enter")
    expect(page.get_by_role("group", name="Version 2 of 2")).to_be_visible()
    assert page.evaluate("document.activeElement !== document.body")
    page.get_by_role("button", name="Previous version").press("Enter")
    expect(page.get_by_role("button", name="Next version")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Previous version")).to_be_focused()
    link = page.get_by_role("navigation").get_by_role("link", name="Keep the focus").first
    link.focus()
    page.get_by_role("navigation").get_by_role("button", name="Options: Keep the focus").first.press("Enter")
    page.keyboard.press("Enter")  # the first item: Pin
    expect(page.get_by_role("list", name="Pinned").get_by_role("link", name="Keep the focus")).to_be_visible()
    assert page.evaluate("document.activeElement !== document.body")


def test_copying(visit: Visit) -> None:
    """The buttons copy an answer's Markdown and a block's code, the shortcut the last answer."""
    page = visit()
    answer = ask_and_wait(page, "Copy me")
    answer.get_by_role("button", name="Copy", exact=True).click()
    markdown = page.evaluate("navigator.clipboard.readText()")
    assert "```python" in markdown
    answer.get_by_role("button", name="Copy the code").click()
    assert page.evaluate("navigator.clipboard.readText()") in markdown
    page.keyboard.press("Control+Shift+L")
    expect(page.get_by_role("status").filter(has_text="Copied")).to_have_count(1)
    assert page.evaluate("navigator.clipboard.readText()") == markdown


def test_long_conversation_is_drawn_from_its_end(visit: Visit) -> None:
    """Of a thousand messages the last are drawn; scrolling up draws more, and what is being read stays in place."""
    page = visit("/login")  # only for its origin: the thread is put into a page of its own
    page.evaluate("""async () => {
        const { h } = await import("/static/app/dom.js");
        const { createThread } = await import("/static/app/thread.js");
        const { createTree } = await import("/static/app/tree.js");
        const scroller = h("div", {id: "scroll"}, h("div", {id: "earlier"}), h("ol", {id: "messages"}));
        Object.assign(scroller.style, {height: "600px", overflow: "auto"});
        document.body.replaceChildren(scroller);
        const messages = Array.from({length: 1000}, (_, i) => ({
            id: `${i}`, parent: i ? `${i - 1}` : null, role: i % 2 ? "assistant" : "user", content: `words ${i}`,
            reasoning: "", model: null, status: "done", error: null, usage: null, seconds: null, attachments: [],
        }));
        createThread({}).show(createTree(messages, "999"));
        scroller.scrollTop = scroller.scrollHeight;
    }""")
    messages = page.locator("#messages > li")
    expect(page.get_by_text("words 999")).to_be_in_viewport()
    drawn_first = messages.count()
    assert drawn_first < 100
    page.evaluate("document.getElementById('scroll').scrollTop = 400")
    expect(messages.nth(drawn_first)).to_be_attached()
    assert messages.count() < 200
    assert page.evaluate("document.getElementById('scroll').scrollTop") > 400


# ---- files ----------------------------------------------------------------------------------------------------------


def test_upload_of_a_text_file(visit: Visit, tmp_path: Path) -> None:
    """A picked file is a chip with its tokens, goes with the message, and stays visible in it after a reload."""
    (tmp_path / "notes.txt").write_text("Porcelain is fired twice. " * 20)
    page = visit()
    page.locator("#file-input").set_input_files(tmp_path / "notes.txt")
    chip = page.get_by_role("list", name="Attached files").get_by_role("listitem")
    expect(chip).to_have_text(re.compile(r"notes\.txt\d+ tokens"))
    ask_and_wait(page, "What do the notes say?")
    expect(chip).to_have_count(0)
    page.reload()
    expect(page.locator(".question .file")).to_have_text(re.compile(r"notes\.txt\d+ tokens"))


def test_refused_file_says_why_and_can_be_removed(visit: Visit, tmp_path: Path) -> None:
    """A file without text says so in its chip; without it the message can be sent."""
    (tmp_path / "noise.bin").write_bytes(bytes(range(256)) * 8)
    page = visit(refused=True)
    page.locator("#file-input").set_input_files(tmp_path / "noise.bin")
    chip = page.get_by_role("list", name="Attached files").get_by_role("listitem")
    expect(chip).to_contain_text("No text could be read from this file.")
    page.get_by_role("button", name="Remove noise.bin").click()
    expect(chip).to_have_count(0)


def test_pasted_and_dropped_files(visit: Visit) -> None:
    """Files can be pasted into the field or dropped anywhere on the page."""
    page = visit()
    page.evaluate("""() => {
        const carry = (name) => {
            const data = new DataTransfer();
            data.items.add(new File(["some words"], name, {type: "text/plain"}));
            return data;
        };
        const prompt = document.getElementById("prompt");
        prompt.dispatchEvent(new ClipboardEvent("paste", {clipboardData: carry("pasted.txt"), bubbles: true}));
        window.dispatchEvent(new DragEvent("drop", {dataTransfer: carry("dropped.txt"), bubbles: true}));
    }""")
    chips = page.get_by_role("list", name="Attached files").get_by_role("listitem")
    expect(chips).to_have_text([re.compile(r"pasted\.txt\d+ tokens"), re.compile(r"dropped\.txt\d+ tokens")])


# ---- the history ----------------------------------------------------------------------------------------------------


def test_search_finds_words_of_messages(visit: Visit) -> None:
    """Searching as one types leaves the conversations that say the word, and opens one with the arrow keys."""
    page = visit()
    ask_and_wait(page, "Where do quokkas live?")
    page.keyboard.press("Control+Shift+O")
    ask_and_wait(page, "Another matter")
    page.keyboard.press("Control+k")
    page.keyboard.type("quokka")
    links = page.get_by_role("navigation").get_by_role("link")
    expect(links).to_have_count(1)
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    expect(page.locator(".bubble")).to_have_text("Where do quokkas live?")


def test_rename_pin_and_delete(visit: Visit) -> None:
    """The menu renames, pins and, after a question, deletes a conversation."""
    page = visit()
    ask_and_wait(page, "A conversation to keep in order")
    options(page).click()
    page.get_by_role("menuitem", name="Rename").click()
    page.get_by_label("Name", exact=True).fill("Kept in order")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Kept in order")).to_be_visible()
    options(page).click()
    page.keyboard.press("Enter")  # the first item: Pin
    pinned = page.get_by_role("list", name="Pinned").get_by_role("link", name="Kept in order")
    expect(pinned).to_be_visible()
    options(page).click()
    page.get_by_role("menuitem", name="Delete").click()
    expect(page.get_by_role("dialog")).to_contain_text("“Kept in order” will be gone for good.")
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(pinned).to_have_count(0)
    expect(page.get_by_role("heading", name="What is on your mind?")).to_be_visible()


@pytest.mark.parametrize(("item", "ending"), [("Export as Markdown", ".md"), ("Export as JSON", ".json")])
def test_export(visit: Visit, item: str, ending: str) -> None:
    """A conversation comes as a file with its question and its answer."""
    page = visit()
    ask_and_wait(page, "Export these words")
    options(page).click()
    with page.expect_download() as download:
        page.get_by_role("menuitem", name=item).click()
    assert download.value.suggested_filename.endswith(ending)
    content = Path(download.value.path()).read_text()
    assert "Export these words" in content
    assert ending == ".md" or json.loads(content)


# ---- how it looks and who can use it --------------------------------------------------------------------------------


def background(page: Page) -> str:
    color: str = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return color


def test_dark_by_the_system_and_by_choice(visit: Visit) -> None:
    """The page follows the system; the switch overrides it and is remembered."""
    page = visit(color_scheme="dark")
    dark = background(page)
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Light", exact=True).check()
    assert background(page) != dark
    page.reload()
    assert background(page) != dark


def test_phone_width(visit: Visit) -> None:
    """On a phone nothing is wider than the screen, and the sidebar is a drawer that Escape closes."""
    page = visit(viewport=PHONE, has_touch=True, is_mobile=True)
    ask_and_wait(page, "Fit on a phone")
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    sidebar = page.get_by_role("navigation", name="Conversations")
    expect(sidebar).to_be_hidden()
    page.get_by_role("button", name="Show or hide the sidebar").click()
    expect(sidebar.get_by_role("link", name="Fit on a phone").first).to_be_visible()
    page.keyboard.press("Escape")
    expect(sidebar).to_be_hidden()
    expect(page.get_by_role("button", name="Show or hide the sidebar")).to_be_focused()


@pytest.mark.parametrize(
    ("locale", "greeting", "send", "speed"),
    [
        ("fr-FR", "À quoi pensez-vous ?", "Envoyer", r"jetons/s$"),
        ("zh-CN", "您在想什么？", "发送", r"词元/秒$"),
    ],
)
def test_languages(visit: Visit, locale: str, greeting: str, send: str, speed: str) -> None:
    """A visitor is spoken to in the browser's language, in fixed texts and in what is said about answers."""
    page = visit(locale=locale)
    expect(page.get_by_role("heading", name=greeting)).to_be_visible()
    assert page.evaluate("document.documentElement.lang") == locale[:2]
    page.locator("#prompt").fill("Bonjour 你好")
    page.get_by_role("button", name=send, exact=True).click()
    expect(last_answer(page).locator(".speed")).to_have_text(re.compile(speed))


def test_language_changes_in_place(visit: Visit) -> None:
    """Another language is there at once, without a reload, and is remembered."""
    page = visit()
    ask_and_wait(page, "Change the language")
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Language", exact=True).select_option("fr")
    expect(page.get_by_role("heading", name="Réglages")).to_be_visible()
    expect(last_answer(page).locator(".speed")).to_have_text(re.compile("jetons/s"))
    page.reload()
    expect(page.get_by_role("button", name="Réglages")).to_be_visible()


def test_keyboard_alone(visit: Visit) -> None:
    """Without a mouse: skip to the field, ask, reach the answer's buttons, open the menu, close it, read the help."""
    page = visit()
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    page.keyboard.type("Only keys")
    page.keyboard.press("Enter")
    expect(last_answer(page).locator(".speed")).to_be_visible()
    for _ in range(12):
        page.keyboard.press("Shift+Tab")
        if page.evaluate("document.activeElement.ariaLabel") == "Answer again":
            break
    expect(last_answer(page).get_by_role("button", name="Answer again")).to_be_focused()
    options(page).focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("menuitem").first).to_be_focused()
    page.keyboard.press("End")
    expect(page.get_by_role("menuitem", name="Delete")).to_be_focused()
    page.keyboard.press("Escape")
    expect(options(page)).to_be_focused()
    page.keyboard.press("Control+/")
    expect(page.get_by_role("dialog", name="Keyboard shortcuts")).to_be_visible()
    page.keyboard.press("Escape")
    page.keyboard.press("Control+b")
    expect(page.get_by_role("navigation")).to_be_hidden()
    page.keyboard.press("Shift+Escape")
    expect(page.get_by_label("Message", exact=True)).to_be_focused()


def test_screen_reader_hears_sentences(visit: Visit) -> None:
    """The live region receives whole sentences, never single tokens, and no code."""
    page = visit()
    page.evaluate("""() => {
        window.heard = [];
        const hear = (node) => window.heard.push(node.textContent);
        const region = document.getElementById("spoken");
        new MutationObserver((changes) => changes.forEach(({addedNodes}) => addedNodes.forEach(hear)))
            .observe(region, {childList: true});
    }""")
    ask_and_wait(page, "Read it to me")
    heard = page.evaluate("window.heard")
    assert len(heard) > 10
    assert heard[0].startswith("Sunlight holds every colour, and air treats them unequally.")
    assert not any("def " in sentence or "```" in sentence for sentence in heard)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_serious_for_axe(visit: Visit, scheme: str) -> None:
    """axe-core has no serious or critical finding: with an answer and a menu, in a dialog, on a phone."""
    page = visit(color_scheme=scheme, reduced_motion="reduce")
    answer = ask_and_wait(page, "Look closely", effort="low")
    answer.locator("summary").click()
    answer.hover()
    options(page).click()
    assert serious_findings(page) == []
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Settings").click()
    assert serious_findings(page) == []
    page.keyboard.press("Escape")
    page.set_viewport_size(PHONE)
    expect(page.get_by_role("navigation")).to_be_hidden()
    page.get_by_role("button", name="Show or hide the sidebar").click()
    assert serious_findings(page) == []


def test_installed_page_opens_without_its_server(visit: Visit) -> None:
    """The service worker keeps the page, not what the API says: without a network it opens, and says what is wrong."""
    page = visit(refused=True, service_workers="allow")
    page.evaluate("navigator.serviceWorker.ready")
    page.reload()  # now through the worker, which keeps what passes
    expect(page.get_by_role("meter")).to_be_hidden()
    expect(page.get_by_label("Model", exact=True)).to_be_visible()
    kept = page.evaluate(
        "caches.open('porcelet-shell').then((cache) => cache.keys()).then((all) => all.map((a) => a.url))"
    )
    assert any(url.endswith("/static/app/main.js") for url in kept)
    assert not any("/api/" in url for url in kept)
    page.context.set_offline(True)
    page.reload()
    expect(page.get_by_role("heading", name="What is on your mind?")).to_be_visible()
    expect(page.get_by_role("alert")).to_contain_text("The server does not answer.")


def test_login_and_logout(visit: Visit, key: str) -> None:
    """Who is not logged in is asked for a key, in three languages; a wrong one is refused, a right one lets in."""
    page = visit(refused=True, storage_state=None)
    expect(page.get_by_role("heading", name="Welcome")).to_be_visible()
    expect(page.get_by_label("API key")).to_be_focused()
    assert serious_findings(page) == []
    page.get_by_label("Language").select_option("zh")
    expect(page.get_by_role("button", name="登录")).to_be_visible()
    page.get_by_label("语言").select_option("en")
    page.get_by_label("API key").fill("sk-wrong")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_have_text("This key is not valid.")
    page.get_by_label("API key").fill(key)
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="What is on your mind?")).to_be_visible()
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("button", name="Log out").click()
    expect(page.get_by_role("heading", name="Welcome")).to_be_visible()
