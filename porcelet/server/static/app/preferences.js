// What this browser remembers between visits: language, theme, effort, model, the sidebar. Conversations are not here;
// the server keeps them.

const PREFIX = "porcelet.";

/** Reads and writes like an object; an absent preference is null, and setting null forgets one. */
export const stored = new Proxy({}, {
  get: (_, name) => localStorage.getItem(PREFIX + name),
  set(_, name, value) {
    if (value == null) localStorage.removeItem(PREFIX + name);
    else localStorage.setItem(PREFIX + name, value);
    return true;
  },
});
