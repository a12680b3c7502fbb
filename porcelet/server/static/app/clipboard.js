// Copying to the clipboard, and the button that does it and says so.

import { h, icon } from "./dom.js";
import { setLabel } from "./language.js";
import { announce } from "./announcer.js";

const CONFIRMED = 1600; // ms for which the button shows that it has copied

/** An icon button that copies what `read()` returns. */
export function copyButton(label, read) {
  const button = h("button", { type: "button", class: "plain" }, icon("copy"));
  button.addEventListener("click", async () => {
    if (!(await copy(read()))) return;
    setLabel(button, "copied");
    button.replaceChildren(icon("check"));
    setTimeout(() => {
      setLabel(button, label);
      button.replaceChildren(icon("copy"));
    }, CONFIRMED);
  });
  return setLabel(button, label);
}

/** Copy a text and say whether it worked; so it resolves. Plain HTTP from another machine has no clipboard. */
export async function copy(text) {
  const writing = navigator.clipboard?.writeText(text).then(() => true, () => false);
  const isCopied = (await writing) || copyBySelection(text);
  announce(isCopied ? "copied" : "not_copied");
  return isCopied;
}

function copyBySelection(text) {
  const focused = document.activeElement;
  const field = h("textarea", { class: "unseen", readonly: true });
  field.value = text;
  (document.querySelector("dialog[open]") ?? document.body).append(field);
  field.select();
  const isCopied = document.execCommand("copy");
  field.remove();
  focused?.focus();
  return isCopied;
}
