// Short questions in a dialog of the page's own: one to confirm, one to name something.

import { h } from "./dom.js";
import { setText } from "./language.js";

/** Ask before something that cannot be undone; resolves to the decision. */
export function confirm(title, question, values, action) {
  return open(title, [setText(h("p"), question, values)], action, true).then((form) => form !== null);
}

/** Ask for a name; resolves to it, or to null. */
export async function askName(title, value) {
  const field = h("input", { id: "new-name", type: "text", required: true, maxlength: 200, autocomplete: "off" });
  field.value = value;
  const label = setText(h("label", { for: field.id }), "name");
  const confirmed = await open(title, [h("div", {}, label, field)], "save", false, field);
  return confirmed && field.value.trim();
}

function open(title, content, action, danger, focused = null) {
  const heading = setText(h("h2", { id: "dialog-title" }), title);
  const cancel = setText(h("button", { type: "button", class: "quiet" }), "cancel");
  const submit = setText(h("button", { type: "submit", class: danger ? "strong danger" : "strong" }), action);
  const form = h("form", {}, heading, ...content, h("div", { class: "buttons" }, cancel, submit));
  const dialog = h("dialog", { "aria-labelledby": "dialog-title" }, form);
  let confirmed = null;
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    confirmed = form;
    dialog.close();
  });
  cancel.addEventListener("click", () => dialog.close());
  document.body.append(dialog);
  dialog.showModal();
  (focused ?? cancel).focus();
  focused?.select();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve(confirmed);
    });
  });
}

/** Let a click beside a dialog of the page, or on its close button, close it. */
export function closeable(dialog) {
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog || event.target.closest(".close")) dialog.close();
  });
}
