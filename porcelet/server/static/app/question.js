// A message of the person: its text as it was typed, its files, and editing it in place.

import { copyButton } from "./clipboard.js";
import { h, icon, isForInput } from "./dom.js";
import { keepReachable } from "./reach.js";
import { setLabel, setText } from "./language.js";
import { iconButton, versionSwitcher } from "./versions.js";

/** {element, update(message, versions)} of a question. `actions`: edit(message, text), show(id). */
export function createQuestion(first, actions) {
  const bubble = keepReachable(h("div", { class: "bubble", dir: "auto" }));
  const row = h("div", { class: "actions" });
  const files = h("ul", { class: "files" });
  const element = h("li", { class: "question" }, setText(h("h2", { class: "unseen" }), "you"), files, bubble, row);
  let message = first;

  function read() {
    bubble.textContent = message.content;
    element.classList.remove("editing");
    row.hidden = false;
  }

  function edit() {
    const field = setLabel(h("textarea", { rows: 3 }), "edit");
    const cancel = setText(h("button", { type: "button", class: "quiet", onclick: leave }), "cancel");
    const send = setText(h("button", { type: "submit", class: "strong" }), "send");
    const form = h("form", { onsubmit: submit }, field, h("div", { class: "buttons" }, cancel, send));
    field.value = message.content;
    field.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && !isForInput(event)) leave(event);
      else if (event.key === "Enter" && !event.shiftKey && !isForInput(event)) submit(event);
    });
    element.classList.add("editing");
    row.hidden = true;
    bubble.replaceChildren(form);
    field.style.height = `${field.scrollHeight}px`;
    field.focus();
    field.setSelectionRange(field.value.length, field.value.length);

    function submit(event) {
      event.preventDefault();
      if (field.value.trim()) actions.edit(message, field.value.trim());
    }
  }

  function leave(event) {
    event.stopPropagation(); // Escape means the edit, not the answer
    read();
    row.querySelector(".edit").focus();
  }

  function update(newer, versions) {
    message = newer;
    files.replaceChildren(...message.attachments.map(attachment));
    files.hidden = !message.attachments.length;
    const editButton = iconButton("edit", "edit", edit);
    editButton.classList.add("edit");
    const switcher = versionSwitcher(versions, message.id, actions.show);
    row.replaceChildren(...[copyButton("copy", () => message.content), editButton, switcher].filter(Boolean));
    if (!element.classList.contains("editing")) read();
  }

  return { element, update };
}

function attachment({ name, tokens }) {
  const size = setText(h("span", { class: "size" }), "tokens", { count: tokens });
  return h("li", { class: "file" }, icon("file"), h("span", { class: "name" }, name), size);
}
