// What models write is not trusted: everything made from it passes here before it becomes part of the page.

import DOMPurify from "../vendor/dompurify-3.4.18/purify.es.mjs";

const TAGS = (
  "a blockquote br code del em h3 h4 h5 h6 hr li ol p pre s span strong table tbody td th thead tr ul"
).split(" ");
const RULES = {
  ALLOWED_TAGS: TAGS,
  ALLOWED_ATTR: ["class", "href", "start"],
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
  ALLOW_ARIA_ATTR: false,
  ALLOW_DATA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};

/** The elements of an HTML text, without anything that could run, load or restyle. */
export function sanitized(html) {
  return DOMPurify.sanitize(html, RULES);
}
