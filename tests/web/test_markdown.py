"""How the text of models becomes elements: the same however it came, harmless, formulas told from prices."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page

from tests.web import scripts

DRAW = """async (steps) => {
    const { createMarkdown } = await import("/static/app/markdown.js");
    const element = document.createElement("div");
    const markdown = createMarkdown(element);
    steps.forEach((text, i) => markdown.write(text, i < steps.length - 1));
    return element.innerHTML;
}"""
TEXTS = {
    "everything": scripts.ANSWER,
    "thinking": scripts.THINKING,
    "loose, nested lists": "1. one\n\n   more\n2. two\n   - a\n\n   - b\n\n     ```sh\n     ls\n     ```\n3. c\n\nend",
    "setext, rules, breaks": "Title\n=====\n\nSub\n---\n\n***\n\nline  \nnext\\\nlast\n",
    "fences": "````md\n```py\nx\n```\n````\n~~~\nopen to the end\n\n\nstill",
    "code in a line that began like a fence": "```a `b` c``` and\n\n``` `x` ```",
    "fence right after fence": "```py\na = 1\n```\n```py\nb = 2\n```\n```\nc\n```\n",
    "quotes": "> one\n> > two\nlazy\n\n> - three\n>   four\n",
    "table in the end": "a | b\n--|:-:\n1 | 2\n3 | 4",
    "links by reference": "See [this][1] and [that].\n\n- [this][1]\n\n[1]: https://one.example\n[that]: https://two.example\n",
    "formulas": "$a$ and\n\n$$\nb\n$$\n\n- \\(c\\)\n- \\[d\\]\n\n\\[\ne\n= f\n\\]\n\nand $$g$$ in a line",
    "unfinished formula": "$$\nx + y",
    "html and entities": "<div>\n*a*\n</div>\n\n&amp; <i>b</i> &lt;c&gt;",
    "line ends": "one\r\ntwo\r\n\r\n- three\r\n- four\r\n",
    "emphasis over lines": "**bold\nover lines** and *it* and `co\nde`",
    "other scripts": "你好，**世界**。\n\n- 第一\n- 第二 $\\alpha$\n\n« Ça va ? »",
}


@pytest.fixture(scope="module")
def page(browser: Browser, address: str) -> Iterator[Page]:
    opened = browser.new_page()
    opened.goto(f"{address}/login")
    draw(opened, "$x$")  # loads KaTeX
    opened.wait_for_function("() => globalThis.katex")
    yield opened
    opened.close()


def draw(page: Page, *steps: str) -> str:
    drawn: str = page.evaluate(DRAW, list(steps))
    return drawn


@pytest.mark.parametrize("name", TEXTS)
def test_growing_is_the_same_as_whole(page: Page, name: str) -> None:
    """However a text is cut into pieces, what is drawn in the end is what is drawn of it at once."""
    text, whole = TEXTS[name], draw(page, TEXTS[name])
    cuts = random.Random(name)
    assert draw(page, *(text[: i + 1] for i in range(len(text)))) == whole
    for _ in range(3):
        ends = sorted(cuts.sample(range(len(text)), min(9, len(text)))) + [len(text)]
        assert draw(page, *(text[:end] for end in ends)) == whole


def test_finished_blocks_are_never_drawn_again(page: Page) -> None:
    """While a long text grows, the elements of finished blocks stay the same objects, and each write draws little."""
    kept, most = page.evaluate("""async (text) => {
        const { createMarkdown } = await import("/static/app/markdown.js");
        const element = document.createElement("div");
        const markdown = createMarkdown(element);
        let most = 0;
        const observer = new MutationObserver(() => {});
        observer.observe(element, {childList: true});
        markdown.write(text.slice(0, 400), true);
        const first = element.firstChild;
        observer.takeRecords();
        for (let end = 400; end <= text.length; end += 40) {
            markdown.write(text.slice(0, end), true);
            most = Math.max(most, observer.takeRecords().length);
        }
        return [element.firstChild === first, most];
    }""", "A paragraph of some words, **bold** too.\n\n" * 200)  # fmt: skip
    assert kept
    assert most <= 8


@pytest.mark.parametrize(
    ("text", "formulas"),
    [
        ("It costs $5 and $10.", 0),
        ("Between $5-$10, or $1,000 and $2 more.", 0),
        ("A $20 note, 30$ change, a $ sign.", 0),
        ("From $5 to 10$ or so", 0),
        ("Paths like $HOME and $PATH", 0),
        ("`$a$` is code", 0),
        ("An escaped \\$a\\$ is none", 0),
        ("$x$ and $y_1$, $5$ and $2 + 3$", 4),
        ("$5 < x$ is one", 1),
        ("\\(a\\) and \\[b\\] and $$c$$", 3),
        ("$\\frac{1}{2}$-spin", 1),
        ("$a$$b$", 2),
        ("\\\\(not one\\\\)", 0),
        ("$$\n\\begin{aligned}a &= b\\\\c &= d\\end{aligned}\n$$", 1),
    ],
)
def test_formulas_are_told_from_prices(page: Page, text: str, formulas: int) -> None:
    """A formula is recognised by its marks, and dollars that are money are left alone."""
    assert draw(page, text).count('class="katex"') == formulas


@pytest.mark.parametrize(
    ("text", "drawn"),
    [
        ("2*3*5", "2*3*5"),
        ("(2+3)*4*(7-1)*8", "(2+3)*4*(7-1)*8"),
        ("4 *times* 5 and un*frigging*believable", "4 <em>times</em> 5 and un<em>frigging</em>believable"),
        ("**2*3** and *(4)*", "<strong>2*3</strong> and <em>(4)</em>"),
    ],
)
def test_products_are_told_from_emphasis(page: Page, text: str, drawn: str) -> None:
    """A star between numbers or parentheses multiplies; every other one emphasises."""
    assert draw(page, text) == f"<p>{drawn}</p>\n"


@pytest.mark.parametrize(
    "formula",
    ["{" * 2000, "\\sqrt{" * 600, "x + " * 2000, "\\def\\a{\\a\\a}\\a"],
    ids=["braces", "nested roots", "long", "endless macro"],
)
def test_degenerate_formula_shows_its_source(page: Page, formula: str) -> None:
    """A formula that KaTeX cannot or should not draw stays as its source, and what follows is drawn."""
    html = draw(page, f"$$\n{formula}\n$$\n\n**after**")
    assert 'class="math display unreadable"' in html
    assert "<strong>after</strong>" in html


@pytest.mark.parametrize("text", ["$" + "1" * 40_000 + "$", "$1 " * 20_000, "\\(" * 20_000], ids=lambda text: text[:4])
def test_dollars_are_told_apart_in_linear_time(page: Page, text: str) -> None:
    """Tens of thousands of characters that might be formulas or prices take no noticeable time."""
    draw(page, "$x$")
    spent = page.evaluate("""async (text) => {
        const { createMarkdown } = await import("/static/app/markdown.js");
        const begun = performance.now();
        createMarkdown(document.createElement("div")).write(text);
        return performance.now() - begun;
    }""", text)  # fmt: skip
    assert spent < 1500


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>",
        "<img src=x onerror=alert(1)>",
        "[x](javascript:alert(1)) [y](data:text/html,x) [z](vbscript:x) [w](/logout) [v](//elsewhere.example)",
        "![x](https://elsewhere.example/x.png) ![y](javascript:alert(1))",
        "<https://a.example/?\"onmouseover=alert(1)> https://b.example/'><b",
        '[x](https://a.example "onclick=alert(1)")',
        "```html\n<script>alert(1)</script>\n```",
        '``` "><img/src=x/onerror=alert(1)>\nx\n```',
        "$\\href{javascript:alert(1)}{x}$ $\\url{javascript:alert(1)}$ $\\includegraphics{https://a.example/x.png}$",
        "$\\htmlStyle{position:fixed}{x}$ $\\htmlClass{plain}{x}$ $$\\rule{9999em}{9999em}$$",
        "<form action=/logout><button>x</form> <style>*{display:none}</style> <svg onload=alert(1)>",
        "| a |\n|:-:|\n| <a href='javascript:alert(1)'>x</a> |",
    ],
)
def test_nothing_a_model_writes_can_run_or_load(page: Page, text: str) -> None:
    """What was drawn has no script, handler, form or picture, and leads to http, https and mail addresses alone."""
    found = page.evaluate("""(html) => {
        const parsed = new DOMParser().parseFromString(html, "text/html").body;
        const elements = [...parsed.querySelectorAll("*")];
        return {
            tags: [...new Set(elements.map((element) => element.localName))],
            names: [...new Set(elements.flatMap((element) => element.getAttributeNames()))],
            links: [...parsed.querySelectorAll("[href], [src]")].map((link) => link.getAttribute("href") ?? "src"),
        };
    }""", draw(page, text))  # fmt: skip
    assert not {"script", "img", "style", "form", "input", "iframe", "object", "embed"} & set(found["tags"])
    assert not [name for name in found["names"] if name.startswith("on")]
    assert all(link.startswith(("http://", "https://", "mailto:")) for link in found["links"])
