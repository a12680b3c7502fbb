"""HTML pages as plain text: paragraphs, headings and list items parted by blank lines, code as it stands.

Navigation, scripts, forms and pictures are left out, and so are the parts of a page that documentation generators
(Sphinx, mdBook, rustdoc, Doxygen) repeat on every page. Links keep their text alone. Tables become a line a row.
"""

from __future__ import annotations

import re
from html.parser import HTMLParser


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


SKIPPED = _names("head script style nav footer aside form svg button select template noscript math")
SKIPPED_CLASSES = _names(
    "sphinxsidebar related headerlink footer sidebar nav-wrapper nav-wide-wrapper src srclink viewcode-link since "
    "search-form navheader navfooter toctree-wrapper anchor linenos sub-menu out-of-band hideme test-arrow "
    "notable-traits theme-popup nosearch"
)
BLOCKS = _names(
    "p div section article main h1 h2 h3 h4 h5 h6 ul ol dl dt dd table thead tbody blockquote pre hr figure figcaption "
    "body header details summary address"
)
LINES = _names("br tr li")
VOID = _names("area base br col embed hr img input link meta source track wbr")
CELLS = _names("td th")
BULLET = "- "

_SPACE = re.compile(r"\s+")
_GAPS = re.compile(r"\n[ \t]*\n\s*\n")
_EMPTY_ITEM = re.compile(r"\n- \s*(?=\n)")
_TRAILING = re.compile(r"[ \t]+\n")


def html_to_text(html: str) -> str:
    """The text of a page; "" for one that has none. Broken markup gives what can be made of it."""
    parser = _Extractor()
    parser.feed(html)
    parser.close()
    return parser.text()


class _Extractor(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._pieces: list[str] = []
        self._skipped: str = ""  # the tag inside which nothing is kept
        self._depth = 0  # how many of that tag are open
        self._num_pre = 0

    def text(self) -> str:
        joined = _TRAILING.sub("\n", _EMPTY_ITEM.sub("\n", "".join(self._pieces)))
        return _GAPS.sub("\n\n", joined).strip()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._skipped:
            self._depth += tag == self._skipped
        elif tag not in VOID and (tag in SKIPPED or _is_furniture(attrs)):
            self._skipped, self._depth = tag, 1
        else:
            self._num_pre += tag == "pre"
            self._break(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._skipped:
            self._depth -= tag == self._skipped
            self._skipped = self._skipped if self._depth else ""
        else:
            self._break(tag, opens=False)
            self._num_pre = max(0, self._num_pre - (tag == "pre"))

    def handle_data(self, data: str) -> None:
        if self._skipped:
            return
        if self._num_pre:
            self._pieces.append(data)
            return
        words = _SPACE.sub(" ", data)
        at_start = not self._pieces or self._pieces[-1][-1:] in "\n "
        self._pieces.append(words.lstrip() if at_start else words)
        if not self._pieces[-1]:
            self._pieces.pop()

    def _break(self, tag: str, opens: bool = True) -> None:
        last = self._pieces[-1] if self._pieces else "\n"
        if tag in BLOCKS and not (opens and last == BULLET):
            self._pieces.append("\n\n")
        elif tag in LINES:
            self._pieces += ["\n"] if not last.endswith("\n") else []
            self._pieces += [BULLET] if tag == "li" and opens else []
        elif tag in CELLS and not opens:
            self._pieces.append("  ")


def _is_furniture(attrs: list[tuple[str, str | None]]) -> bool:
    for name, value in attrs:
        if name == "class" and value and not SKIPPED_CLASSES.isdisjoint(value.split()):
            return True
        if name == "role" and value in ("navigation", "search"):
            return True
    return False
