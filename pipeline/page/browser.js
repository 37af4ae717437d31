// Answers come from the model beside this page, in a worker of the browser: nothing that is written here leaves the machine.
$("key").closest("label").remove();
let worker = null, told = () => {}, settle;
const load = new Promise((resolve, reject) => { settle = { resolve, reject } });
load.catch(() => {});
const engine = {
  failed: error => error.message,

  name() {
    start().catch(error => settle.reject(error));
    return load;
  },

  async *answer(messages, settings, signal) {
    const stopped = new Promise((_, reject) => signal.addEventListener("abort", () => reject(new DOMException("stopped", "AbortError"))));
    stopped.catch(() => {});
    await Promise.race([load, stopped]);
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

async function start() {
  if (location.protocol === "file:") throw new Error("open this page through a web server, such as python3 -m http.server");
  await isolated();
  const fail = text => { settle.reject(new Error(`the model cannot be loaded (${text})`)); told({ failed: text }) };
  worker = new Worker("worker.js", { type: "module" });
  worker.onerror = event => fail(event.message || "the browser cannot run it");
  worker.onmessage = ({ data }) => {
    if (data.loading !== undefined) $("model").textContent = `${document.title}: loading, ${data.loading} %`;
    else if (data.ready) settle.resolve(document.title);
    else if (data.unusable) fail(data.unusable);
    else told(data);
  };
}

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
