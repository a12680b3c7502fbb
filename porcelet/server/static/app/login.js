// Logging in: the key goes to the server once, which answers with a cookie.

import { logIn } from "./api.js";
import { byId } from "./dom.js";
import { translate } from "./language.js";
import { problemBox } from "./problem.js";
import { offerLanguages } from "./settings.js";

translate(document);
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
