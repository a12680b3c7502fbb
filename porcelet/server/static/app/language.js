// The language of the page: which one is chosen, and writing the catalogue's texts into elements.
// An element remembers its key and values, so that changing the language needs no reload.

import { stored } from "./preferences.js";
import { TEXTS } from "./texts.js";

export const LANGUAGES = Object.keys(TEXTS);
let language = preferred();
let numbers = new Intl.NumberFormat(language, { maximumFractionDigits: 1 });
let plural = new Intl.PluralRules(language);

/** The text of a key in the current language. {names} are filled in; "one|many" is decided by `count`. */
export function text(key, values = {}) {
  const forms = TEXTS[language][key].split("|");
  const form = forms.length > 1 && plural.select(values.count) !== "one" ? forms[1] : forms[0];
  return form.replace(/\{(\w+)\}/g, (_, name) => shown(values[name]));
}

/** A number in few characters, as "12.3K". */
export function compact(count) {
  return new Intl.NumberFormat(language, { notation: "compact", maximumFractionDigits: 1 }).format(count);
}

export function isText(key) {
  return key in TEXTS.en;
}

export function currentLanguage() {
  return language;
}

/** Change the language, remember it, and rewrite every text on the page. */
export function useLanguage(code) {
  language = code;
  numbers = new Intl.NumberFormat(code, { maximumFractionDigits: 1 });
  plural = new Intl.PluralRules(code);
  stored.language = code;
  translate(document);
}

/** Write a text into an element. */
export function setText(element, key, values = {}) {
  element.dataset.text = key;
  return remember(element, values);
}

/** Name an element for who does not see it; a button shows the name as its tooltip too. */
export function setLabel(element, key, values = {}) {
  element.dataset.label = key;
  return remember(element, values);
}

/** Write the texts of all elements inside `root` that name one: data-text, data-label, data-placeholder. */
export function translate(root) {
  document.documentElement.lang = language;
  root.querySelectorAll("[data-text], [data-label], [data-placeholder]").forEach(write);
}

function remember(element, values) {
  if (Object.keys(values).length) element.dataset.values = JSON.stringify(values);
  write(element);
  return element;
}

function write(element) {
  const { text: content, label, placeholder } = element.dataset;
  const values = JSON.parse(element.dataset.values ?? "{}");
  if (content) element.textContent = text(content, values);
  if (placeholder) element.placeholder = text(placeholder, values);
  if (!label) return;
  element.setAttribute("aria-label", text(label, values));
  if (element.matches("button, select, a")) element.title = text(label, values);
}

function shown(value) {
  return typeof value === "number" ? numbers.format(value) : value;
}

function preferred() {
  const wanted = [stored.language, ...navigator.languages].filter(Boolean);
  return wanted.map((code) => code.slice(0, 2)).find((code) => code in TEXTS) ?? "en";
}
