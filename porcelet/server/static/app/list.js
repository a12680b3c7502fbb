// The conversations in the sidebar: grouped by age, searched as one types, loaded further as one scrolls.

import * as api from "./api.js";
import { announce } from "./announcer.js";
import { byId, h, icon } from "./dom.js";
import { setText, text } from "./language.js";
import { iconButton } from "./versions.js";

const PAUSE = 180; // ms after the last key before searching
const PORTION = 50; // conversations asked for at a time
const MOST = 100; // that the server gives at a time
const DAY = 86_400;
const GROUPS = [[0, "group_today"], [1, "group_yesterday"], [7, "group_week"], [Infinity, "group_earlier"]]; // days

/** {refresh(), know(conversation), mark(id), find(id)}.
 * Calls onMenu(conversation, button), onProblem(problem) and, drawn, onChange(). */
export function createList({ onMenu, onProblem, onChange }) {
  const [container, sentinel, search] = [byId("conversations"), byId("more"), byId("search")];
  let [items, next, current, request] = [[], null, null, new AbortController()];

  /** Load `wanted` conversations, those after `cursor` where one is given. */
  async function load({ cursor = null, wanted = PORTION } = {}) {
    const isNew = !cursor;
    request.abort();
    const { signal } = (request = new AbortController());
    try {
      const loaded = cursor ? [...items] : [];
      const goal = loaded.length + wanted;
      do {
        const limit = Math.min(MOST, goal - loaded.length);
        const page = await api.conversations({ query: search.value.trim(), cursor, limit, signal });
        loaded.push(...page.conversations);
        cursor = page.next;
      } while (cursor && loaded.length < goal);
      [items, next] = [loaded, cursor];
      draw();
      if (search.value.trim() && isNew) announce("found", { count: items.length });
    } catch (problem) {
      if (!signal.aborted) onProblem(problem);
    }
  }

  function draw() {
    const refocus = focusKeeper();
    const groups = Map.groupBy(items, search.value.trim() ? () => "group_found" : groupOf);
    container.replaceChildren(...[...groups].map(([key, members]) => group(key, members)));
    const note = search.value.trim() ? "no_matches" : "no_conversations";
    if (!items.length) container.append(setText(h("p", { class: "note" }), note));
    refocus();
    sentinel.hidden = !next;
    nearEnd.unobserve(sentinel);
    nearEnd.observe(sentinel); // anew: it may still be in view, and then nothing would tell
    mark(current);
    onChange();
  }

  /** Call before drawing anew; the function it gives puts the focus back: where it was, or on what took the place. */
  function focusKeeper() {
    const focused = document.activeElement;
    const entries = () => [...container.querySelectorAll("li")];
    const place = entries().findIndex((entry) => entry.contains(focused));
    if (place < 0) return () => {};
    const { id } = focused.closest("li").dataset;
    return () => {
      const now = entries();
      const entry = now.find(({ dataset }) => dataset.id === id) ?? now[Math.min(place, now.length - 1)];
      (entry?.querySelector(focused.localName) ?? search).focus();
    };
  }

  function group(key, members) {
    const heading = setText(h("h2", { id: key }), key);
    return h("section", {}, heading, h("ul", { "aria-labelledby": key }, ...members.map(item)));
  }

  function item(conversation) {
    const { id, title, pinned, excerpt } = conversation;
    const name = h("span", { class: "title", dir: "auto" }, title);
    if (!title) setText(name, "untitled");
    const found = excerpt && h("span", { class: "excerpt", dir: "auto" }, excerpt);
    const link = h("a", { href: `#${id}` }, pinned && icon("pin"), h("span", {}, name, found));
    const button = iconButton("menu", "options", () => onMenu(conversation, button), {
      title: title || text("untitled"),
    });
    button.ariaHasPopup = "menu";
    button.ariaExpanded = "false";
    return h("li", { "data-id": id }, link, button);
  }

  /** Show which conversation is open. */
  function mark(id) {
    current = id;
    for (const link of container.querySelectorAll("a")) {
      if (link.hash === `#${id}`) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    }
  }

  let timer = 0;
  search.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(load, PAUSE, {});
  });
  search.addEventListener("keydown", (event) => {
    if (event.key === "ArrowDown") container.querySelector("a")?.focus();
    if (event.key !== "Escape" || !search.value) return;
    event.stopPropagation();
    search.value = "";
    load();
  });
  container.addEventListener("keydown", walk);
  const nearEnd = new IntersectionObserver(([entry]) => entry.isIntersecting && next && load({ cursor: next }));

  /** Show what is newly known of a conversation at once; refresh() puts it where it belongs now. */
  function know(newer) {
    items = items.map((one) => (one.id === newer.id ? { ...one, ...newer } : one));
    draw();
  }

  const refresh = () => load({ wanted: Math.max(PORTION, items.length) }); // as many as are shown
  return { refresh, know, mark, find: (id) => items.find((one) => one.id === id) };
}

function groupOf({ pinned, updated }) {
  if (pinned) return "group_pinned";
  const midnight = new Date().setHours(0, 0, 0, 0) / 1000;
  const days = Math.ceil((midnight - updated) / DAY); // 0: since midnight
  return GROUPS.find(([most]) => days <= most)[1];
}

/** The arrow keys go from one conversation to the next. */
function walk(event) {
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (!step || event.target.tagName !== "A") return;
  const links = [...event.currentTarget.querySelectorAll("a")];
  event.preventDefault();
  (links[links.indexOf(event.target) + step] ?? (step < 0 ? byId("search") : event.target)).focus();
}
