// Which model answers and how hard it thinks. What can be chosen follows from the models the server has.

import { byId, h } from "./dom.js";
import { setText } from "./language.js";
import { stored } from "./preferences.js";

const EFFORTS = { off: "effort_off", low: "effort_low", high: "effort_high", max: "effort_max" };
const ALLOWED = { never: [], always: ["low", "high", "max"], choice: ["off", "low", "high", "max"] };

/** {offer(models, default), model(), current() → {model, effort}} over the two selects of the composer. */
export function createChoice(onChange) {
  const [modelSelect, effortSelect] = [byId("model"), byId("effort")];
  let models = [];

  const model = () => models.find(({ name }) => name === modelSelect.value);

  function offer(offered, preferred) {
    if (JSON.stringify(offered) === JSON.stringify(models)) return;
    const isOffered = (name) => offered.some((one) => one.name === name);
    const chosen = [modelSelect.value, stored.model, preferred].find(isOffered);
    models = offered;
    fill(modelSelect, models.map(({ name }) => h("option", { value: name }, name)));
    modelSelect.value = chosen ?? models[0].name;
    modelSelect.parentElement.hidden = models.length < 2;
    offerEfforts();
  }

  function offerEfforts() {
    const allowed = ALLOWED[model().thinking] ?? [];
    const options = allowed.map((effort) => setText(h("option", { value: effort }), EFFORTS[effort]));
    fill(effortSelect, options);
    effortSelect.value = allowed.includes(stored.effort) ? stored.effort : "high";
    effortSelect.parentElement.hidden = !allowed.length;
    onChange();
  }

  /** Replace the options of a select unless they are there already: it may be open. */
  function fill(select, options) {
    const values = (all) => JSON.stringify(all.map(({ value }) => value));
    if (values([...select.options]) !== values(options)) select.replaceChildren(...options);
  }

  modelSelect.addEventListener("change", () => {
    stored.model = modelSelect.value;
    offerEfforts();
  });
  effortSelect.addEventListener("change", () => (stored.effort = effortSelect.value));

  return { offer, model, current: () => ({ model: modelSelect.value, effort: effortSelect.value || null }) };
}
