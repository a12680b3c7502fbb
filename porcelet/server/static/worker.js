// The service worker: keeps a copy of the page itself (never of /api or of what a login answers), so that an installed
// porcelet opens and can say that its server is away. The network always comes first: a new version is never held back.

const CACHE = "porcelet-shell";
const isShell = ({ pathname }) => pathname === "/" || pathname.startsWith("/static/");

self.addEventListener("fetch", (event) => {
  const address = new URL(event.request.url);
  if (event.request.method !== "GET" || address.origin !== location.origin || !isShell(address)) return;
  event.respondWith(fromNetwork(event.request));
});

async function fromNetwork(request) {
  const cache = await caches.open(CACHE);
  try {
    const response = await fetch(request);
    if (response.ok && !response.redirected) await cache.put(request, response.clone());
    return response;
  } catch (problem) {
    const kept = await cache.match(request);
    if (!kept) throw problem;
    return kept;
  }
}
