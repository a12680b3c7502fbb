// The chat page: makes the parts and connects them. The address's #fragment is the open conversation.

import * as api from "./api.js";
import { announce } from "./announcer.js";
import { createChoice } from "./choice.js";
import { copy } from "./clipboard.js";
import { createComposer } from "./composer.js";
import { createConversation } from "./conversation.js";
import { askName, confirm } from "./dialogs.js";
import { byId, placeIcons } from "./dom.js";
import { createGauge } from "./gauge.js";
import { currentLanguage, text, translate } from "./language.js";
import { createList } from "./list.js";
import { openMenu } from "./menu.js";
import { showLoad, watchModels } from "./models.js";
import { problemBox } from "./problem.js";
import { createFollower } from "./scroll.js";
import { createSettings } from "./settings.js";
import { createShortcuts } from "./shortcuts.js";
import { createSidebar } from "./sidebar.js";
import { createWelcome } from "./welcome.js";

placeIcons();
translate(document);

const gauge = createGauge();
const follower = createFollower(byId("scroll"));
const sidebar = createSidebar();
let tokensUsed = 0;

const choice = createChoice(showModel);
const conversation = createConversation({
  choice: choice.current,
  connection: (isThere) => (byId("connection").hidden = isThere),
  failed: showProblem,
  running(isRunning) {
    composer.running(isRunning);
    follower.running(isRunning);
  },
  reopen: visit,
  listed: () => list.refresh(),
  toEnd: follower.toEnd,
  tokens(used) {
    tokensUsed = used;
    showGauge();
  },
  opened: showTitle,
  changed() {
    const { id } = conversation.about();
    if (location.hash.slice(1) !== id) history.pushState(null, "", `#${id}`);
    showTitle();
    list.refresh();
  },
});
const composer = createComposer({ onSend: conversation.send, onStop: conversation.stop, onChange: showGauge });
const list = createList({ onMenu: openOptions, onProblem: showProblem, onChange: compare });
const welcome = createWelcome((question) => {
  composer.write(question);
  byId("prompt").focus();
});
composer.restore();
const settings = createSettings({ onDeleted: deleted });

function showGauge() {
  gauge.show(tokensUsed + composer.tokens(), choice.model()?.context);
}

function showModel() {
  showGauge();
  showLoad(choice.model());
  welcome.offer(choice.model().examples);
  composer.ready(choice.model().context !== null);
}

function showProblem(problem, onRetry) {
  const box = byId("problem");
  const retry = onRetry && (() => {
    box.replaceChildren();
    onRetry();
  });
  box.replaceChildren(...(problem ? [problemBox(problem, retry)] : []));
}

/** The list was loaded anew: it may know the open conversation better, as when another tab has renamed it. */
function compare() {
  const listed = list.find(conversation.about()?.id);
  if (listed) conversation.know(listed);
  else showTitle();
}

function showTitle() {
  const one = conversation.about();
  const title = one?.title ?? "";
  byId("title").textContent = title;
  byId("title").hidden = !title;
  document.title = title ? `${title} · porcelet` : "porcelet";
  byId("welcome").hidden = !conversation.isEmpty();
  byId("conversation-menu").hidden = !one;
  list.mark(one?.id);
}

async function visit() {
  showProblem(null);
  sidebar.closeDrawer();
  try {
    await conversation.open(location.hash.slice(1) || null);
    composer.focus();
  } catch (problem) {
    if (problem.name === "AbortError") return;
    if (problem.code === "not_found") leaveMissing();
    showProblem(problem, problem.code === "not_found" ? null : visit);
  }
}

/** A conversation that was deleted elsewhere: its address is worth nothing. */
function leaveMissing() {
  history.replaceState(null, "", "/");
  conversation.open(null);
}

function create() {
  if (location.hash) location.hash = "";
  else visit();
}

function openOptions(one, button) {
  const change = (action) => () => action().then(know).catch(showProblem);
  const save = (format) => () => download(api.exportAddress(one.id, format, currentLanguage()));
  const pin = () => api.changeConversation(one.id, { pinned: !one.pinned });
  openMenu(button, [
    { icon: "pin", label: one.pinned ? "unpin" : "pin", action: change(pin) },
    { icon: "edit", label: "rename", action: change(() => rename(one)) },
    { icon: "archive", label: "export_markdown", action: save("markdown") },
    { icon: "archive", label: "export_json", action: save("json") },
    { icon: "remove", label: "delete", danger: true, action: change(() => remove(one)) },
  ]);
}

async function rename({ id, title }) {
  const name = await askName("rename", title);
  return name ? api.changeConversation(id, { title: name }) : null;
}

/** Take over a conversation as the server has changed it. */
function know(changed) {
  if (changed) {
    conversation.know(changed);
    list.know(changed);
  }
  list.refresh();
}

async function remove({ id, title }) {
  if (!(await confirm("delete", "delete_question", { title: title || text("untitled") }, "delete"))) return;
  await api.deleteConversation(id);
  if (conversation.about()?.id === id) create();
  announce("deleted");
}

function deleted() {
  create();
  list.refresh();
  announce("deleted");
}

function download(address) {
  const link = document.createElement("a");
  link.href = address;
  link.download = "";
  link.click();
}

async function copyLast() {
  const answer = conversation.lastAnswer();
  if (answer) await copy(answer.content);
}

function search() {
  sidebar.open();
  byId("search").focus();
}

function knowSession(session) {
  settings.know(session);
  choice.offer(session.models, session.default_model);
}

createShortcuts({
  create, search,
  compose: () => byId("prompt").focus(),
  stop: () => sidebar.closeDrawer() || conversation.stop(),
  copyLast,
  toggleSidebar: sidebar.toggle,
});
for (const button of document.querySelectorAll(".new-chat")) button.addEventListener("click", create);
byId("export-all").addEventListener("click", () => download(api.exportAllAddress));
byId("conversation-menu").addEventListener("click", ({ currentTarget }) => {
  openOptions(conversation.about(), currentTarget);
});
byId("skip").addEventListener("click", () => byId("prompt").focus());
addEventListener("hashchange", visit);
if ("serviceWorker" in navigator) navigator.serviceWorker.register("/worker.js").catch(console.warn);
watchModels(knowSession, showProblem);
list.refresh();
visit();
