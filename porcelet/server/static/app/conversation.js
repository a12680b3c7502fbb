// The open conversation: asking, editing, regenerating, switching between branches, following the answer in the making.
// The server keeps everything; this holds a copy of one conversation's tree.

import * as api from "./api.js";
import { announce, createAnnouncer } from "./announcer.js";
import { createPainter } from "./painter.js";
import { problemText } from "./problem.js";
import { createThread } from "./thread.js";
import { createTree } from "./tree.js";
import { follow } from "./stream.js";

const TICK = 500; // ms between two looks at the clock while the model thinks

/** `page` is what the conversation tells about itself: opened(), changed(), running(bool), tokens(used),
 * connection(bool), failed(problem, retry), choice() → {model, effort}, toEnd(). */
export function createConversation(page) {
  const thread = createThread({ edit, regenerate, show });
  let about = null; // the conversation as the server describes it; null until its first message
  let tree = createTree();
  let answering = null; // the message that is followed
  let visit = new AbortController(); // aborted when the page turns to something else

  async function open(newId) {
    const signal = turn();
    const found = newId ? await api.conversation(newId, signal) : { messages: [], conversation: null };
    if (signal.aborted) return;
    about = found.conversation;
    tree = createTree(found.messages, about?.leaf);
    draw({ anew: true });
    page.opened();
    page.toEnd();
    const last = tree.path().at(-1);
    if (last?.status === "running") followAnswer(last, { resumed: true });
  }

  /** Let go of what the page followed until now. */
  function turn() {
    visit.abort();
    visit = new AbortController();
    answering = null;
    page.running(false);
    page.connection(true);
    return visit.signal;
  }

  function draw(options) {
    thread.show(tree, options);
    const usage = tree.path().findLast((message) => message.usage)?.usage;
    page.tokens(usage ? usage.prompt_tokens + usage.completion_tokens : 0);
  }

  /** Ask; true when the server has taken the question, else the page offers `again`. */
  function send(content, attachments, again) {
    return post({ parent: tree.leaf, content, attachments }, again);
  }

  function edit(message, content) {
    const attachments = message.attachments.map((file) => file.id);
    return post({ parent: message.parent, content, attachments }, () => edit(message, content));
  }

  function post(message, again) {
    return attempt(again, async () => {
      const here = (about ??= await api.createConversation());
      const { user, assistant } = await api.postMessage(here.id, { ...message, ...page.choice() });
      if (about !== here) return; // another conversation was opened meanwhile
      tree.put(user);
      begin(assistant);
    });
  }

  function regenerate(message) {
    return attempt(() => regenerate(message), async () => {
      const here = about;
      const { assistant } = await api.regenerate(message.id, page.choice());
      if (about === here) begin(assistant);
    });
  }

  async function attempt(again, action) {
    page.failed(null);
    await stop();
    try {
      await action();
      return true;
    } catch (problem) {
      page.failed(problem, again);
      return false;
    }
  }

  function begin(assistant) {
    tree.put(assistant);
    tree.select(assistant.id);
    draw();
    page.toEnd();
    page.changed();
    followAnswer(assistant, { resumed: false });
  }

  async function followAnswer(message, { resumed }) {
    const signal = turn();
    answering = message;
    page.running(true);
    announce("answering");
    try {
      tree.put(await receive(message, signal, resumed));
    } catch (problem) {
      if (signal.aborted) return;
      if (problem.code !== "not_found") page.failed(problem, () => open(about.id));
      else tree.put(await stored(message)); // it ended long ago
    }
    if (signal.aborted) return;
    turn();
    draw();
    page.changed();
    const { error } = tree.get(message.id);
    if (error) announce(problemText(error));
  }

  async function stored({ id }) {
    const { messages } = await api.conversation(about.id);
    return messages.find((message) => message.id === id);
  }

  /** Show the answer as it comes; the message as it ended. */
  async function receive(message, signal, resumed) {
    const announcer = createAnnouncer();
    const meter = createMeter(resumed ? message.created : null);
    const state = { reasoning: "", content: "" };
    let prompt = 0;
    const painter = createPainter(() => {
      thread.view(message.id)?.progress({ ...state, ...meter.read() });
      page.tokens(prompt + meter.tokens());
      announcer.hear(state.content);
    });
    const clock = setInterval(() => state.reasoning && !state.content && painter.ask(), TICK);
    try {
      for await (const event of follow(message.stream, { signal, onConnection: page.connection })) {
        if (event.type === "ended") {
          announcer.finish(event.message.content);
          return event.message;
        }
        if (event.type === "started") prompt = event.prompt_tokens;
        else {
          state[event.type] += event.text;
          meter.count(event);
          painter.ask();
        }
      }
    } finally {
      clearInterval(clock);
      painter.cancel();
    }
  }

  async function stop() {
    if (answering) await api.stopStream(answering.stream).catch((problem) => page.failed(problem));
  }

  /** Show another version of a message, with the newest that follows it. */
  async function show(messageId) {
    turn();
    tree.select(tree.newestLeaf(messageId));
    draw();
    thread.view(messageId).element.querySelector(".versions button:enabled").focus(); // the one pressed is gone
    const last = tree.path().at(-1);
    if (last.status === "running") followAnswer(last, { resumed: true });
    await api.changeConversation(about.id, { leaf: tree.leaf }).catch((problem) => page.failed(problem));
  }

  return {
    open, send, stop,
    about: () => about,
    isEmpty: () => !tree.leaf,
    lastAnswer: () => tree.path().findLast((message) => message.role === "assistant" && message.content),
  };
}

/** How long the model has been thinking, and at what rate. A resumed answer counts from when it was asked for, and does
 * not know when its thinking ended. */
function createMeter(asked) {
  let [begun, ended, tokens] = [asked, null, 0];
  return {
    count(event) {
      begun ??= api.serverTime();
      tokens = event.tokens;
      if (event.type === "content") ended ??= api.serverTime();
    },
    tokens: () => tokens,
    read() {
      if (asked && ended) return { thought: null };
      const thought = begun ? (ended ?? api.serverTime()) - begun : 0;
      return { thought, rate: thought >= 1 ? tokens / thought : 0 };
    },
  };
}
