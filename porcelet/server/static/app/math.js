// LaTeX in Markdown: rules that find $…$, $$…$$, \(…\) and \[…\] without taking prices for formulas, and
// typesetting by KaTeX, which is loaded with the first formula. It draws into elements: no style attribute is parsed.

const KATEX = "../vendor/katex-0.19.1/katex.min.js";
const CLOSING = { "$$": "$$", "\\[": "\\]", "\\(": "\\)", "$": "$" };
const LONGEST = 4_000; // characters of a formula that is typeset; more would be felt, and nobody writes it
const PRICE = /^[\d.,]\S*\s(?!.*[\\^_={}<>+*/])/; // "5 and 10" between two signs; an operator makes it a formula

let katex = null;
let loading = null;

/** A markdown-it plugin; a formula becomes <span class="math"> or <span class="math display"> with its source. */
export function math(md) {
  md.inline.ruler.before("escape", "math", inlineMath);
  md.block.ruler.before("paragraph", "math", blockMath, { alt: ["paragraph", "blockquote", "list"] });
  md.renderer.rules.math = (tokens, i) =>
    `<span class="math${tokens[i].meta.display ? " display" : ""}">${md.utils.escapeHtml(tokens[i].content)}</span>`;
}

/** Typeset the formulas inside `root`, now or once KaTeX has come; until then they show their source. */
export function typeset(root) {
  const formulas = root.querySelectorAll(".math");
  if (!formulas.length) return;
  if (katex) formulas.forEach(draw);
  else load().then(() => formulas.forEach(draw), console.warn);
}

async function load() {
  loading ??= import(KATEX); // a script of the older kind: it leaves a global name
  await loading.finally(() => (loading = null));
  katex = globalThis.katex;
}

function draw(span) {
  const source = span.textContent;
  const displayMode = span.classList.contains("display");
  try {
    if (source.length > LONGEST) throw new RangeError("a formula that long is not typeset");
    katex.render(source, span, { displayMode, maxSize: 40, maxExpand: 500, strict: "ignore" });
  } catch { // half a formula while it streams, none at all, or one nested until KaTeX runs out of stack
    span.textContent = source;
    span.classList.add("unreadable");
  }
}

function markAt(source, position) {
  return Object.keys(CLOSING).find((mark) => source.startsWith(mark, position));
}

function inlineMath(state, silent) {
  const mark = markAt(state.src, state.pos);
  if (!mark) return false;
  const start = state.pos + mark.length;
  const end = closing(state.src, start, CLOSING[mark], state.posMax);
  if (end < 0) return false;
  const content = state.src.slice(start, end);
  if (!content.trim() || (mark === "$" && !isFormula(content, state.src[end + 1]))) return false;
  if (!silent) {
    const token = state.push("math", "", 0);
    Object.assign(token, { content: content.trim(), meta: { display: mark === "$$" || mark === "\\[" } });
  }
  state.pos = end + CLOSING[mark].length;
  return true;
}

/** Where the closing mark begins, -1 without one; a backslash before it takes its meaning away. */
function closing(source, start, mark, limit) {
  const near = source.slice(0, Math.min(limit, start + LONGEST)); // many openings must not each search it all
  for (let end = near.indexOf(mark, start); end >= 0; end = near.indexOf(mark, end + 1)) {
    if (near[end - 1] !== "\\" || mark[0] === "\\") return end;
  }
  return -1;
}

/** Whether text between two single $ is meant as a formula: no space at its ends, no digit behind, not a price. */
function isFormula(content, next = "") {
  return !/^\s|\s$|`/.test(content) && !/\d/.test(next) && !PRICE.test(content);
}

/** A formula that begins a line with $$ or \[ and ends with a line; as in TeX, it has no blank line inside. */
function blockMath(state, startLine, endLine, silent) {
  const lineAt = (line) => state.src.slice(state.bMarks[line] + state.tShift[line], state.eMarks[line]).trimEnd();
  const mark = ["$$", "\\["].find((opening) => lineAt(startLine).startsWith(opening));
  if (!mark) return false;
  const lines = [];
  for (let line = startLine; line < endLine; line++) {
    const text = lines.length ? lineAt(line) : lineAt(line).slice(mark.length);
    const closed = text.endsWith(CLOSING[mark]);
    if (!closed && text.includes(CLOSING[mark])) return false; // it goes on behind the formula: a paragraph
    if (lines.length && !text) return false;
    lines.push(closed ? text.slice(0, -CLOSING[mark].length) : text);
    if (!closed && !(state.env.growing && line === endLine - 1)) continue; // while it grows its end is yet to come
    if (silent) return true;
    const token = state.push("math", "", 0);
    const content = lines.join("\n").trim();
    Object.assign(token, { block: true, content, map: [startLine, line + 1], meta: { display: true } });
    state.line = line + 1;
    return true;
  }
  return false;
}
