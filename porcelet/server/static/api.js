// The server's API as this page uses it.

/** An error with the server's own words; `kind` chooses the page's. */
export class ApiError extends Error {
  constructor(kind, message) {
    super(message);
    this.kind = kind;
  }
}

/** The name of the served model. */
export async function servedModel() {
  const response = await request("/v1/models", {});
  return (await response.json()).data[0].id;
}

/** Yields the events of a streamed answer as they arrive; aborting `signal` ends it. */
export async function* streamAnswer(model, messages, signal) {
  const body = { model, messages, max_tokens: 2048, temperature: 0.6, top_p: 0.95, stream: true, stream_options: { include_usage: true } };
  const headers = { "Content-Type": "application/json" };
  const response = await request("/v1/chat/completions", { method: "POST", headers, body: JSON.stringify(body), signal });
  let ended = false;
  for await (const data of events(response.body)) {
    ended = data === "[DONE]";
    if (ended) continue;
    const event = JSON.parse(data);
    if (event.error) throw new ApiError(event.error.type, event.error.message);
    yield event;
  }
  if (!ended) throw new ApiError("unreachable", "");
}

async function request(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (problem) {
    if (problem.name === "AbortError") throw problem;
    throw new ApiError("unreachable", "");
  }
  if (response.ok) return response;
  const { error } = await response.json();
  throw new ApiError(error.type, error.message);
}

/** The data of each server-sent event in a body. */
async function* events(body) {
  let rest = "";
  for await (const piece of pieces(body)) {
    const parts = (rest + piece).split("\n\n");
    rest = parts.pop();
    for (const part of parts) if (part.startsWith("data: ")) yield part.slice(6);
  }
}

/** A body's text as it arrives; losing the connection is an error like any other. */
async function* pieces(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      yield value;
    }
  } catch (problem) {
    if (problem.name === "AbortError") throw problem;
    throw new ApiError("unreachable", "");
  }
}
