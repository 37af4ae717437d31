"""What optimum and transformers 4 make of artifact folders; run by .venv-optimum, which holds neither edgepress nor pytest.

python optimum_side.py JOBS.json     (a list of jobs; prints one JSON list of answers)
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoConfig, AutoTokenizer


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """job: folder, text, messages or None, and ids with count to generate from them (or None)."""
    folder = job["folder"]
    config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(job["text"])["input_ids"]
    scaling = getattr(config, "rope_scaling", None)
    found: dict[str, Any] = {
        "transformers": transformers.__version__,
        "tokenizer": type(tokenizer).__name__,
        "ids": ids,
        "text": tokenizer.decode(ids, skip_special_tokens=True),
        "special": tokenizer.all_special_tokens,
        "layers": config.num_hidden_layers,
        "rope_theta": getattr(config, "rope_theta", None),
        "rope_scaling": scaling and {key: value for key, value in scaling.items() if key != "type"},
        "dtype": str(config.dtype).removeprefix("torch."),
    }
    if job["messages"]:
        found["chat"] = tokenizer.apply_chat_template(job["messages"], tokenize=False, add_generation_prompt=True)
    if job["ids"]:
        model = ORTModelForCausalLM.from_pretrained(folder, use_io_binding=False)
        prompt = torch.tensor([job["ids"]])
        settings = {"max_new_tokens": job["count"], "min_new_tokens": job["count"], "do_sample": False, "pad_token_id": 0}
        made = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
        found["generated"] = made[0, prompt.shape[1] :].tolist()
    return found


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    print(json.dumps([answer(job) for job in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))]))
