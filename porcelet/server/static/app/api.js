// The chat API: one function for each request the page makes. Nothing else in the page knows an address.

export class ApiError extends Error {
  /** `code` is the server's name of the problem, "unreachable" where there was no answer. */
  constructor(code, message, status = 0) {
    super(message);
    Object.assign(this, { name: "ApiError", code, status });
  }
}

let clockAhead = 0; // seconds by which the server's clock is ahead of this browser's

/** The time by the server's clock, in Unix seconds: what a message's `created` can be compared with. */
export function serverTime() {
  return Date.now() / 1000 + clockAhead;
}

export const session = () => json("GET", "/api/session");
export const logIn = (key) => request("POST", "/login", { body: { key } });
export const logOut = () => request("POST", "/logout");

export function conversations({ query = "", cursor = null, limit = 50, signal } = {}) {
  const search = new URLSearchParams({ q: query, limit, ...(cursor && { cursor }) });
  return json("GET", `/api/conversations?${search}`, { signal });
}
export const conversation = (id, signal) => json("GET", `/api/conversations/${id}`, { signal });
export const createConversation = () => json("POST", "/api/conversations", { body: {} });
export const changeConversation = (id, change) => json("PATCH", `/api/conversations/${id}`, { body: change });
export const deleteConversation = (id) => request("DELETE", `/api/conversations/${id}`);
export const deleteConversations = () => request("DELETE", "/api/conversations");
export const exportAddress = (id, format, language) =>
  `/api/conversations/${id}/export?format=${format}&language=${language}`;
export const exportAllAddress = "/api/export";

export const postMessage = (id, message) => json("POST", `/api/conversations/${id}/messages`, { body: message });
export const regenerate = (id, choice) => json("POST", `/api/messages/${id}/regenerate`, { body: choice });
export const stopStream = (id) => request("POST", `/api/streams/${id}/stop`);

/** Have the server read a file, for a model whose context it must fit. */
export function uploadFile(file, model, signal) {
  const address = `/api/files?${new URLSearchParams({ name: file.name, model })}`;
  return json("POST", address, { raw: file, signal });
}

/** The answer to reading a stream, after event `last` where one was seen. */
export function openStream(id, last, signal) {
  const headers = last === null ? {} : { "Last-Event-ID": last };
  return request("GET", `/api/streams/${id}`, { headers, signal });
}

async function json(method, address, options) {
  return (await request(method, address, options)).json();
}

async function request(method, address, { body, raw, headers = {}, signal } = {}) {
  const content = raw ?? (body && JSON.stringify(body));
  const type = raw ? "application/octet-stream" : "application/json";
  if (content) headers = { ...headers, "Content-Type": type };
  let response;
  try {
    response = await fetch(address, { method, headers, body: content, signal });
  } catch (problem) {
    if (problem.name === "AbortError") throw problem;
    throw new ApiError("unreachable", problem.message);
  }
  const date = Date.parse(response.headers.get("Date"));
  if (date) clockAhead = date / 1000 - Date.now() / 1000;
  if (!response.ok) throw await refusal(response, address);
  return response;
}

async function refusal(response, address) {
  if (response.status === 401 && address !== "/login") location.assign("/login");
  const { error } = await response.json().catch(() => ({}));
  return new ApiError(error?.code ?? "other", error?.message ?? response.statusText, response.status);
}
