// What a browser makes of artifact folders: node browser_side.mjs JOBS.json (prints one JSON list of answers). A job with questions
// asks them on a page, that of its folder also without a network, or that of a server; any other generates greedily.

import { createReadStream, existsSync, readFileSync, statSync } from "node:fs";
import http from "node:http";
import path from "node:path";
import { chromium } from "playwright-core";

const { chromium: program, modules, jobs } = JSON.parse(readFileSync(process.argv[2], "utf8"));
const TYPES = { ".mjs": "text/javascript", ".js": "text/javascript", ".html": "text/html", ".wasm": "application/wasm" };
// Without these a browser gives WebAssembly one thread. A page has them from its service worker.
const ISOLATED = { "Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp" };
const BLANK = "<!doctype html><title>generate</title>";
const server = http.createServer((request, response) => {
  const [, number, ...rest] = decodeURIComponent(request.url.split("?")[0]).split("/");
  if (number === "blank") return response.writeHead(200, { "content-type": "text/html", ...ISOLATED }).end(BLANK);
  const base = number === "modules" ? modules : jobs[number]?.folder;
  const file = base && path.join(base, rest.join("/") || "index.html");
  if (!file || !existsSync(file) || !statSync(file).isFile()) return response.writeHead(404).end();
  response.writeHead(200, { "content-type": TYPES[path.extname(file)] ?? "application/octet-stream", "content-length": statSync(file).size });
  createReadStream(file).pipe(response);
});
await new Promise(resolve => server.listen(0, "127.0.0.1", resolve));
const root = `http://localhost:${server.address().port}/`;
const browser = await chromium.launch({ executablePath: program, args: ["--no-sandbox"] });

async function generated(page, number, { text, count, threads = 0, timed = 0 }) {
  await page.goto(`${root}blank`);
  return page.evaluate(async ([root, number, text, count, threads, timed]) => {
    const { AutoModelForCausalLM, AutoTokenizer, env } = await import(`${root}modules/@huggingface/transformers/dist/transformers.min.js`);
    Object.assign(env, { allowRemoteModels: false, allowLocalModels: true, localModelPath: "/", useBrowserCache: false });
    const wasm = `${root}modules/onnxruntime-web/dist/ort-wasm-simd-threaded`;
    env.backends.onnx.wasm.wasmPaths = { mjs: `${wasm}.mjs`, wasm: `${wasm}.wasm` };
    if (threads) env.backends.onnx.wasm.numThreads = threads;
    const tokenizer = await AutoTokenizer.from_pretrained(number), inputs = tokenizer(text);
    const model = await AutoModelForCausalLM.from_pretrained(number, { device: "wasm" });
    const run = tokens => model.generate({ ...inputs, max_new_tokens: tokens, min_new_tokens: tokens, do_sample: false });
    const output = await run(count), rates = [], firsts = [];
    for (let round = 0; round < timed; round++) {
      const begun = performance.now();
      await run(1);
      const first = performance.now() - begun;
      await run(count + 1);
      firsts.push(first);
      rates.push(1000 * count / (performance.now() - begun - 2 * first));
    }
    return { generated: output.tolist()[0].map(Number).slice(inputs.input_ids.dims[1]), rates, firsts };
  }, [root, String(number), text, count, threads, timed]);
}

const loaded = page => page.waitForFunction(() => !/loading|^edgepress$/.test(document.querySelector("#model").textContent));

async function asked(page, question) {
  await page.fill("#text", question);
  await page.press("#text", "Enter");
  await page.waitForFunction(() => document.querySelector("#send").textContent === "Send");
  return page.locator("article").last().innerText();
}

async function chatted(page, number, { questions, address }) {
  const errors = [];
  page.on("pageerror", error => errors.push(String(error)));
  await page.goto(address ?? root + `${number}/`);
  await loaded(page);
  const title = await page.innerText("#model"), isolated = await page.evaluate(() => crossOriginIsolated), answers = [];
  for (const question of questions) answers.push(await asked(page, question));
  // Stopped in the middle: what was written by then is kept.
  await page.click("#new");
  await page.fill("#text", "Write a long story about a fox.");
  await page.press("#text", "Enter");
  await page.waitForFunction(() => document.querySelector("article:last-child p")?.textContent.length > 10 || document.querySelector(".error"));
  const begun = await page.evaluate(() => document.querySelector("article:last-child p")?.textContent.length ?? 0);
  await page.keyboard.press("Escape");
  await page.waitForFunction(() => document.querySelector("#send").textContent === "Send");
  const stopped = { begun, answer: await page.locator("article").last().innerText() };
  const widths = [];
  for (const width of [360, 1366]) {
    await page.setViewportSize({ width, height: 700 });
    widths.push(await page.evaluate(() => document.documentElement.scrollWidth));
  }
  if (address) return { title, isolated, answers, stopped, widths, errors };
  await page.context().setOffline(true);
  await page.reload();
  await loaded(page);
  await page.click("#new");
  return { title, isolated, answers, stopped, widths, errors, offline: await asked(page, questions[0]) };
}

const answers = [];
for (const [number, job] of jobs.entries()) {
  const context = await browser.newContext();
  const page = await context.newPage();
  page.setDefaultTimeout(120000);
  answers.push(await (job.questions ? chatted : generated)(page, number, job));
  await context.close();
}
await browser.close();
server.close();
console.log(JSON.stringify(answers));
