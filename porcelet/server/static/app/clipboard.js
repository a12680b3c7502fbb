// Copying to the clipboard, and the button that does it and says so.

import { h, icon } from "./dom.js";
import { setLabel } from "./language.js";
import { announce } from "./announcer.js";

const CONFIRMED = 1600; // ms for which the button shows that it has copied

/** An icon button that copies what `read()` returns. */
export function copyButton(label, read) {
  const button = h("button", { type: "button", class: "plain" }, icon("copy"));
  button.addEventListener("click", async () => {
    await copy(read());
    announce("copied");
    setLabel(button, "copied");
    button.replaceChildren(icon("check"));
    setTimeout(() => {
      setLabel(button, label);
      button.replaceChildren(icon("copy"));
    }, CONFIRMED);
  });
  return setLabel(button, label);
}

export async function copy(text) {
  if (navigator.clipboard) await navigator.clipboard.writeText(text);
  else copyBySelection(text); // plain HTTP from another machine has no clipboard
}

function copyBySelection(text) {
  const focused = document.activeElement;
  const field = h("textarea", { class: "unseen", readonly: true });
  field.value = text;
  document.body.append(field);
  field.select();
  document.execCommand("copy");
  field.remove();
  focused?.focus();
}
