// Keeping the end of a growing conversation in view, unless its reader has scrolled away from it.

import { byId } from "./dom.js";

const NEAR = 60; // pixels from the end that still count as being there

/** {toEnd(), running(bool)}: follows the end of the element `scroller`; the button brings a reader back to it. */
export function createFollower(scroller) {
  const button = byId("to-end");
  let [atEnd, isRunning] = [true, false];

  const isNear = () => scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < NEAR;

  function settle() {
    if (atEnd) scroller.scrollTop = scroller.scrollHeight;
    button.hidden = isNear();
  }

  scroller.addEventListener("scroll", () => {
    atEnd = isNear();
    button.hidden = atEnd;
  }, { passive: true });
  scroller.addEventListener("click", ({ target }) => {
    if (target.closest("summary") && !isRunning) atEnd = false; // what is unfolded is to be read from its beginning
  });
  new ResizeObserver(settle).observe(scroller);
  new ResizeObserver(settle).observe(scroller.firstElementChild);

  function toEnd() {
    atEnd = true;
    settle();
  }

  button.addEventListener("click", toEnd);
  return { toEnd, running: (running) => (isRunning = running) };
}
