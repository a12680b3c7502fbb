// Logging in: the key goes to the server once, which answers with a cookie.

import { logIn } from "./api.js";
import { byId } from "./dom.js";
import { forget } from "./draft.js";
import { translate } from "./language.js";
import { problemBox } from "./problem.js";
import { offerLanguages } from "./settings.js";

translate(document);
forget(); // whoever was here has left, or the time of the cookie was over
offerLanguages(byId("language"));
byId("login").addEventListener("submit", async (event) => {
  event.preventDefault();
  try {
    await logIn(byId("key").value.trim());
    location.assign("/");
  } catch (problem) {
    byId("problem").replaceChildren(problemBox(problem));
    byId("key").select();
  }
});
