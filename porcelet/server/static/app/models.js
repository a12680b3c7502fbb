// What the server serves: asked at the start, and again each second while a model still loads.

import { session } from "./api.js";
import { byId } from "./dom.js";
import { setText } from "./language.js";

const PAUSE = 1000; // ms between two questions while a model loads

/** Ask until every model is loaded or has failed. `onSession(session)` hears each answer; `onProblem(problem)` that
 * there is none, and with null that there is one again. */
export async function watchModels(onSession, onProblem) {
  let isAway = false;
  for (;;) {
    try {
      const found = await session();
      if (isAway) onProblem(null);
      isAway = false;
      onSession(found);
      if (!found.models.some(isLoading)) return;
    } catch (problem) {
      if (!isAway) onProblem(problem);
      isAway = problem.code === "unreachable";
      if (!isAway) return;
    }
    await new Promise((resolve) => setTimeout(resolve, PAUSE));
  }
}

/** Whether a model will answer, but not yet. */
export function isLoading({ context, failure }) {
  return context === null && !failure;
}

/** Show how far a model's load has come, or why it failed; nothing once it answers. */
export function showLoad(model) {
  const { name, loading, failure } = model;
  const [box, label, bar] = [byId("load"), byId("load-text"), byId("load-bar")];
  box.hidden = !isLoading(model) && !failure;
  box.classList.toggle("problem", Boolean(failure));
  bar.hidden = Boolean(failure);
  if (failure) label.textContent = failure;
  if (!isLoading(model)) return;
  const share = loading?.total ? loading.done / loading.total : 0;
  bar.value = share;
  setText(label, "loading", { model: name, percent: Math.floor(100 * share) });
}
