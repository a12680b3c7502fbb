// What is written but not sent yet, in the tab's own storage: a reload loses nothing, a logout leaves nothing behind.
// Also the names of what was sent without hearing back, so that sending it again does not do it twice.

const DRAFT = "porcelet.draft";
const SENT = "porcelet.sent";

/** The draft {text, files: as the server described them}. */
export function readDraft() {
  return { text: "", files: [], ...JSON.parse(sessionStorage.getItem(DRAFT)) };
}

export function keepDraft(draft) {
  sessionStorage.setItem(DRAFT, JSON.stringify(draft));
}

/** The id under which something (any JSON) is sent: the same for the same thing until `settled()`. */
export function idOf(thing) {
  const key = JSON.stringify(thing);
  let sent = JSON.parse(sessionStorage.getItem(SENT));
  if (sent?.key !== key) sent = { key, id: uuid() };
  sessionStorage.setItem(SENT, JSON.stringify(sent));
  return sent.id;
}

/** The server has answered: sending the same again is meant. */
export function settled() {
  sessionStorage.removeItem(SENT);
}

/** Forget all this; whoever comes next in this tab may be somebody else. */
export function forget() {
  sessionStorage.removeItem(DRAFT);
  settled();
}

/** A random UUID; crypto.randomUUID is not there over plain HTTP from another machine. */
function uuid() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  bytes[6] = (bytes[6] & 0x0f) | 0x40; // version 4
  bytes[8] = (bytes[8] & 0x3f) | 0x80; // the variant of RFC 9562
  const hex = Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
  return hex.replace(/^(.{8})(.{4})(.{4})(.{4})/, "$1-$2-$3-$4-");
}
