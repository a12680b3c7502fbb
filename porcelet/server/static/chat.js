// The chat page: one conversation, kept in this tab alone.

import { ApiError, servedModel, streamAnswer } from "./api.js";
import { render } from "./render.js";
import { TEXTS, currentLanguage, text, translatePage, useLanguage } from "./texts.js";

const NEAR_BOTTOM = 80; // pixels: whoever has scrolled further up is reading and must not be moved

const element = (id) => document.getElementById(id);
const [composer, prompt, send, stop] = ["composer", "prompt", "send", "stop"].map(element);
const [list, scroll, status, welcome] = ["messages", "scroll", "status", "welcome"].map(element);

let conversation = [];
let running = null; // the AbortController of the answer in progress

// ---- one exchange ----------------------------------------------------------------------------------------------------

async function ask(question) {
  welcome.hidden = true;
  conversation.push({ role: "user", content: question });
  render(addMessage("user"), question);
  const body = addMessage("assistant");
  const controller = new AbortController();
  setRunning(controller);
  scroll.scrollTop = scroll.scrollHeight;
  const answer = await receive(body, controller.signal);
  if (running !== controller) return; // a new chat has begun meanwhile
  setRunning(null);
  status.textContent = answer; // read aloud once, when it is whole
  if (answer) conversation.push({ role: "assistant", content: answer });
  else {
    conversation.pop(); // so that asking again does not send the question twice
    if (!prompt.value) setPrompt(question);
    scroll.scrollTop = scroll.scrollHeight; // the prompt may have grown over the error
  }
}

/** Show an answer as it arrives; its text, as far as it came. */
async function receive(body, signal) {
  const draw = painter(body);
  let answer = "", finish = null, count = 0, first = 0;
  status.textContent = text("answering");
  body.classList.add("waiting");
  try {
    for await (const event of streamAnswer(await model(), conversation, signal)) {
      const choice = event.choices[0];
      if (choice?.delta.content) {
        first ||= performance.now();
        answer += choice.delta.content;
        draw(answer);
      }
      finish = choice?.finish_reason ?? finish;
      count = event.usage?.completion_tokens ?? count;
    }
    const rate = (count - 1) / ((performance.now() - first) / 1000);
    const speed = count > 1 && first ? text("speed", { count, rate: rate.toFixed(rate < 10 ? 1 : 0) }) : "";
    addNote(body, finish === "length" ? [speed, text("cut")] : [speed]);
  } catch (problem) {
    if (problem.name === "AbortError") addNote(body, [text("stopped")]);
    else addError(body, problem);
  }
  draw(answer, true);
  body.classList.remove("waiting");
  return answer;
}

/** Draws a growing text at most once a frame, and keeps its end in view. */
function painter(body) {
  const content = body.appendChild(document.createElement("div"));
  let latest = "", frame = 0;
  const paint = () => {
    const follow = atEnd();
    frame = 0;
    render(content, latest);
    if (follow) scroll.scrollTop = scroll.scrollHeight;
  };
  return (text, now = false) => {
    latest = text;
    body.classList.toggle("waiting", !text);
    if (now) {
      cancelAnimationFrame(frame);
      paint();
    } else frame ||= requestAnimationFrame(paint);
  };
}

let name = null;

async function model() {
  name ??= await servedModel();
  element("model").textContent = name;
  return name;
}

// ---- the page --------------------------------------------------------------------------------------------------------

function addMessage(role) {
  const item = document.createElement("li");
  const speaker = document.createElement("span");
  const body = document.createElement("div");
  item.className = role;
  speaker.className = "unseen";
  speaker.textContent = role === "user" ? text("you") : "porcelet";
  body.className = "body";
  item.append(speaker, body);
  list.append(item);
  return body;
}

function addNote(body, parts) {
  const note = document.createElement("p");
  note.className = "note";
  note.textContent = parts.filter(Boolean).join(" · ");
  append(body, note);
}

function addError(body, problem) {
  const known = `error_${problem.kind}` in TEXTS.en;
  if (!(problem instanceof ApiError)) console.error(problem);
  const box = document.createElement("div");
  const [headline, detail] = [document.createElement("strong"), document.createElement("span")];
  box.className = "error";
  box.setAttribute("role", "alert");
  headline.textContent = text(known ? `error_${problem.kind}` : "error_other");
  detail.textContent = problem.message;
  box.append(headline, detail);
  append(body, box);
}

/** Add to the conversation and stay at its end, unless the reader has scrolled away from it. */
function append(parent, child) {
  const follow = atEnd();
  parent.append(child);
  if (follow) scroll.scrollTop = scroll.scrollHeight;
}

function atEnd() {
  return scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < NEAR_BOTTOM;
}

function setRunning(controller) {
  running = controller;
  send.hidden = Boolean(controller);
  stop.hidden = !controller;
  if (document.activeElement === document.body) focusPrompt(); // the button that had the focus is hidden now
}

function fitPrompt() {
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight}px`;
  send.disabled = !prompt.value.trim();
}

function setPrompt(value) {
  prompt.value = value;
  fitPrompt();
}

function newChat() {
  running?.abort();
  setRunning(null);
  conversation = [];
  list.replaceChildren();
  welcome.hidden = false;
  status.textContent = "";
  setPrompt("");
  focusPrompt();
}

/** Ready to type; not on a phone, where it would open the keyboard over the answer. */
function focusPrompt() {
  if (matchMedia("(hover: hover)").matches) prompt.focus();
}

composer.addEventListener("submit", (event) => {
  event.preventDefault();
  const question = prompt.value.trim();
  if (!question || running) return;
  setPrompt("");
  ask(question);
});
prompt.addEventListener("input", fitPrompt);
prompt.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return; // composing: Enter chooses a character
  event.preventDefault();
  composer.requestSubmit();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
stop.addEventListener("click", () => running?.abort());
element("new").addEventListener("click", newChat);
for (const button of welcome.querySelectorAll("button")) {
  button.addEventListener("click", () => running || ask(button.textContent));
}

const language = element("language");
for (const [code, texts] of Object.entries(TEXTS)) language.append(new Option(texts.language_name, code));
language.value = currentLanguage();
language.addEventListener("change", () => useLanguage(language.value));

translatePage();
fitPrompt();
focusPrompt();
model().catch((problem) => addError(addMessage("assistant"), problem));
