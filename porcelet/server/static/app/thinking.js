// The model's thinking: folded, with a live timer and the rate while it goes on, and how long it took afterwards.

import { h, icon } from "./dom.js";
import { setText } from "./language.js";
import { createMarkdown } from "./markdown.js";

/** {element, write(reasoning, growing), showProgress(seconds, rate), showDone(seconds)}; folded, nothing is drawn. */
export function createThinking() {
  const label = h("span");
  const content = h("div", { class: "prose", dir: "auto" });
  const element = h("details", { class: "thinking" }, h("summary", {}, icon("chevron"), label), content);
  const markdown = createMarkdown(content);
  let [reasoning, growing] = ["", true];

  const draw = () => element.open && markdown.write(reasoning, growing);
  element.addEventListener("toggle", draw);

  return {
    element,
    write(text, more) {
      [reasoning, growing] = [text, more];
      draw();
    },
    showProgress(seconds, rate) {
      element.classList.add("live");
      const whole = Math.floor(seconds);
      if (rate) setText(label, "thinking_rate", { seconds: whole, rate: Math.round(rate) });
      else setText(label, "thinking");
    },
    showDone(seconds) {
      element.classList.remove("live");
      const whole = Math.max(1, Math.round(seconds));
      if (seconds == null) setText(label, "thought");
      else if (whole < 60) setText(label, "thought_seconds", { seconds: whole });
      else setText(label, "thought_minutes", { minutes: Math.floor(whole / 60), seconds: whole % 60 });
    },
  };
}
