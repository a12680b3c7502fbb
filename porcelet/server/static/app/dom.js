// Making elements: the one helper the views are written with, and the page's own thin-line icons.

const SVG = "http://www.w3.org/2000/svg";
const LINES = {
  archive: "M10 3v9M6.5 8.5 10 12l3.5-3.5M4 15.5h12",
  arrow_up: "M10 16V4.5M5 9.5l5-5 5 5",
  arrow_down: "M10 4v11.5M5 10.5l5 5 5-5",
  attach: "M15.5 9.5 10 15a3.5 3.5 0 0 1-5-5l6-6a2.3 2.3 0 0 1 3.3 3.3l-5.8 5.8a1.1 1.1 0 0 1-1.6-1.6l5-5",
  check: "M4.5 10.5l3.5 3.5 7.5-8",
  chevron: "M7.5 5l5 5-5 5",
  close: "M5.5 5.5l9 9M14.5 5.5l-9 9",
  copy: "M7.5 7.5h8v8h-8zM12.5 7V4.5h-8v8H7",
  edit: "M4.5 15.5l.7-3L13 4.7l2.3 2.3-7.8 7.8z",
  file: "M5.5 3.5h6l3 3v10h-9zM11.5 3.5v3h3",
  help: "M7.5 7.5a2.5 2.5 0 1 1 3.6 2.2c-.8.4-1.1.9-1.1 1.8M10 14.2v.1",
  menu: "M4.5 10h.01M10 10h.01M15.5 10h.01",
  new_chat: "M10 4.5v11M4.5 10h11",
  next: "M8 5.5l4.5 4.5L8 14.5",
  pin: "M7.5 3.5h5l-.6 5 2.6 2.5h-9l2.6-2.5zM10 11v5.5",
  previous: "M12 5.5L7.5 10l4.5 4.5",
  regenerate: "M15.5 8.5A5.8 5.8 0 0 0 5 7M4.5 4v3.3h3.3M4.5 11.5A5.8 5.8 0 0 0 15 13M15.5 16v-3.3h-3.3",
  remove: "M4.5 6h11M8 6V4h4v2M6 6l.7 10h6.6L14 6",
  search: "M9 4a5 5 0 1 0 0 10A5 5 0 0 0 9 4zM12.7 12.7l3.3 3.3",
  settings: "M4 6.5h6m4 0h2M4 13.5h2m4 0h6M12 4.5a2 2 0 1 0 0 4 2 2 0 0 0 0-4zM8 11.5a2 2 0 1 0 0 4 2 2 0 0 0 0-4z",
  sidebar: "M3.5 4.5h13v11h-13zM8 4.5v11",
  stop: "M6.5 6.5h7v7h-7z",
  thought: "M10 3.5a4.7 4.7 0 0 0-2.5 8.7v2h5v-2A4.7 4.7 0 0 0 10 3.5zM8 16.7h4",
};

export const byId = (id) => document.getElementById(id);

/** An element with attributes (true: present, false or null: absent), listeners ("onclick") and children. */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name.slice(2), value);
    else if (value !== false && value != null) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child != null && child !== false));
  return element;
}

/** One of the icons above; it is decoration, so whoever uses it gives the button a label. */
export function icon(name) {
  const drawing = document.createElementNS(SVG, "svg");
  drawing.setAttribute("viewBox", "0 0 20 20");
  drawing.setAttribute("aria-hidden", "true");
  drawing.setAttribute("class", `icon icon-${name}`);
  drawing.append(document.createElementNS(SVG, "path"));
  drawing.firstChild.setAttribute("d", LINES[name]);
  return drawing;
}

/** Whether a key press belongs to an input method, as the Enter that confirms pinyin; Safari tells it by the code. */
export function isForInput(event) {
  return event.isComposing || event.keyCode === 229;
}

/** Put the icons into the page's fixed elements: data-icon. */
export function placeIcons() {
  for (const element of document.querySelectorAll("[data-icon]")) element.prepend(icon(element.dataset.icon));
}
