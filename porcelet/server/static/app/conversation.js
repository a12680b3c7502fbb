// The open conversation: asking, editing, regenerating, switching between branches, following the answer in the making.
// The server keeps everything; this holds a copy of one conversation's tree.

import * as api from "./api.js";
import { announce, createAnnouncer } from "./announcer.js";
import { ENDINGS } from "./answer.js";
import { idOf, settled } from "./draft.js";
import { createPainter } from "./painter.js";
import { problemText } from "./problem.js";
import { createThread } from "./thread.js";
import { createTree } from "./tree.js";
import { follow } from "./stream.js";

const TICK = 500; // ms between two looks at the clock while the model thinks

/** `page` is what the conversation tells about itself: opened(), changed(), listed(), running(bool), tokens(used),
 * connection(bool), failed(problem, retry), reopen(), choice() → {model, effort}, toEnd(). */
export function createConversation(page) {
  const thread = createThread({ edit, regenerate, show });
  let about = null; // the conversation as the server describes it; null until its first message
  let tree = createTree();
  let visit = new AbortController(); // aborted when another conversation is opened
  let sending = null; // the visit's signal while something is being sent in it
  let answering = null; // the message that is followed
  let following = new AbortController(); // aborted when it is not followed any more

  async function open(newId) {
    letGo();
    visit.abort();
    visit = new AbortController();
    const { signal } = visit;
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

  /** Let go of the answer the page followed until now. */
  function letGo() {
    following.abort();
    following = new AbortController();
    answering = null;
    page.running(false);
    page.connection(true);
    return following.signal;
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
    let here = about;
    return attempt(again, async (signal) => {
      const isFirst = !here;
      here ??= await api.createConversation();
      if (!signal.aborted) about = here;
      const id = idOf([here.id, message.content, message.attachments]);
      const posting = api.postMessage(here.id, { id, ...message, ...page.choice() });
      const refused = (problem) => takeBack(here, problem, signal);
      const { user, assistant } = await (isFirst ? posting.catch(refused) : posting);
      if (signal.aborted) return;
      tree.put(user);
      begin(assistant);
      if (!here.title) nameIt(here.id, signal);
    });
  }

  /** A first question that was refused leaves no empty conversation; one nobody has heard of again may be there. */
  async function takeBack({ id }, problem, signal) {
    if (isRefusal(problem)) {
      await api.deleteConversation(id).catch(console.warn);
      if (!signal.aborted) about = null;
    } else if (!signal.aborted) page.changed();
    throw problem;
  }

  /** The server has made the title of the first question. */
  async function nameIt(id, signal) {
    const { conversation } = await api.conversation(id, signal).catch(() => ({})); // the list will tell it too
    if (conversation) know(conversation);
  }

  /** Take over what is newly known of a conversation, if it is this one. */
  function know(newer) {
    if (about?.id !== newer.id) return;
    about = newer;
    page.opened();
  }

  function regenerate(message) {
    return attempt(() => regenerate(message), async (signal) => {
      const choice = page.choice();
      const { assistant } = await api.regenerate(message.id, { id: idOf([message.id, choice]), ...choice });
      if (!signal.aborted) begin(assistant);
    });
  }

  /** Send one thing at a time; true when the server has taken it. `action(signal)` may end in another conversation. */
  async function attempt(again, action) {
    const { signal } = visit;
    if (sending === signal) return false;
    sending = signal;
    page.failed(null);
    try {
      await stop();
      await action(signal);
      settled();
      return true;
    } catch (problem) {
      if (isRefusal(problem)) settled();
      page.failed(problem, signal.aborted ? null : again);
      return false;
    } finally {
      if (sending === signal) sending = null;
      if (signal.aborted) page.listed();
    }
  }

  function begin(assistant) {
    tree.put(assistant);
    tree.select(assistant.id);
    draw();
    page.toEnd();
    page.changed();
    if (assistant.status === "running") followAnswer(assistant, { resumed: false });
  }

  async function followAnswer(message, { resumed }) {
    const signal = letGo();
    const { id } = about;
    answering = message;
    page.running(true);
    announce("answering");
    try {
      const ended = await endOf(message, id, signal, resumed);
      if (signal.aborted) return;
      letGo();
      tree.put(ended);
      draw();
      page.changed();
      sayEnd(ended);
    } catch (problem) {
      if (signal.aborted) return;
      letGo();
      page.failed(problem, page.reopen);
    }
  }

  /** The message as it ended: from its stream, or as it is stored when that was forgotten long ago. */
  async function endOf(message, conversationId, signal, resumed) {
    try {
      return await receive(message, signal, resumed);
    } catch (problem) {
      if (signal.aborted || problem.code !== "not_found") throw problem;
      const { messages } = await api.conversation(conversationId, signal);
      const found = messages.find(({ id }) => id === message.id);
      if (!found) throw problem;
      return found;
    }
  }

  /** Show the answer as it comes; the message as it ended. */
  async function receive(message, signal, resumed) {
    const announcer = createAnnouncer({ resumed });
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
    letGo();
    tree.select(tree.newestLeaf(messageId));
    draw({ upTo: messageId });
    thread.view(messageId).element.querySelector(".versions button:enabled").focus(); // the one pressed is gone
    const last = tree.path().at(-1);
    if (last.status === "running") followAnswer(last, { resumed: true });
    await api.changeConversation(about.id, { leaf: tree.leaf }).then(know).catch((problem) => page.failed(problem));
  }

  return {
    open, send, stop, know,
    about: () => about,
    isEmpty: () => !tree.leaf,
    lastAnswer: () => tree.path().findLast((message) => message.role === "assistant" && message.content),
  };
}

/** Whether the server has said no; else nobody knows what became of what was sent. */
function isRefusal({ status, code }) {
  return status >= 400 && code !== "other";
}

function sayEnd({ error, status }) {
  if (error) announce(problemText(error));
  else if (status in ENDINGS) announce(ENDINGS[status]);
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
