"""Which folders are refused: no causal language model, no safetensors, an adapter, quantized, or Python code not trusted."""

from __future__ import annotations

import re
from pathlib import Path

from edgepress.pipeline.errors import ModelError
from edgepress.pipeline.files import JsonObject, read_json
from edgepress.pipeline.text.tokenizer_file import tokenizer_file

ADAPTER = "adapter_config.json"
READABLE = ("gptq", "bitsandbytes")  # third-party formats that export takes: importers/reader.py


def settings_of(folder: Path) -> JsonObject | None:
    """The quantization settings of a folder: from config.json, or AutoGPTQ's quantize_config.json; None for a float one.

    ``quant_method`` is always there, "?" where the folder does not say.
    """
    settings = read_json(folder / "config.json").get("quantization_config")
    if not settings and (folder / "quantize_config.json").is_file():
        settings = {"quant_method": "gptq"} | read_json(folder / "quantize_config.json")
    if not settings:
        return None
    if not isinstance(settings, dict):
        raise ModelError(f"{folder / 'config.json'}: quantization_config must be an object; correct it or fetch it again")
    return {"quant_method": "?"} | settings


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
    config = read_json(folder / "config.json")
    architectures = config.get("architectures") or []
    if architectures and not any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures):
        raise ModelError(
            f"{folder} holds {architectures[0]}, which is not a causal language model; give a ...ForCausalLM checkpoint"
        )
    if "model_type" not in config:
        raise ModelError(f"{folder / 'config.json'} has no model_type, so it is not a Hugging Face model; give another folder")
    if config.get("auto_map") and not trust_remote_code:
        raise ModelError(f"{folder} contains Python code to run; read it, and allow it with --trust-remote-code")
    if (settings := settings_of(folder)) is not None and not (quantized and settings["quant_method"] in READABLE):
        method = settings["quant_method"]
        way = ", or export it as it is" if method in READABLE else ""
        raise ModelError(f"{folder} is already quantized ({method}); give the original float checkpoint{way}")
    check_not_adapter(folder)
    tokenizer_file(folder)
    if any(folder.glob("*.safetensors")):
        return
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        raise ModelError(
            f"{folder} holds pickled weights, which can run code when read; convert them once, if you trust them: "
            f'python -c "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; '
            f"M.from_pretrained('{folder}').save_pretrained('NEW'); T.from_pretrained('{folder}').save_pretrained('NEW')\""
        )
    raise ModelError(f"{folder} has no weights (*.safetensors); give the complete checkpoint")
