// How much of the model's context the conversation takes: a ring and, beside it, the numbers.

import { byId } from "./dom.js";
import { compact, setLabel, setText } from "./language.js";

const FULL = 0.85; // share from which the ring warns

/** show(used, context): tokens used of those the model can hold; hidden while there is nothing to show. */
export function createGauge() {
  const [gauge, ring, numbers] = [byId("gauge"), byId("gauge-ring"), byId("gauge-numbers")];
  return {
    show(used, context) {
      gauge.hidden = !used || !context;
      if (gauge.hidden) return;
      const share = Math.min(1, used / context);
      ring.setAttribute("stroke-dasharray", `${100 * share} 100`);
      gauge.classList.toggle("full", share >= FULL);
      gauge.setAttribute("aria-valuenow", Math.round(100 * share));
      setLabel(gauge, "context", { used, context });
      setText(numbers, "context_short", { used: compact(used), context: compact(context) });
    },
  };
}
