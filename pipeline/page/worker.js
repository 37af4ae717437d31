// Runs the model: takes {messages, temperature, limit} or {stop}, answers {loading}, {ready}, {piece}, {end} or {failed}.
import { AutoModelForCausalLM, AutoTokenizer, InterruptableStoppingCriteria, TextStreamer, env } from "./lib/transformers.min.js";

const here = new URL("./", self.location.href).href;
const LONGEST = 1024, CONTEXT = 0 /* the context */;  // tokens of an answer where nothing else is said, and of a conversation
env.allowRemoteModels = false;
env.allowLocalModels = true;
env.localModelPath = new URL(here).pathname;
env.useBrowserCache = false;  // the service worker keeps the files
env.backends.onnx.wasm.wasmPaths = { mjs: `${here}lib/ort-wasm-simd-threaded.mjs`, wasm: `${here}lib/ort-wasm-simd-threaded.wasm` };
const cores = navigator.hardwareConcurrency || 2;
env.backends.onnx.wasm.numThreads = self.crossOriginIsolated ? Math.min(cores, Math.max(2, Math.ceil(cores / 2)), 8) : 1;

const stopping = new InterruptableStoppingCriteria();
let tokenizer, model, kept = null;  // kept: ids that were read, and their cache

async function load() {
  const progress_callback = ({ status, progress }) => {
    if (status === "progress_total") postMessage({ loading: Math.min(99, Math.floor(progress)) });  // the session is made after that
  };
  tokenizer = await AutoTokenizer.from_pretrained("model");
  model = await AutoModelForCausalLM.from_pretrained("model", { device: "wasm", progress_callback });
  // WebAssembly answers without a pause, in which alone a message, such as to stop, arrives here.
  const forward = model.forward.bind(model);
  model.forward = async inputs => { await pause(); return forward(inputs) };
  postMessage({ ready: true });
}

const pause = () => new Promise(resolve => {
  const { port1, port2 } = new MessageChannel();
  port1.onmessage = resolve;
  port2.postMessage(null);
});

// The ids of a conversation; of a model that has no chat template, of its texts.
function inputsOf(messages) {
  if (tokenizer.chat_template) return tokenizer.apply_chat_template(messages, { add_generation_prompt: true, return_dict: true });
  return tokenizer(messages.map(({ content }) => content).join("\n"));
}

async function answer({ messages, temperature, limit }) {
  const inputs = inputsOf(messages), ids = inputs.input_ids.tolist()[0];
  const room = CONTEXT - ids.length;
  if (room < 1) throw new Error("the conversation is longer than the model can read; begin a new one");
  const most = Math.min(Math.floor(limit) || LONGEST, room);
  const goesOn = kept && kept.ids.length < ids.length && kept.ids.every((id, index) => id === ids[index]);
  if (kept && !goesOn) await forget();
  const choice = temperature === null ? {} : temperature > 0 ? { do_sample: true, temperature } : { do_sample: false };
  let tokens = 0;
  const streamer = new TextStreamer(tokenizer, {
    skip_prompt: true, skip_special_tokens: true,
    callback_function: piece => { if (piece) postMessage({ piece }) },
    token_callback_function: () => { tokens += 1 },
  });
  stopping.reset();
  const past = kept?.cache ?? null, settings = { max_new_tokens: most, streamer, stopping_criteria: stopping };
  kept = null;  // whatever becomes of it
  const found = await model.generate({ ...inputs, ...choice, ...settings, return_dict_in_generate: true, past_key_values: past });
  const whole = found.sequences.tolist()[0];
  kept = { ids: whole.slice(0, -1), cache: found.past_key_values };  // the last token was not read
  postMessage({ end: { tokens, reason: tokens >= most ? "length" : "stop" } });
}

async function forget() {
  await kept.cache.dispose();
  kept = null;
}

const loading = load().catch(error => postMessage({ unusable: String(error.message ?? error) }));
self.onmessage = async ({ data }) => {
  if (data.stop) { stopping.interrupt(); return }
  await loading;
  try { await answer(data) } catch (error) { postMessage({ failed: String(error.message ?? error) }) }
};
