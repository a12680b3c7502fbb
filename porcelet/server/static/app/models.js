// What the server serves: asked at the start, and again each second while a model still loads.

import { session } from "./api.js";
import { byId } from "./dom.js";
import { setText } from "./language.js";

const PAUSE = 1000; // ms between two questions while a model loads

/** Ask until every model is loaded or has failed; `onSession(session)` hears each answer. */
export async function watchModels(onSession, onProblem) {
  for (;;) {
    try {
      const found = await session();
      onSession(found);
      if (!found.models.some(({ loading }) => loading)) return;
    } catch (problem) {
      onProblem(problem);
      if (problem.code !== "unreachable") return;
    }
    await new Promise((resolve) => setTimeout(resolve, PAUSE));
  }
}

/** Show how far a model's load has come, or why it failed; nothing once it answers. */
export function showLoad({ name, loading, failure }) {
  const [box, label, bar] = [byId("load"), byId("load-text"), byId("load-bar")];
  box.hidden = !loading && !failure;
  box.classList.toggle("problem", Boolean(failure));
  bar.hidden = !loading;
  if (failure) label.textContent = failure;
  if (!loading) return;
  const { done, total } = loading;
  bar.max = total || 1;
  bar.value = done;
  setText(label, "loading", { model: name, percent: total ? Math.floor((100 * done) / total) : 0 });
}
