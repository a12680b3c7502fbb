// A block of code: its language, a button that copies it, its colours.

import highlighter from "../vendor/highlightjs-11.12.0/highlight.min.js";
import { copyButton } from "./clipboard.js";
import { h } from "./dom.js";
import { setText } from "./language.js";
import { keepReachable } from "./reach.js";
import { sanitized } from "./sanitize.js";

const LONGEST_COLOURED = 40_000; // characters; beyond, colouring would be felt

/** {element, write(text)} of a code block in a language as a fence names it, or "". */
export function createCode(language) {
  const code = h("code");
  const name = h("span", { class: "language" });
  const known = highlighter.getLanguage(language);
  if (language) name.textContent = known?.name ?? language;
  else setText(name, "code");
  const scroller = h("pre", {}, code);
  const copy = copyButton("copy_code", () => code.textContent);
  keepReachable(scroller);
  return {
    element: h("figure", { class: "code", dir: "ltr" }, h("figcaption", {}, name, copy), scroller),
    write(text) {
      if (!known || text.length > LONGEST_COLOURED) code.textContent = text;
      else code.replaceChildren(sanitized(highlighter.highlight(text, { language, ignoreIllegals: true }).value));
    },
  };
}
