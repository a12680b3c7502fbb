// Saying what went wrong: in the visitor's language where the server names a problem we know, else in its own words.

import { ApiError } from "./api.js";
import { h } from "./dom.js";
import { isText, setText } from "./language.js";

/** The key of the text for a problem ({code}). */
export function problemText({ code }) {
  return isText(`error_${code}`) ? `error_${code}` : "error_other";
}

const CLEAR = ["invalid_api_key", "not_found", "unreachable"]; // nothing more can be said of these

/** The server's own words about a problem, with its numbers, or "". */
export function detailOf({ code, message }) {
  return CLEAR.includes(code) ? "" : message ?? "";
}

/** A calm box about a problem ({code, message}); with `onRetry` it offers to try again. */
export function problemBox(problem, onRetry = null) {
  if (problem instanceof Error && !(problem instanceof ApiError)) console.error(problem);
  const key = problemText(problem);
  const box = h("div", { class: "problem" }, setText(h("strong"), key));
  if (detailOf(problem)) box.append(h("span", {}, detailOf(problem)));
  if (onRetry) box.append(setText(h("button", { type: "button", class: "quiet", onclick: onRetry }), "retry"));
  return box;
}
