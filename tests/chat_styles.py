# ruff: noqa: E501 (templates as they are published)
"""Tokenizers and chat templates as people publish them, small: name -> files of a folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from edgepress.models import EVALUATION_TEXT
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

Settings = dict[str, Any]


@cache
def _trained(kind: str) -> str:
    """A tokenizer of 600 pieces: "bytes" as GPT-2's and Llama 3's, "spaces" as Llama 2's and Gemma's."""
    text = EVALUATION_TEXT.read_text(encoding="utf-8")[:60_000]
    if kind == "bytes":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
        tokenizer.train_from_iterator([text], trainer)
        return tokenizer.to_str()
    codes = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=800, special_tokens=["<unk>", "<s>", "</s>", *codes], show_progress=False, max_token_length=8
    )
    tokenizer.train_from_iterator(text.split("\n"), trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if not token["content"].startswith("<0x")]
    return json.dumps(content)


def tokenizer(kind: str, special: tuple[str, ...], bos: str | None = None) -> Tokenizer:
    """A trained tokenizer with special tokens; bos: the one that it puts before each text."""
    made = Tokenizer.from_str(_trained(kind))
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    if bos:
        made.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, made.token_to_id(bos))]
        )
    return made


CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN = (
    "{%- if tools %}\n{{- tools | tojson }}\n{%- else %}\n    {%- if messages[0]['role'] == 'system' %}\n"
    "        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}\n    {%- else %}\n"
    "        {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}\n"
    '    {%- endif %}\n{%- endif %}\n{%- for message in messages %}\n    {%- if (message.role == "user") or (message.role == "system" '
    'and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}\n'
    "        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}\n    {%- endif %}\n{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}"
    "{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + "
    "message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
    "{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA31 = (
    "{{- bos_token }}\n{%- if custom_tools is defined %}\n    {%- set tools = custom_tools %}\n{%- endif %}\n"
    "{%- if tools is not none %}\n    {{- 'You have tools.' }}\n{%- endif %}\n{%- if documents is none %}{{- 'Nothing to read.' }}{%- endif %}\n"
    "{%- for message in messages %}\n    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] + '<|eot_id|>' }}\n"
    "{%- endfor %}\n{%- if add_generation_prompt %}\n    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n{%- endif %}\n"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}"
    "{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
PHI3 = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'assistant' %}"
    "{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
MISTRAL = (
    "{%- set ns = namespace(index=0) %}{{- bos_token }}{%- for message in messages %}{%- if message['role'] == 'user' %}"
    "{%- set ns.index = ns.index + 1 %}{{- '[INST] ' + message['content'] + '[/INST]' }}{%- elif message['role'] == 'assistant' %}"
    "{{- ' ' + message['content'] | trim + eos_token }}{%- else %}{{- message['content'] + '\n\n' }}{%- endif %}{%- endfor %}"
)
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'assistant' %}\n"
    "{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n{% if loop.last and add_generation_prompt %}\n"
    "{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
ALPACA = (
    "{% for message in messages %}{% if message['role'] == 'user' %}### Instruction:\n{{ message['content'] }}\n\n"
    "{% elif message['role'] == 'assistant' %}### Response:\n{{ message['content'] }}\n\n{% else %}{{ message['content'] }}\n\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}### Response:\n{% endif %}"
)
DIALOGPT = "{% for message in messages %}{{ message.content }}{{ eos_token }}{% endfor %}"
MARKED = (
    "{% macro turn(m) %}<|im_start|>{{ m.role }}: {{ m.content }}{% endmacro %}{% for m in messages %}{% if m.role == 'system' %}"
    "{% continue %}{% endif %}{% generation %}{{ turn(m) }}{% endgeneration %}{{ {'a': 'ä<'} | tojson }}{{ pad_token }}{{ unk_token }}{% endfor %}"
)

IM = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
HEADERS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
TURNS = ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>")


def token(content: str) -> Settings:
    """A special token as older tokenizer_config.json have it."""
    return {"__type": "AddedToken", "content": content, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}


def write(folder: Path, made: Tokenizer, settings: Settings | None, config: str = "llama", **files: str | Settings) -> None:
    made.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"model_type": config}))
    if settings is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    for name, content in files.items():
        file = folder / name.replace("__", "/").replace("_json", ".json").replace("_jinja", ".jinja")
        file.parent.mkdir(exist_ok=True)
        file.write_text(content if isinstance(content, str) else json.dumps(content))


FAST, BOS_EOS = {"tokenizer_class": "PreTrainedTokenizerFast"}, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def _vocabulary_and_merges(folder: Path) -> None:
    """As GPT-2 was first published: no tokenizer.json."""
    model = json.loads(_trained("bytes"))["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"] | {"<|endoftext|>": len(model["vocab"])}))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    (folder / "chat_template.jinja").write_text(DIALOGPT)


STYLES: dict[str, Callable[[Path], None]] = {
    "chatml": lambda f: write(
        f, tokenizer("bytes", IM), FAST | {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": CHATML}
    ),
    "llama-2": lambda f: write(
        f,
        tokenizer("spaces", (), "<s>"),
        BOS_EOS | {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "chat_template": LLAMA2},
    ),
    "llama-3, BOS by tokenizer and template": lambda f: write(
        f,
        tokenizer("bytes", HEADERS, "<|begin_of_text|>"),
        FAST | {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "chat_template": LLAMA3},
    ),
    "llama-3.1 asks for tools": lambda f: write(
        f,
        tokenizer("bytes", HEADERS, "<|begin_of_text|>"),
        FAST | {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "chat_template": LLAMA31},
    ),
    "gemma": lambda f: write(
        f,
        tokenizer("spaces", TURNS, "<bos>"),
        {"tokenizer_class": "GemmaTokenizer", "bos_token": "<bos>", "eos_token": "<eos>", "chat_template": GEMMA},
        "gemma",
    ),
    "phi-3": lambda f: write(
        f,
        tokenizer("spaces", ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")),
        BOS_EOS | {"tokenizer_class": "LlamaTokenizer", "eos_token": "<|endoftext|>", "chat_template": PHI3},
        "phi3",
    ),
    "mistral": lambda f: write(
        f,
        tokenizer("spaces", ("[INST]", "[/INST]"), "<s>"),
        BOS_EOS | {"tokenizer_class": "LlamaTokenizer", "chat_template": MISTRAL},
        "mistral",
    ),
    "zephyr": lambda f: write(
        f, tokenizer("spaces", (), "<s>"), BOS_EOS | {"tokenizer_class": "LlamaTokenizer", "chat_template": ZEPHYR}, "mistral"
    ),
    "alpaca": lambda f: write(f, tokenizer("spaces", (), "<s>"), BOS_EOS | FAST | {"chat_template": ALPACA}),
    "qwen with its own system message": lambda f: write(
        f,
        tokenizer("bytes", IM),
        {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": QWEN},
        "qwen2",
    ),
    "qwen under a general class": lambda f: write(
        f, tokenizer("bytes", IM), FAST | {"eos_token": "<|im_end|>", "chat_template": QWEN}, "qwen2"
    ),
    "chat_template.jinja goes first": lambda f: write(
        f, tokenizer("bytes", IM), FAST | {"eos_token": "<|im_end|>", "chat_template": ALPACA}, chat_template_jinja=CHATML
    ),
    "special_tokens_map.json alone": lambda f: write(
        f,
        tokenizer("spaces", (), "<s>"),
        FAST | {"chat_template": ZEPHYR},
        special_tokens_map_json=BOS_EOS | {"eos_token": token("</s>")},
    ),
    "special_tokens_map.json against tokenizer_config.json": lambda f: write(
        f,
        tokenizer("bytes", IM),
        FAST | {"eos_token": "<|endoftext|>", "chat_template": DIALOGPT},
        special_tokens_map_json={"eos_token": "<|im_end|>"},
    ),
    "the class of GPT-2 alone": lambda f: write(
        f, tokenizer("bytes", ("<|endoftext|>",)), {"tokenizer_class": "GPT2Tokenizer", "chat_template": DIALOGPT}, "gpt2"
    ),
    "no tokenizer_config.json": lambda f: write(
        f, tokenizer("bytes", ("<|endoftext|>",)), None, "gpt2", chat_template_jinja=DIALOGPT
    ),
    "special tokens of a text are split": lambda f: write(
        f, tokenizer("bytes", IM), FAST | {"eos_token": "<|im_end|>", "chat_template": CHATML, "split_special_tokens": True}
    ),
    "special tokens as dicts": lambda f: write(
        f, tokenizer("spaces", (), "<s>"), FAST | {k: token(v) for k, v in BOS_EOS.items()} | {"chat_template": ZEPHYR}
    ),
    "several named templates": lambda f: write(
        f,
        tokenizer("bytes", IM),
        FAST
        | {
            "eos_token": "<|im_end|>",
            "chat_template": [{"name": "tool_use", "template": ALPACA}, {"name": "default", "template": CHATML}],
        },
    ),
    "several template files": lambda f: write(
        f,
        tokenizer("bytes", IM),
        FAST | {"eos_token": "<|im_end|>"},
        chat_template_jinja=CHATML,
        additional_chat_templates__rag_jinja=ALPACA,
    ),
    "a default among the additional templates": lambda f: write(
        f, tokenizer("bytes", IM), FAST | {"eos_token": "<|im_end|>"}, additional_chat_templates__default_jinja=CHATML
    ),
    "tokens that only tokenizer_config.json adds": lambda f: write(
        f,
        tokenizer("bytes", IM[:1]),
        FAST
        | {"eos_token": "<|im_end|>", "chat_template": CHATML}
        | {
            "added_tokens_decoder": {
                str(601 + i): {k: v for k, v in token(t).items() if k != "__type"} | {"special": True} for i, t in enumerate(IM[1:])
            }
        },
    ),
    "tokens of its own by name": lambda f: write(
        f,
        tokenizer("bytes", (*IM, "<image>")),
        FAST
        | {
            "extra_special_tokens": {"image_token": "<image>"},
            "eos_token": "<|im_end|>",
            "chat_template": DIALOGPT + "{{ image_token }}",
        },
    ),
    "macros, marks and filters": lambda f: write(
        f, tokenizer("bytes", IM), FAST | {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": MARKED}
    ),
    "vocab.json and merges.txt alone": _vocabulary_and_merges,
}
