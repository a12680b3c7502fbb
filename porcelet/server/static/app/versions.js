// The switcher ‹ 2/3 › between the versions of a message, and the row of small buttons it stands in.

import { h, icon } from "./dom.js";
import { setLabel } from "./language.js";

/** A small button with an icon and a name. */
export function iconButton(name, label, onclick, values = {}) {
  return setLabel(h("button", { type: "button", class: "plain", onclick }, icon(name)), label, values);
}

/** The switcher between `versions` (message ids, oldest first), or null when there is one version only. */
export function versionSwitcher(versions, current, onShow) {
  if (versions.length < 2) return null;
  const index = versions.indexOf(current);
  const count = h("span", { class: "count" }, `${index + 1}/${versions.length}`);
  const previous = iconButton("previous", "previous_version", () => onShow(versions[index - 1]));
  const next = iconButton("next", "next_version", () => onShow(versions[index + 1]));
  previous.disabled = index === 0;
  next.disabled = index === versions.length - 1;
  const group = h("div", { class: "versions", role: "group" }, previous, count, next);
  return setLabel(group, "version", { index: index + 1, count: versions.length });
}
