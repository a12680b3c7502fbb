// The list of messages on the page. Of a long conversation only the end is drawn; the rest as one scrolls up to it.

import { createAnswer } from "./answer.js";
import { byId } from "./dom.js";
import { createQuestion } from "./question.js";

const PORTION = 30; // messages drawn at a time
const MARGIN = "600px"; // how far above the top of the view they begin to be drawn

/** {show(tree, {anew, upTo}), view(id)} over the page's list. `actions`: edit, regenerate, show. */
export function createThread(actions) {
  const [list, sentinel, scroller] = [byId("messages"), byId("earlier"), byId("scroll")];
  let views = new Map(); // by message id, those drawn: {element, update, …}
  const states = new WeakMap(); // by view, what it shows: the message as it was put into the tree, and its versions
  let [path, drawn, tree] = [[], PORTION, null];

  const nearTop = new IntersectionObserver(([entry]) => {
    if (!entry.isIntersecting) return;
    const fromEnd = scroller.scrollHeight - scroller.scrollTop;
    drawn += PORTION;
    draw();
    scroller.scrollTop = scroller.scrollHeight - fromEnd; // what is being read stays where it is
  }, { root: scroller, rootMargin: MARGIN });

  function draw() {
    const shown = path.slice(-drawn);
    const kept = new Map(shown.map((message) => [message.id, views.get(message.id) ?? create(message)]));
    for (const [id, view] of views) if (!kept.has(id)) view.element.remove();
    views = kept;
    shown.forEach((message, i) => {
      const view = views.get(message.id);
      if (list.children[i] !== view.element) list.insertBefore(view.element, list.children[i]);
      refresh(view, message, tree.versions(message).map((version) => version.id));
    });
    sentinel.hidden = shown.length === path.length;
    nearTop.unobserve(sentinel);
    nearTop.observe(sentinel); // anew: it may still be in view, and then nothing would tell
  }

  /** Draw a message anew only if it changed: what stays keeps its focus, its selection and what is unfolded. */
  function refresh(view, message, versions) {
    const state = states.get(view);
    if (state?.message === message && state.versions.join() === versions.join()) return;
    states.set(view, { message, versions });
    view.update(message, versions);
  }

  function create(message) {
    return message.role === "user" ? createQuestion(message, actions) : createAnswer(message, actions);
  }

  return {
    /** Draw the path to the tree's leaf; with `anew`, from its end, as when another conversation is opened; with
     * `upTo`, at least from that message. */
    show(newTree, { anew = false, upTo = null } = {}) {
      if (anew) drawn = PORTION;
      tree = newTree;
      path = tree.path();
      if (upTo) drawn = Math.max(drawn, path.length - path.findIndex(({ id }) => id === upTo));
      draw();
    },
    view: (id) => views.get(id),
  };
}
