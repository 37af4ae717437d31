// What transformers.js makes of artifact folders under node: node node_side.mjs JOBS.json (prints one JSON list of answers).

import { readFileSync } from "node:fs";
import path from "node:path";
import { AutoModelForCausalLM, AutoTokenizer, env } from "@huggingface/transformers";

env.allowRemoteModels = false;
const answers = [];
for (const job of JSON.parse(readFileSync(process.argv[2], "utf8"))) {
  env.localModelPath = `${path.dirname(job.folder)}/`;
  const name = path.basename(job.folder);
  const tokenizer = await AutoTokenizer.from_pretrained(name);
  const model = await AutoModelForCausalLM.from_pretrained(name);
  const inputs = tokenizer(job.text);
  const length = inputs.input_ids.dims[1];
  const output = await model.generate({ ...inputs, max_new_tokens: job.count, min_new_tokens: job.count, do_sample: false });
  const ids = output.tolist()[0].map(Number);
  const chat = job.messages && tokenizer.apply_chat_template(job.messages, { tokenize: false, add_generation_prompt: true });
  answers.push({ ids: ids.slice(0, length), generated: ids.slice(length), chat });
  await model.dispose();
}
console.log(JSON.stringify(answers));
