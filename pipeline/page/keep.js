// A service worker: keeps every file of this folder, so that the page works without a network after the first visit, and adds the
// headers without which a browser gives WebAssembly no threads. The version is that of the files: another one replaces all.
const SCOPE = self.registration.scope, PLACE = `edgepress ${SCOPE} `, CACHE = PLACE + "/* the version */";
const FILES = new Set(["", "keep.js", ...[] /* the files */].map(name => SCOPE + encodeURI(name)));
const HEADERS = {
  "Cross-Origin-Opener-Policy": "same-origin",
  "Cross-Origin-Embedder-Policy": "require-corp",
  "Cross-Origin-Resource-Policy": "same-origin",
};
// Of the worker, which has no other: nothing is loaded from elsewhere, and nothing sent there. The page says its own.
const POLICY = "default-src 'none'; script-src 'self' 'wasm-unsafe-eval' blob:; worker-src 'self' blob:; connect-src 'self' blob: data:";

// A new version waits until the last tab of the former one is closed: a page never has files of both.
self.addEventListener("activate", event => event.waitUntil((async () => {
  for (const name of await caches.keys()) if (name.startsWith(PLACE) && name !== CACHE) await caches.delete(name);
  await self.clients.claim();
})()));
self.addEventListener("fetch", event => {
  const file = event.request.url.split(/[?#]/)[0];
  if (event.request.method === "GET" && FILES.has(file)) event.respondWith(answer(event, file));
});

async function answer(event, file) {
  const cache = await caches.open(CACHE);
  let response = await cache.match(file);
  if (!response) {
    response = await fetch(file, { cache: "no-cache" });  // asked for anew: the browser's own cache may hold a former version
    // The disk may be full, or the browser grant too little of it: then the page needs the network again.
    if (response.status === 200) event.waitUntil(cache.put(file, response.clone()).catch(() => {}));
  }
  const headers = new Headers(response.headers);
  for (const [name, value] of Object.entries(HEADERS)) headers.set(name, value);
  if (event.request.mode !== "navigate") headers.set("Content-Security-Policy", POLICY);
  return new Response(response.body, { status: response.status, statusText: response.statusText, headers });
}
