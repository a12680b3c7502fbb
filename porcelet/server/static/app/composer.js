// Where a message is written: a field that grows, sending with Enter, stopping while the model answers.

import { byId } from "./dom.js";
import { createUploads } from "./uploads.js";

const DRAFT = "porcelet.draft"; // in the tab's own storage, so that a reload loses nothing

/** {focus(), running(bool), ready(bool), write(text), tokens()}. `onSend(text, file ids, again)` resolves to whether
 * it was taken; only then the field is emptied. `again` sends once more. */
export function createComposer({ onSend, onStop, onChange }) {
  const [form, prompt, send, stop] = ["composer", "prompt", "send", "stop"].map(byId);
  const uploads = createUploads(refresh);
  let [isReady, isSending] = [false, false];

  function refresh() {
    prompt.style.height = "auto";
    prompt.style.height = `${prompt.scrollHeight}px`;
    send.disabled = !isReady || isSending || uploads.busy() || !(prompt.value.trim() || uploads.ids().length);
    sessionStorage.setItem(DRAFT, prompt.value);
    onChange();
  }

  function write(text) {
    prompt.value = text;
    refresh();
  }

  async function submit(event) {
    event.preventDefault();
    if (send.disabled || send.hidden) return;
    isSending = true;
    refresh();
    const taken = await onSend(prompt.value.trim(), uploads.ids(), () => form.requestSubmit());
    isSending = false;
    if (taken) {
      uploads.clear();
      write("");
    } else refresh();
    focus();
  }

  /** Ready to type; not where it would open a phone's keyboard over the answer. */
  function focus() {
    if (matchMedia("(hover: hover)").matches) prompt.focus();
  }

  form.addEventListener("submit", submit);
  prompt.addEventListener("input", refresh);
  prompt.addEventListener("keydown", (event) => {
    const isForText = event.isComposing || event.shiftKey || !matchMedia("(hover: hover)").matches;
    if (event.key === "Enter" && !isForText) submit(event);
  });
  stop.addEventListener("click", onStop);
  prompt.value = sessionStorage.getItem(DRAFT) ?? "";

  return {
    focus,
    write,
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
