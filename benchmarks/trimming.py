"""What trimming the vocabulary costs: one checkpoint with fewer and fewer tokens, in bits a byte of several texts.

    python benchmarks/trimming.py CHECKPOINT --text wiki.txt --text code.py [--keep-tokens 97000,52000] [--languages en]
        [--keep-text FILE] [--characters 16000]

No weight is changed but by leaving rows out. A text has more tokens then, because what is gone is written in shorter ones; a token
costs less, because the head is read whole for each.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from edgepress.pipeline import stages
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.flags import make
from edgepress.pipeline.machine import release_memory
from edgepress.pipeline.metrics.bits import BitsPerByte, bits_per_byte
from edgepress.pipeline.options import TrimOptions
from edgepress.pipeline.text.reading import read_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--text", type=Path, action="append", required=True)
    parser.add_argument("--keep-tokens", default="", help="one row for each number, separated by commas")
    parser.add_argument("--languages", default="")
    parser.add_argument("--keep-text", default="")
    parser.add_argument("--characters", type=int, default=16_000, help="of each text (default: %(default)s)")
    parser.add_argument("--skip", type=int, default=0, help="characters to leave out first, which others may have read")
    parser.add_argument("--work", type=Path, default=Path("out/trimming"), help="folder of the trimmed checkpoints")
    options = parser.parse_args()
    source = stages.source_of(options.checkpoint)
    texts = {text.stem: read_text(text)[options.skip :][: options.characters] for text in options.text}
    whole = scored(source.path, texts)
    rows = Checkpoint(source.path).meta_model().get_input_embeddings().num_embeddings
    print("| tokens | of them |" + "".join(f" {name}: bits a byte | its tokens |" for name in texts) + " decodes every text |")
    print("| ---: | ---: |" + " ---: |" * (2 * len(texts)) + " --- |")
    print(f"| {rows:,} | 100 % |" + "".join(f" {one.bits:.4f} | {one.tokens:,} |" for one in whole.values()) + " |", flush=True)
    for count in options.keep_tokens.split(",") if options.keep_tokens else [""]:
        values = {"keep_tokens": count, "languages": options.languages, "keep_text": options.keep_text}
        out = options.work / f"{source.identity()[:12]}-{count or 'all'}-{options.languages or 'any'}"
        trimmed = stages.run("trim", source, out, make(TrimOptions, {key: value for key, value in values.items() if value}))
        kept = trimmed.steps[-1].facts["vocabulary"][1]
        found = scored(out, texts)
        cells = (
            f" {one.bits:.4f} ({growth(one.bits, whole[name].bits)}) | {growth(one.tokens, whole[name].tokens)} |"
            for name, one in found.items()
        )
        same = all(decoded(out, text) == decoded(source.path, text) for text in texts.values())
        print(f"| {kept:,} | {100 * kept / rows:.0f} % |{''.join(cells)} {'yes' if same else 'NO'} |", flush=True)
        shutil.rmtree(out)


def growth(after: float, before: float) -> str:
    return f"{100 * (after / before - 1):+.1f} %"


def scored(folder: Path, texts: dict[str, str]) -> dict[str, BitsPerByte]:
    checkpoint = Checkpoint(folder)
    model = checkpoint.model()
    found = {name: bits_per_byte(model, checkpoint.tokenizer, text) for name, text in texts.items()}
    del model
    release_memory()
    return found


def decoded(folder: Path, text: str) -> str:
    tokenizer = Checkpoint(folder).tokenizer
    return tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids)


if __name__ == "__main__":
    main()
