"""Where the tokenizer of a folder is, and how to make one of what is there instead."""

from __future__ import annotations

from pathlib import Path

from edgepress.pipeline.errors import ModelError

# What transformers can make a tokenizer.json of.
_OTHERS = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tiktoken.model")


def tokenizer_file(folder: Path) -> Path:
    """``folder/tokenizer.json``. Raises ModelError that says how to make it where it is not."""
    file = folder / "tokenizer.json"
    if file.is_file():
        return file
    other = next((name for name in _OTHERS if (folder / name).is_file()), None)
    if other is None:
        raise ModelError(f"{folder} has no tokenizer (tokenizer.json); give the complete checkpoint")
    raise ModelError(
        f'{folder} has no tokenizer.json; make one of its {other}: python -c "from transformers import AutoTokenizer as T; '
        f"T.from_pretrained('{folder}').save_pretrained('{folder}')\""
    )
