// An answer as the server streams it: server-sent events, read with fetch, resumed after the last event seen whenever
// the connection breaks. EventSource would do most of this but hides why a stream was refused.

import { ApiError, openStream } from "./api.js";

const SILENCE = 60_000; // ms without a byte, keep-alive comments included, after which a connection counts as dead
const LONGEST_PAUSE = 8_000; // ms between two tries

/** The events of a stream, up to and with the one of type "ended".
 * `onConnection(false)` is called when the connection is lost, `onConnection(true)` when it is back.
 * Throws ApiError when the server refuses, so with code "not_found" when the stream is forgotten. */
export async function* follow(id, { signal, onConnection }) {
  let last = null;
  for (let pause = 500; ; pause = Math.min(2 * pause, LONGEST_PAUSE)) {
    try {
      const response = await openStream(id, last, signal);
      onConnection(true);
      for await (const event of events(response.body, signal)) {
        last = event.id;
        pause = 500;
        yield event.data;
        if (event.data.type === "ended") return;
      }
    } catch (problem) {
      if (signal.aborted || !isLoss(problem)) throw problem;
    }
    onConnection(false);
    await rest(pause, signal);
  }
}

function isLoss(problem) {
  return !(problem instanceof ApiError) || problem.code === "unreachable";
}

/** Parse a body into {id, data}; ends early when it stays silent. */
async function* events(body, signal) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let [unfinished, event] = ["", {}]; // the line that has not ended yet
  try {
    for (;;) {
      const chunk = await soon(reader.read());
      if (!chunk || chunk.done || signal.aborted) return;
      const lines = (unfinished + chunk.value).split(/\r?\n/);
      unfinished = lines.pop();
      for (const line of lines) {
        if (line.startsWith("id:")) event.id = line.slice(3).trim();
        else if (line.startsWith("data:")) event.data = JSON.parse(line.slice(5));
        else if (!line && event.data) {
          yield event;
          event = {};
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // it may be broken already
  }
}

function soon(promise) {
  let timer;
  const silence = new Promise((resolve) => (timer = setTimeout(resolve, SILENCE)));
  return Promise.race([promise, silence]).finally(() => clearTimeout(timer));
}

/** Wait, but not longer than until the network is back or the page is looked at again. */
function rest(pause, signal) {
  return new Promise((resolve, reject) => {
    const done = () => {
      clearTimeout(timer);
      for (const [target, name] of wakers) target.removeEventListener(name, done);
      signal.aborted ? reject(signal.reason) : resolve();
    };
    const wakers = [[window, "online"], [document, "visibilitychange"], [signal, "abort"]];
    const timer = setTimeout(done, pause);
    for (const [target, name] of wakers) target.addEventListener(name, done);
  });
}
