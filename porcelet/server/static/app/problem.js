// Saying what went wrong: in the visitor's language where the server names a problem we know, else in its own words.

import { ApiError } from "./api.js";
import { h } from "./dom.js";
import { isText, setText } from "./language.js";

/** The key of the text for a problem ({code}). */
export function problemText({ code }) {
  return isText(`error_${code}`) ? `error_${code}` : "error_other";
}

/** A calm box about a problem ({code, message}); with `onRetry` it offers to try again. */
export function problemBox(problem, onRetry = null) {
  if (problem instanceof Error && !(problem instanceof ApiError)) console.error(problem);
  const key = problemText(problem);
  const box = h("div", { class: "problem" }, setText(h("strong"), key));
  if (key === "error_other" && problem.message) box.append(h("span", {}, problem.message));
  if (onRetry) box.append(setText(h("button", { type: "button", class: "quiet", onclick: onRetry }), "retry"));
  return box;
}
