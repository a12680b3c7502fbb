// A menu that opens at a button: arrow keys, Escape, and the focus back where it was.

import { byId, h, icon } from "./dom.js";
import { setText } from "./language.js";

const GAP = 4; // pixels between the button and its menu

/** Open a menu at `button` with items {icon, label, action, danger}. */
export function openMenu(button, items) {
  const menu = byId("menu");
  menu.replaceChildren(...items.map((item) => entry(item, menu)));
  menu.showPopover();
  place(menu, button.getBoundingClientRect());
  button.setAttribute("aria-expanded", "true");
  menu.firstElementChild.focus();
  menu.onkeydown = (event) => move(event, menu);
  menu.ontoggle = ({ newState }) => {
    if (newState === "open") return;
    button.setAttribute("aria-expanded", "false");
    if (menu.contains(document.activeElement) || document.activeElement === document.body) button.focus();
  };
}

function entry({ icon: name, label, action, danger }, menu) {
  const attributes = { type: "button", role: "menuitem", tabindex: -1, class: danger && "danger" };
  const item = h("button", attributes, icon(name), setText(h("span"), label));
  item.addEventListener("click", () => {
    menu.hidePopover();
    action();
  });
  return item;
}

function move(event, menu) {
  const items = [...menu.children];
  const at = items.indexOf(document.activeElement);
  const target = {
    ArrowDown: (at + 1) % items.length,
    ArrowUp: (at - 1 + items.length) % items.length,
    Home: 0,
    End: items.length - 1,
  }[event.key];
  if (event.key === "Tab") menu.hidePopover();
  if (target === undefined) return;
  event.preventDefault();
  items[target].focus();
}

function place(menu, anchor) {
  const below = anchor.bottom + GAP + menu.offsetHeight <= innerHeight;
  const top = below ? anchor.bottom + GAP : anchor.top - GAP - menu.offsetHeight;
  menu.style.top = `${Math.max(GAP, top)}px`;
  menu.style.left = `${Math.max(GAP, Math.min(anchor.left, innerWidth - menu.offsetWidth - GAP))}px`;
}
