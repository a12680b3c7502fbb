// Where a message is written: a field that grows, sending with Enter, stopping while the model answers.

import { byId, isForInput } from "./dom.js";
import { keepDraft, readDraft } from "./draft.js";
import { createUploads } from "./uploads.js";

/** {focus(), running(bool), ready(bool), write(text), restore(), tokens()}; restore() comes first.
 * `onSend(text, file ids, again)` resolves to whether it was taken. What is on its way has left the field, so that one
 * can go on writing; refused, it comes back in front of what was written since. `again` sends once more. */
export function createComposer({ onSend, onStop, onChange }) {
  const [form, prompt, send, stop] = ["composer", "prompt", "send", "stop"].map(byId);
  const uploads = createUploads(refresh);
  const leaving = new Set(); // messages on their way: {text, files}
  let isReady = false;

  function refresh() {
    prompt.style.height = "auto";
    prompt.style.height = `${prompt.scrollHeight}px`;
    send.disabled = !isReady || uploads.busy() || !(prompt.value.trim() || uploads.files().length);
    keepDraft({
      text: joined([...leaving].map(({ text }) => text), prompt.value),
      files: [...[...leaving].flatMap(({ files }) => files), ...uploads.files()],
    });
    onChange();
  }

  function write(text) {
    prompt.value = text;
    refresh();
  }

  async function submit(event) {
    event.preventDefault();
    if (send.disabled || send.hidden) return;
    const message = { text: prompt.value.trim(), files: uploads.files() };
    leaving.add(message);
    uploads.clear();
    write("");
    const isTaken = await onSend(message.text, message.files.map(({ id }) => id), () => form.requestSubmit());
    leaving.delete(message);
    if (isTaken) refresh();
    else putBack(message);
    focus();
  }

  function putBack({ text, files }) {
    uploads.putBack(files);
    write(joined([text], prompt.value));
  }

  /** Ready to type; not where it would open a phone's keyboard over the answer. */
  function focus() {
    if (matchMedia("(hover: hover)").matches && !document.querySelector("dialog[open]")) prompt.focus();
  }

  form.addEventListener("submit", submit);
  prompt.addEventListener("input", refresh);
  prompt.addEventListener("keydown", (event) => {
    const isForText = isForInput(event) || event.shiftKey || !matchMedia("(hover: hover)").matches;
    if (event.key === "Enter" && !isForText) submit(event);
  });
  stop.addEventListener("click", onStop);

  return {
    focus,
    write,
    restore: () => putBack(readDraft()),
    tokens: uploads.tokens,
    ready(ready) {
      isReady = ready;
      refresh();
    },
    running(running) {
      const focused = document.activeElement;
      send.hidden = running;
      stop.hidden = !running;
      if (![send, stop, document.body].includes(focused)) return;
      if (running) stop.focus(); // the button that had the focus is hidden or gone now
      else focus();
    },
  };
}

function joined(texts, last) {
  return [...texts, last].filter(Boolean).join("\n");
}
