// The keyboard shortcuts, and the dialog that lists them. All but Escape need a modifier, so that none disturbs typing
// or a screen reader's own keys.

import { closeable } from "./dialogs.js";
import { byId, h, isForInput } from "./dom.js";
import { setText } from "./language.js";

const MAC = /Mac|iPhone|iPad/.test(navigator.userAgent);
const SHORTCUTS = [
  { key: "o", command: true, shift: true, text: "new_chat", action: "create" },
  { key: "k", command: true, text: "search_label", action: "search" },
  { key: "Escape", shift: true, text: "focus_composer", action: "compose" },
  { key: "Escape", text: "stop", action: "stop" },
  { key: "l", command: true, shift: true, text: "copy_last", action: "copyLast" },
  { key: "b", command: true, text: "toggle_sidebar", action: "toggleSidebar" },
  { key: "/", command: true, text: "shortcuts", action: "help" },
];
const NAMES = { Escape: "Esc" };

/** Call `actions[name]()` for each shortcut; "help" is done here. */
export function createShortcuts(actions) {
  const dialog = byId("help");
  const all = { ...actions, help: () => dialog.showModal() };
  byId("shortcut-list").replaceChildren(...SHORTCUTS.flatMap(explain));
  byId("open-help").addEventListener("click", all.help);
  closeable(dialog);
  addEventListener("keydown", (event) => {
    const found = SHORTCUTS.find((shortcut) => isPressed(shortcut, event));
    if (!found || document.querySelector("dialog[open], :popover-open")) return;
    if (found.action !== "stop") event.preventDefault();
    all[found.action]();
  });
}

function isPressed({ key, command = false, shift = false }, event) {
  if (event.altKey || isForInput(event) || (MAC ? event.metaKey : event.ctrlKey) !== command) return false;
  const shiftFits = event.shiftKey === shift || key === "/"; // some keyboards need shift for it
  return shiftFits && event.key.toLowerCase() === key.toLowerCase();
}

function explain({ key, command, shift, text }) {
  const keys = [command && (MAC ? "⌘" : "Ctrl"), shift && (MAC ? "⇧" : "Shift"), NAMES[key] ?? key.toUpperCase()];
  const shown = keys.filter(Boolean).map((name) => h("kbd", {}, name));
  return [setText(h("dt"), text), h("dd", {}, ...shown)];
}
