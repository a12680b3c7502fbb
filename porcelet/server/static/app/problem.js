// Saying what went wrong, in the visitor's language where the server names a problem we know, else in the server's words.

import { ApiError } from "./api.js";
import { h } from "./dom.js";
import { isText, setText } from "./language.js";

/** A calm box about a problem ({code, message}); with `onRetry` it offers to try again. */
export function problemBox(problem, onRetry = null) {
  if (problem instanceof Error && !(problem instanceof ApiError)) console.error(problem);
  const known = isText(`error_${problem.code}`);
  const headline = setText(h("strong"), known ? `error_${problem.code}` : "error_other");
  const box = h("div", { class: "problem" }, headline);
  if (!known && problem.message) box.append(h("span", {}, problem.message));
  if (onRetry) box.append(setText(h("button", { type: "button", class: "quiet", onclick: onRetry }), "retry"));
  return box;
}
