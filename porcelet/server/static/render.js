// A message's text as elements: paragraphs, `code` within them, and code between ``` fences. Text only ever becomes text
// nodes, never markup. The rest of Markdown is left out so far.

import { text as translated } from "./texts.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})[ \t]*([^`\n]*)$/;
const INLINE_CODE = /`([^`\n]+)`/; // splitting by it leaves code at the odd places

/** Replace an element's content with the elements of a text, which may still be growing. */
export function render(element, text) {
  element.replaceChildren(...blocks(text).map((block) => (block.code ? code(block) : paragraph(block))));
}

/** The paragraphs and code blocks of a text; a fence that was not closed yet runs to the end. */
function blocks(text) {
  const found = [];
  let lines = [];
  let fence = null;
  const close = (block) => {
    if (block.code || lines.length) found.push({ ...block, text: lines.join("\n") });
    lines = [];
  };
  for (const line of text.split("\n")) {
    const match = FENCE.exec(line);
    if (fence) {
      const closes = match && match[1].startsWith(fence.mark) && !match[2].trim();
      if (closes) {
        close({ code: true, name: fence.name });
        fence = null;
      } else lines.push(line);
    } else if (match) {
      close({});
      fence = { mark: match[1], name: match[2].trim() };
    } else if (line.trim()) lines.push(line);
    else close({});
  }
  close(fence ? { code: true, name: fence.name } : {});
  return found;
}

function paragraph(block) {
  const element = document.createElement("p");
  block.text.split(INLINE_CODE).forEach((part, i) => {
    const node = i % 2 ? document.createElement("code") : document.createTextNode(part);
    if (i % 2) node.textContent = part;
    element.append(node);
  });
  return element;
}

function code(block) {
  const element = document.createElement("figure");
  const caption = document.createElement("figcaption");
  const name = document.createElement("span");
  const copy = document.createElement("button");
  const content = document.createElement("pre");
  name.textContent = block.name || translated("code");
  copy.type = "button";
  copy.textContent = translated("copy");
  copy.addEventListener("click", async () => {
    await navigator.clipboard.writeText(block.text);
    copy.textContent = translated("copied");
  });
  content.append(document.createElement("code"));
  content.firstChild.textContent = block.text;
  content.tabIndex = 0; // it scrolls sideways, so the keyboard must reach it
  caption.append(name, copy);
  element.append(caption, content);
  return element;
}
