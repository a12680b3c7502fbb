// A message of the model: its thinking, its text, how it ended, what can be done with it.

import { copyButton } from "./clipboard.js";
import { h } from "./dom.js";
import { setText } from "./language.js";
import { createMarkdown } from "./markdown.js";
import { problemBox } from "./problem.js";
import { createThinking } from "./thinking.js";
import { iconButton, versionSwitcher } from "./versions.js";

export const ENDINGS = { length: "cut", stopped: "stopped", interrupted: "interrupted" };

/** {element, update(message, versions), progress(state)} of an answer. `actions`: regenerate(message), show(id). */
export function createAnswer(first, actions) {
  const thinking = createThinking();
  const prose = h("div", { class: "prose", dir: "auto" });
  const waiting = h("div", { class: "waiting", hidden: true });
  const ending = h("div", { class: "ending" });
  const row = h("div", { class: "actions" });
  const speaker = h("h2", { class: "unseen" }, first.model ?? "porcelet");
  const element = h("li", { class: "answer" }, speaker, thinking.element, prose, waiting, ending, row);
  const markdown = createMarkdown(prose);

  /** Show the message as the server keeps it; one that still runs is shown by progress(). */
  function update(message, versions) {
    if (message.status === "running") {
      waiting.hidden = false;
      thinking.element.hidden = true;
      row.replaceChildren();
      return;
    }
    waiting.hidden = true;
    thinking.element.hidden = !message.reasoning;
    thinking.write(message.reasoning, false);
    thinking.showDone(message.seconds?.thinking);
    markdown.write(message.content);
    ending.replaceChildren(...[endingOf(message)].filter(Boolean));
    const again = iconButton("regenerate", "regenerate", () => actions.regenerate(message));
    const copy = message.content && copyButton("copy", () => message.content);
    const switcher = versionSwitcher(versions, message.id, actions.show);
    row.replaceChildren(...[copy, again, switcher, speedOf(message)].filter(Boolean));
  }

  /** Show an answer in the making: {reasoning, content, thought: seconds, rate}. */
  function progress({ reasoning, content, thought, rate }) {
    waiting.hidden = Boolean(reasoning || content);
    thinking.element.hidden = !reasoning;
    if (content) thinking.showDone(thought);
    else thinking.showProgress(thought, rate);
    thinking.write(reasoning, !content);
    markdown.write(content, true);
  }

  function endingOf(message) {
    if (message.status === "error") return problemBox(message.error, () => actions.regenerate(message));
    if (!(message.status in ENDINGS)) return null;
    return setText(h("p", { class: "note" }), ENDINGS[message.status]);
  }

  return { element, update, progress };
}

function speedOf({ usage, seconds }) {
  const spent = (seconds?.thinking ?? 0) + (seconds?.answering ?? 0);
  if (!usage?.completion_tokens || !spent) return null;
  const rate = usage.completion_tokens / spent;
  const values = { count: usage.completion_tokens, rate: rate < 10 ? rate : Math.round(rate) };
  return setText(h("span", { class: "note speed" }), "speed", values);
}
