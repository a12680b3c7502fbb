// Keeping the end of a growing conversation in view, unless its reader has scrolled away from it.

import { byId } from "./dom.js";

const NEAR = 60; // pixels from the end that still count as being there

/** Follows the end of the element `scroller`; the button brings a reader back to it. */
export function createFollower(scroller) {
  const button = byId("to-end");
  let atEnd = true;

  function settle() {
    if (atEnd) scroller.scrollTop = scroller.scrollHeight;
    button.hidden = atEnd;
  }

  scroller.addEventListener("scroll", () => {
    atEnd = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < NEAR;
    button.hidden = atEnd;
  }, { passive: true });
  new ResizeObserver(settle).observe(scroller);
  new ResizeObserver(settle).observe(scroller.firstElementChild);

  function toEnd() {
    atEnd = true;
    settle();
  }

  button.addEventListener("click", toEnd);
  return { toEnd };
}
