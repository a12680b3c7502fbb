// What the server serves: asked at the start, again each second while a model still loads, and more and more calmly
// while there is no answer.

import { session } from "./api.js";
import { byId } from "./dom.js";
import { setText } from "./language.js";

const PAUSE = 1000; // ms between two questions while a model loads
const LONGEST_PAUSE = 15_000; // ms between two questions that had no answer

/** Ask until every model is loaded or has failed. `onSession(session)` hears each answer; `onProblem(problem)` that
 * there is none, and with null that there is one again. */
export async function watchModels(onSession, onProblem) {
  let failures = 0;
  for (;;) {
    const found = await session().catch((problem) => {
      if (!failures++) onProblem(problem);
    });
    if (found) {
      if (failures) onProblem(null);
      failures = 0;
      onSession(found);
      if (!found.models.some(isLoading)) return;
    }
    const pause = Math.min(PAUSE * 2 ** Math.max(0, failures - 1), LONGEST_PAUSE);
    await new Promise((resolve) => setTimeout(resolve, pause));
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
