"""Which folders are refused: no causal model, no safetensors, no tokenizer, adapters, quantized ones, code or links not trusted."""

from __future__ import annotations

import logging
import os
import re
from functools import cache
from pathlib import Path

from edgepress.pipeline.checkpoint.shards import shards
from edgepress.pipeline.errors import ModelError
from edgepress.pipeline.files import JsonObject, leads_out, read_json
from edgepress.pipeline.model_files import check_files, check_model_type, end_tokens, read_config

log = logging.getLogger("edgepress")
ADAPTER = "adapter_config.json"

READABLE = ("gptq", "bitsandbytes")  # third-party formats that export takes: importers/reader.py
# Keys of a config at which transformers takes "owner/repository" and runs a kernel from there.
_KERNELS = ("attn_implementation", "experts_implementation")


def settings_of(folder: Path) -> JsonObject | None:
    """The quantization settings of a folder: from config.json, or AutoGPTQ's quantize_config.json; None for a float one.

    ``quant_method`` is always there, "?" where the folder does not say.
    """
    settings: JsonObject | None = read_config(folder).get("quantization_config")
    if not settings and (folder / "quantize_config.json").is_file():
        settings = {"quant_method": "gptq"} | read_json(folder / "quantize_config.json")
    if not settings:
        return None
    return {"quant_method": "?"} | settings


def check_code(folder: Path, config: JsonObject, trust_remote_code: bool) -> None:
    """Refuse a config at which transformers runs code that is not its own, or reads another file. Raises ModelError."""
    if not trust_remote_code and _names_code(config):
        raise ModelError(f"{folder} contains Python code to run; read it, and allow it with --trust-remote-code")
    if config.get("configuration_files") not in (None, [], ["config.json"]):
        raise ModelError(
            f"{folder / 'config.json'} names other configs for other versions of transformers (configuration_files), and edgepress "
            "reads this one alone; delete that key where this one is right"
        )


def _names_code(value: object) -> bool:
    """Whether a config or a part of it has an ``auto_map`` or a kernel of somebody's repository."""
    if isinstance(value, list):
        return any(map(_names_code, value))
    if not isinstance(value, dict):
        return False
    kernels = [content for key, content in value.items() if str(key).endswith(_KERNELS)]
    return bool(value.get("auto_map")) or any("/" in str(kernel) for kernel in kernels) or any(map(_names_code, value.values()))


def check_links(folder: Path) -> None:
    """Refuse links that lead out of a checkpoint: what they lead to would be copied into what is built from it.

    Weights may lie elsewhere; the log names the place. Raises ModelError.
    """
    for file in sorted([*folder.iterdir(), *(folder / "additional_chat_templates").glob("*")]):
        if leads_out(folder, file):
            if file.suffix != ".safetensors":
                raise ModelError(
                    f"{file} is a link to {os.path.realpath(file)}, outside of the checkpoint; give a copy made with cp -rL, "
                    "or delete the link"
                )
            _name(file)


@cache  # a build checks its source more than once
def _name(file: Path) -> None:
    log.info("%s is a link: the weights are read from %s", file, os.path.realpath(file))


def check_not_adapter(folder: Path) -> None:
    """Refuse a folder with the adapter of another tool, alone or beside a model, to which transformers would add it.

    Raises ModelError that says how to merge it.
    """
    if not (folder / ADAPTER).is_file():
        return
    weights = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
    base = read_json(folder / ADAPTER).get("base_model_name_or_path")
    if any(not file.name.startswith("adapter_") for file in weights):
        what = "a model and an adapter that changes it; move the adapter to a folder ADAPTER, call the rest BASE, and"
        base, place = "BASE", "ADAPTER"
    else:
        what, place = "an adapter, which is no model by itself;", str(folder)
        if not (isinstance(base, str) and re.fullmatch(r"[\w./-]+", base)):  # what it says otherwise goes into no command
            base = "BASE"
    raise ModelError(
        f'{folder} holds {what} merge it first, so: python -c "from transformers import AutoModelForCausalLM as M, '
        f"AutoTokenizer as T; from peft import PeftModel as P; P.from_pretrained(M.from_pretrained('{base}'), '{place}')"
        f".merge_and_unload().save_pretrained('NEW'); T.from_pretrained('{base}').save_pretrained('NEW')\"; then give NEW"
    )


def check_checkpoint(folder: Path, trust_remote_code: bool, quantized: bool = False) -> None:
    """Refuse, before anything is written, a folder that is not a causal language model in safetensors. Raises ModelError.

    quantized: accept one that GPTQ or bitsandbytes quantized.
    """
    check_links(folder)
    check_files(folder)
    config = read_config(folder)
    end_tokens(folder)
    architectures = config.get("architectures") or []
    if architectures and not any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures):
        raise ModelError(
            f"{folder} holds {architectures[0]}, which is not a causal language model; give a ...ForCausalLM checkpoint"
        )
    check_model_type(folder, config)
    check_code(folder, config, trust_remote_code)
    if (settings := settings_of(folder)) is not None and not (quantized and settings["quant_method"] in READABLE):
        method = settings["quant_method"]
        way = ", or export it as it is" if method in READABLE else ""
        raise ModelError(f"{folder} is already quantized ({method}); give the original float checkpoint{way}")
    check_not_adapter(folder)
    if any(folder.glob("*.safetensors")):
        shards(folder)
        if not (folder / "tokenizer.json").is_file():  # transformers may make one of other files
            from edgepress.pipeline.text.windows import load_tokenizer  # numpy, which --help does without

            load_tokenizer(folder)
        return
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        raise ModelError(
            f"{folder} holds pickled weights, which can run code when read; convert them once, if you trust them: "
            f'python -c "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; '
            f"M.from_pretrained('{folder}').save_pretrained('NEW'); T.from_pretrained('{folder}').save_pretrained('NEW')\""
        )
    raise ModelError(f"{folder} has no weights (*.safetensors); give the complete checkpoint")
