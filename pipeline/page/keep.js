// A service worker: keeps every file of this folder, so that the page works without a network after the first visit, and adds the
// headers without which a browser gives WebAssembly no threads. The version is that of the files: another one replaces all.
const PLACE = `edgepress ${self.registration.scope} `, CACHE = PLACE + "/* the version */";
const HEADERS = {
  "Cross-Origin-Opener-Policy": "same-origin",
  "Cross-Origin-Embedder-Policy": "require-corp",
  "Cross-Origin-Resource-Policy": "same-origin",
};

// A new version waits until the last tab of the former one is closed: a page never has files of both.
self.addEventListener("activate", event => event.waitUntil((async () => {
  for (const name of await caches.keys()) if (name.startsWith(PLACE) && name !== CACHE) await caches.delete(name);
  await self.clients.claim();
})()));
self.addEventListener("fetch", event => {
  const { method, url } = event.request;
  if (method === "GET" && url.startsWith(self.registration.scope)) event.respondWith(answer(event));
});

async function answer(event) {
  const cache = await caches.open(CACHE);
  let response = await cache.match(event.request, { ignoreSearch: true });
  if (!response) {
    response = await fetch(event.request);
    // The disk may be full, or the browser grant too little of it: then the page needs the network again.
    if (response.status === 200) event.waitUntil(cache.put(event.request, response.clone()).catch(() => {}));
  }
  const headers = new Headers(response.headers);
  for (const [name, value] of Object.entries(HEADERS)) headers.set(name, value);
  return new Response(response.body, { status: response.status, statusText: response.statusText, headers });
}
