// Answers come from the model beside this page, in a worker of the browser: nothing that is written here leaves the machine.
$("key").closest("label").remove();
let worker = null, loaded = false, failure = null, told = () => {};
const engine = {
  failed: error => error.message,

  async name() {
    if (location.protocol === "file:") throw new Error("open this page through a web server, such as python3 -m http.server");
    await isolated();
    worker = new Worker("worker.js", { type: "module" });
    return new Promise((resolve, reject) => {
      const fail = text => { failure = `the model could not be loaded (${text})`; reject(new Error(failure)); told({ failed: text }) };
      worker.onerror = event => fail(event.message || "the browser cannot run it");
      worker.onmessage = ({ data }) => {
        if (data.loading !== undefined) $("model").textContent = `${document.title}: loading, ${data.loading} %`;
        else if (data.failed && !loaded) fail(data.failed);
        else if (data.ready) { loaded = true; resolve(document.title) }
        else told(data);
      };
    });
  },

  async *answer(messages, settings, signal) {
    if (failure) throw new Error(failure);
    if (!loaded) throw new Error("the model is still being loaded; try again in a moment");
    const queue = [];
    let wake = () => {};
    told = data => { queue.push(data); wake() };
    signal.addEventListener("abort", () => worker.postMessage({ stop: true }));
    worker.postMessage({ messages, ...settings });
    for (;;) {
      if (!queue.length) await new Promise(resolve => { wake = resolve });
      const data = queue.shift();
      if (data.failed) throw new Error(data.failed);
      if (data.piece) yield data.piece;
      if (data.end) {
        if (signal.aborted) throw new DOMException("stopped", "AbortError");
        return data.end;
      }
    }
  },
};

// The service worker keeps all files for later visits without a network, and sends the headers that let the model use several
// threads. It rules the page from its second load on, so the first visit loads it again before the model.
async function isolated() {
  if (!navigator.serviceWorker) return;
  try {
    await navigator.serviceWorker.register("keep.js");
    await navigator.serviceWorker.ready;
    const mark = `edgepress.loaded ${location.pathname}`;
    if (crossOriginIsolated || sessionStorage.getItem(mark)) return;
    sessionStorage.setItem(mark, "1");
    location.reload();
    await new Promise(() => {});
  } catch { /* refused: one thread, and only with a network */ }
}
