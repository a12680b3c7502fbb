// The settings: language, theme, what the server keeps of this person, logging out.

import * as api from "./api.js";
import { closeable, confirm } from "./dialogs.js";
import { byId, h } from "./dom.js";
import { forget } from "./draft.js";
import { currentLanguage, LANGUAGES, useLanguage } from "./language.js";
import { stored } from "./preferences.js";
import { problemBox } from "./problem.js";
import { TEXTS } from "./texts.js";

/** {know(session)}. `onDeleted()` is called when all conversations are gone. */
export function createSettings({ onDeleted }) {
  const dialog = byId("settings");
  const problems = byId("settings-problem");
  offerLanguages(byId("language"));

  /** What goes wrong is said here: the page behind the dialog is out of reach. */
  function attempt(action) {
    problems.replaceChildren();
    return action().catch((problem) => problems.replaceChildren(problemBox(problem)));
  }

  for (const choice of dialog.querySelectorAll("[name=theme]")) {
    choice.checked = choice.value === (stored.theme ?? "");
    choice.addEventListener("change", () => {
      stored.theme = choice.value || null;
      dispatchEvent(new Event("themechange"));
    });
  }
  byId("delete-all").addEventListener("click", () => attempt(async () => {
    if (!(await confirm("delete_all", "delete_all_question", {}, "delete"))) return;
    await api.deleteConversations();
    dialog.close();
    onDeleted();
  }));
  byId("log-out").addEventListener("click", () => attempt(async () => {
    await api.logOut();
    forget();
    location.assign("/login");
  }));
  byId("open-settings").addEventListener("click", () => {
    problems.replaceChildren();
    dialog.showModal();
  });
  closeable(dialog);

  return {
    know({ login, version }) {
      byId("log-out").hidden = !login;
      byId("version").textContent = `porcelet ${version}`;
    },
  };
}

/** Fill a select with the languages, each in its own name. */
export function offerLanguages(select) {
  const options = LANGUAGES.map((code) => h("option", { value: code, lang: code }, TEXTS[code].language_name));
  select.replaceChildren(...options);
  select.value = currentLanguage();
  select.addEventListener("change", () => useLanguage(select.value));
}
