"""HTML pages as plain text: paragraphs, headings and list items parted by blank lines, code as it stands.

Navigation, scripts, forms and pictures are left out, and so are the parts of a page that documentation generators
(Sphinx, mdBook, rustdoc, Doxygen) repeat on every page. Links keep their text alone. Tables become a line a row.
"""

from __future__ import annotations

import re
from functools import lru_cache
from html import unescape


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

_HIDDEN = re.compile(r"<!--.*?(?:-->|\Z)|<(script|style)\b.*?(?:</\1\s*>|\Z)|<[!?][^>]*>", re.DOTALL | re.IGNORECASE)
# A tag with quoted attributes, one whose quotes do not match, text, a lone "<". Possessive, so linear in the page.
_TOKEN = re.compile(
    r"""<(/?)([a-zA-Z][^\s/>]*+)((?:[^>"']*+(?:"[^"]*+"[^>"']*+|'[^']*+'[^>"']*+)*+)(?=>)|[^>]*+)>|([^<]++|<)"""
)
_FURNITURE = re.compile(r"""\b(class|role)\s*=\s*("[^"]*"|'[^']*'|[^\s>]+)""")
_SPACE = re.compile(r"\s+")
_GAPS = re.compile(r"\n[ \t]*\n\s*\n")
_EMPTY_ITEM = re.compile(r"\n- \s*(?=\n)")
_TRAILING = re.compile(r"[ \t]+\n")


def html_to_text(page: str) -> str:
    """The text of a page; "" for one that has none. Broken markup gives what can be made of it."""
    page = page.replace("\r\n", "\n")
    pieces = _Pieces()
    skipped, depth = "", 0  # the tag inside which nothing is kept, and how many of it are open
    for slash, name, attributes, text in _TOKEN.findall(_HIDDEN.sub("", page)):
        tag = name.lower()
        if skipped:
            depth += (-1 if slash else 1) if tag == skipped else 0
            skipped = skipped if depth else ""
        elif not tag:
            pieces.add_text(unescape(text))
        elif slash:
            pieces.close(tag)
        elif tag not in VOID and (tag in SKIPPED or _is_furniture(attributes)):
            skipped, depth = tag, 1
        else:
            pieces.open(tag)
    return pieces.joined()


class _Pieces:
    """The text so far."""

    def __init__(self) -> None:
        self._pieces = ["\n"]
        self._num_pre = 0  # of <pre> that are open: inside, white space stays

    def add_text(self, text: str) -> None:
        if self._num_pre:
            self._pieces.append(text)
            return
        words = _SPACE.sub(" ", text)
        if self._pieces[-1][-1] in "\n ":
            words = words.lstrip()
        if words:
            self._pieces.append(words)

    def open(self, tag: str) -> None:
        self._num_pre += tag == "pre"
        if tag in BLOCKS and self._pieces[-1] != BULLET:
            self._pieces.append("\n\n")
        elif tag in LINES:
            self._end_line()
            self._pieces += [BULLET] if tag == "li" else []

    def close(self, tag: str) -> None:
        self._num_pre = max(0, self._num_pre - (tag == "pre"))
        if tag in BLOCKS:
            self._pieces.append("\n\n")
        elif tag in LINES:
            self._end_line()
        elif tag in CELLS:
            self._pieces.append("  ")

    def joined(self) -> str:
        text = _TRAILING.sub("\n", _EMPTY_ITEM.sub("\n", "".join(self._pieces)))
        return _GAPS.sub("\n\n", text).strip()

    def _end_line(self) -> None:
        if self._pieces[-1][-1] != "\n":
            self._pieces.append("\n")


@lru_cache(maxsize=4096)  # a generator's pages have few different ones
def _is_furniture(attributes: str) -> bool:
    for name, value in _FURNITURE.findall(attributes):
        words = value.strip("\"'").split()
        if not SKIPPED_CLASSES.isdisjoint(words) if name == "class" else value.strip("\"'") in ("navigation", "search"):
            return True
    return False
