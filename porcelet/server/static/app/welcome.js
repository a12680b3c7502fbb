// What a conversation may begin with: the page's own suggestions, or the examples of a model that does one thing alone.
// Those are the package's own, and all of them solve countdown problems, so the page can say in words what that is.

import { byId, h } from "./dom.js";

/** {offer(examples)}: examples, if there are any, take the suggestions' place. `onChoice(text)` hears the one taken. */
export function createWelcome(onChoice) {
  const [purpose, suggestions, box] = [byId("purpose"), byId("suggestions"), byId("examples")];

  function offer(examples) {
    box.replaceChildren(...examples.map((example) => h("button", { type: "button" }, example)));
    suggestions.hidden = examples.length > 0;
    box.hidden = purpose.hidden = !examples.length;
  }

  for (const buttons of [suggestions, box]) {
    buttons.addEventListener("click", ({ target }) => {
      if (target.closest("button")) onChoice(target.textContent);
    });
  }

  return { offer };
}
