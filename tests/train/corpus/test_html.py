from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from porcelet.train.corpus.html import html_to_text

PAGE = """<!DOCTYPE html><html><head><title>Not this</title><style>p { color: red }</style></head><body>
<nav><ul><li>Home<li>Menu</ul></nav>
<div class="sphinxsidebar"><div>inner</div> still the sidebar</div>
<h1>A title<a class="headerlink" href="#x">¶</a></h1>
<p>Some <b>bold</b> and <code>f(x)</code>,
   over &lt;two&gt; lines&nbsp;&amp; more.<br>After a break.
<p>An open paragraph
<pre>def f():
    return  1

    # done</pre>
<ul><li>first</li><li><a href="y">second</a></li><li></li></ul><ol><li><p>third</p></li></ol>
<table><tr><th>a</th><th>b</th></tr><tr><td>1</td><td>2</td></tr></table>
<script>alert("no")</script><img src="x" alt="no"><form><input value="no">no</form>
<div class="x footer"><img>no</div>
</body></html>"""


def test_a_page_becomes_its_text() -> None:
    """Paragraphs, lists, table rows and code as it stands; nothing of head, navigation, scripts, forms or furniture."""
    assert html_to_text(PAGE).split("\n\n") == [
        "A title",
        "Some bold and f(x), over <two> lines & more.\nAfter a break.",
        "An open paragraph",
        "def f():\n    return  1",
        "    # done",
        "- first\n- second",
        "- third",
        "a  b\n1  2",
    ]


@given(st.text())
def test_text_without_markup_keeps_its_words(text: str) -> None:
    """Whatever is escaped comes back; only white space may change."""
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace("\0", "")
    assert html_to_text(f"<p>{escaped}</p>").split() == text.replace("\0", "").split()


@given(
    st.lists(
        st.sampled_from(["<p>", "</p>", "<pre>", "</div>", "<nav>", "</nav>", "<br/>", "<", "&", "x", "<!--", "]]>"])
    )
)
def test_broken_markup_is_borne(pieces: list[str]) -> None:
    """Any order of tags gives some text, and outside of navigation no letter is lost."""
    text = html_to_text("".join(pieces))
    if not {"<nav>", "<!--", "<"} & set(pieces):
        assert text.count("x") == pieces.count("x")
