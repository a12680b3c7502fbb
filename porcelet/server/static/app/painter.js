// How often something that changes with every token is drawn.

const SHARE = 3; // drawing takes at most one part in this many of the time

/** {ask(), cancel()}: after ask(), `draw` runs with the next frame, or later where it was slow before. */
export function createPainter(draw) {
  let [timer, cost] = [0, 0];

  function run() {
    if (!timer) return; // cancelled meanwhile
    const begun = performance.now();
    timer = 0;
    draw();
    cost = performance.now() - begun;
  }

  return {
    ask() {
      timer ||= setTimeout(() => requestAnimationFrame(run), (SHARE - 1) * cost);
    },
    cancel() {
      clearTimeout(timer);
      timer = 0;
    },
  };
}
