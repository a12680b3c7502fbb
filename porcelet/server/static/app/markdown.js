// Markdown that grows. While an answer streams, every block but the last is final: it is drawn once and never touched
// again; the last one is drawn anew. So the work stays linear, and nothing above the writing end flickers.

import markdownIt from "../vendor/markdown-it-15.0.3/markdown-it.esm.min.mjs";
import { createCode } from "./code.js";
import { h } from "./dom.js";
import { setLabel } from "./language.js";
import { math, typeset } from "./math.js";
import { keepReachable } from "./reach.js";
import { sanitized } from "./sanitize.js";

const md = markdownIt({ html: false, linkify: true, breaks: false }).use(math);
md.linkify.set({ fuzzyLink: false, fuzzyEmail: false });
md.validateLink = (address) => /^(https?:|mailto:)/i.test(address.trim());
md.inline.ruler.before("emphasis", "product", product);
md.renderer.rules.image = (tokens, i) => { // shown as a link: the page loads nothing from elsewhere
  const alt = md.utils.escapeHtml(tokens[i].content || tokens[i].attrGet("src"));
  return `<a class="image" href="${md.utils.escapeHtml(tokens[i].attrGet("src"))}">${alt}</a>`;
};

/** {write(source, growing)}: show a Markdown text in an element; with `growing`, more of it will come. */
export function createMarkdown(element) {
  let source = ""; // as written last
  let isWhole = true; // whether it was written as the end
  let settled = 0; // characters of it whose blocks are final
  let references = {}; // the link definitions met so far
  let live = []; // what is drawn of the rest: {nodes, code, info} a block

  function clear() {
    [source, settled, references, live] = ["", 0, {}, []];
    element.replaceChildren();
  }

  function draw(tokens, env) {
    const code = tokens[0].type === "fence" ? createCode(languageOf(tokens[0])) : null;
    code?.write(tokens[0].content);
    const nodes = code ? [code.element] : [...elementsOf(tokens, env).childNodes];
    element.append(...nodes);
    return { nodes, code, info: tokens[0].info };
  }

  /** Draw blocks in place of the live ones. A block of code stays the same element, so that it keeps its scroll. */
  function redraw(blocks, env) {
    const [fence] = blocks[0] ?? [];
    const kept = live[0]?.code && fence?.type === "fence" && fence.info === live[0].info ? [live[0]] : [];
    kept[0]?.code.write(fence.content);
    for (const { nodes } of live.slice(kept.length)) nodes.forEach((node) => node.remove());
    return [...kept, ...blocks.slice(kept.length).map((tokens) => draw(tokens, env))];
  }

  function write(text, growing = false) {
    const normal = text.replace(/\r\n?/g, "\n");
    if (normal === source && isWhole === !growing) return;
    isWhole = !growing;
    if (!normal.startsWith(source)) clear();
    source = normal;
    const tail = source.slice(settled);
    const env = { growing, references };
    const blocks = topLevel(md.parse(tail, env));
    const drawn = redraw(blocks, env);
    const last = growing ? lastCertain(blocks, tail) : 0;
    live = drawn.slice(last);
    if (last) settled += offsetOfLine(tail, firstLine(blocks[last]));
    if (growing || !settled || !Object.keys(references).length) return;
    clear();
    isWhole = false;
    write(text); // a link may have come before its definition
  }

  return { write };
}

/** An inline rule: the signs of 2*3*(4+1) multiply and emphasise nothing. */
function product(state, silent) {
  if (!/^[\d)]\*[\d(]$/.test(state.src.slice(state.pos - 1, state.pos + 2))) return false;
  if (!silent) state.pending += "*";
  state.pos++;
  return true;
}

const firstLine = (block) => block[0].map[0];

/** The last block that begins with a whole line: while "3" can become "3. three", it does not end a list before it. */
function lastCertain(blocks, text) {
  const numWhole = text.split("\n").length - 1;
  return Math.max(0, blocks.findLastIndex((block) => firstLine(block) < numWhole));
}

/** The tokens of each block that is in no other. */
function topLevel(tokens) {
  const blocks = [];
  for (const token of tokens) {
    if (token.level === 0 && token.nesting >= 0) blocks.push([]);
    blocks.at(-1).push(token);
  }
  return blocks;
}

function offsetOfLine(text, line) {
  let offset = 0;
  for (; line > 0; line--) offset = text.indexOf("\n", offset) + 1;
  return offset;
}

function languageOf(fence) {
  return fence.info.trim().split(/\s/)[0].toLowerCase();
}

function elementsOf(tokens, env) {
  tokens.forEach(adapt);
  const fragment = sanitized(md.renderer.render(tokens, md.options, env));
  fragment.querySelectorAll("a").forEach(secure);
  fragment.querySelectorAll("pre").forEach(replaceByCode);
  fragment.querySelectorAll("table").forEach(letScroll);
  fragment.querySelectorAll(".math.display").forEach(keepReachable);
  typeset(fragment);
  return fragment;
}

/** Headings go under the page's own, and alignment becomes a class: inline styles are not allowed here. */
function adapt(token) {
  if (token.type.startsWith("heading_")) token.tag = `h${Math.min(6, Number(token.tag[1]) + 2)}`;
  const align = token.attrGet("style")?.split(":")[1];
  if (align) token.attrs = [["class", align]];
}

function secure(link) {
  link.rel = "noopener noreferrer";
  link.target = "_blank";
}

function replaceByCode(pre) {
  const language = pre.firstChild?.className?.replace("language-", "") ?? "";
  const view = createCode(language.toLowerCase());
  view.write(pre.textContent);
  pre.replaceWith(view.element);
}

function letScroll(table) {
  const frame = h("div", { class: "table", role: "region" });
  setLabel(frame, "table");
  table.replaceWith(frame);
  frame.append(table);
  keepReachable(frame);
}
