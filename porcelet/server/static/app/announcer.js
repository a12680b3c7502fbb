// What a screen reader hears. Answers are spoken sentence by sentence as they come, never token by token; short events
// ("Copied") are spoken at once. The two live regions are in index.html.

import { byId, h } from "./dom.js";
import { text } from "./language.js";

const KEPT = 60; // announcements left in the region; a reader speaks additions, the old ones only cost memory
const SENTENCES = /^[\s\S]*(?:[.!?…:]["'”»)]?(?=\s)|[。！？：]|\n)/; // up to the last end of a sentence
const FENCE = /^\s*(```|~~~)/;

/** Say a text of the catalogue at once. */
export function announce(key, values) {
  byId("announcements").textContent = text(key, values);
}

/** {hear(text), finish(text)} for one answer: hear what it is so far; new sentences are spoken once they are whole.
 * One that is `resumed` was heard before: it is spoken from where it is by now. */
export function createAnnouncer({ resumed = false } = {}) {
  let isPast = resumed;
  let heard = 0;
  let inCode = false;

  byId("spoken").replaceChildren();

  function speak(piece) {
    const region = byId("spoken");
    const sentences = piece.split("\n").map(spoken).filter(Boolean);
    if (isPast) return;
    region.append(...sentences.map((sentence) => h("p", {}, sentence)));
    while (region.childElementCount > KEPT) region.firstElementChild.remove();
  }

  /** What is said for a line: of a block of code only that there is one. */
  function spoken(line) {
    const isFence = FENCE.test(line);
    if (isFence) inCode = !inCode;
    if (isFence && inCode) return text("code");
    return isFence || inCode ? "" : plain(line);
  }

  return {
    hear(whole) {
      const piece = SENTENCES.exec(whole.slice(heard))?.[0];
      if (!piece) return;
      heard += piece.length;
      speak(piece);
      isPast = false;
    },
    finish(whole) {
      speak(whole.slice(heard));
      heard = whole.length;
    },
  };
}

/** A line of Markdown without its marks; nothing of one that has only marks. */
function plain(line) {
  if (!/[\p{L}\p{N}]/u.test(line)) return "";
  return line.replace(/^\s*(#+|>|[-*+]|\|)\s*/, "").replace(/[*`|]|\[(?=[^\]]*\]\()|\]\([^)]*\)/g, "").trim();
}
