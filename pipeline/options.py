"""The options of every stage, once: from here come the flags, the recipe keys, their checks and their help."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgepress.models import CALIBRATION_TEXT, EVALUATION_TEXT, OTHER_TEXT, PROMPTS
from edgepress.pipeline.errors import OptionError
from edgepress.pipeline.flags import Options, flag, option
from edgepress.pipeline.methods import ACT_ORDER, ADJUSTABLE, BITS, GROUP_SIZES, METHODS, defaults_of_group_size, joined
from edgepress.pipeline.registry import look_up

# Of tune: parameters times tokens that two cores train on in a minute, and the longest text that is written for it.
READ_A_MINUTE, MOST_OWN_TOKENS = 1.8e12, 1 << 17
PRUNE_TOKENS = 32768
ORIGINAL_ROUNDS = 3  # in which the original's speed is measured, at most: it is slower than what is made of it
HEALED_TOKENS = 4  # that a trial's healing is solved on, for each that it is measured on
# As calibration text: what the model itself writes, and that with the shipped prose and technical prose.
SELF, MIXED = Path("self"), Path("mixed")
WRITTEN = (SELF, MIXED)
NONE = "none"  # of --rare-rows
OWN_TOKENS = 6144  # that the model writes for MIXED, and to be judged by; of the shipped texts as many
MIXTURE = 2  # counts what MIXED was made of
COST_TOKENS = 4096  # that show what each matrix costs
SAMPLER = 4  # to be raised when own_text/ writes other ids than before
CRITERIA = {
    "healed": "one after another, of those of lowest Block Influence the one whose removal costs the least KL when healed",
    "greedy": "the same, but as the model is without healing",
    "bi": "the lowest Block Influence, as in ShortGPT",
    "angular": "the contiguous run of least angular distance",
    "list": "those named by --remove-layers",
}
BLOCKS = "blocks"
# What prune removes. But for whole blocks the keys of models.families.PARTS, which would load transformers.
REMOVABLE = {
    BLOCKS: "whole decoder blocks",
    "attention": "the attention of some blocks, whose feed-forward part stays",
    "feed-forward": "the feed-forward part of some blocks, whose attention stays",
}
HEALERS = {
    "none": "leave it as it is",
    "linear": "closed form: the matrix before each gap learns to write what the removed layers wrote",
    "lora": "distillation: low-rank changes of the kept blocks, trained towards the original's logits, merged",
    "linear+lora": "one after the other",
}
EXPORTERS = {
    "auto": "fused where the architecture allows, else portable",
    "fused": "GroupQueryAttention, packed QKV, fused gate and up",
    "portable": "standard ONNX operators",
}
LEVELS = {
    "auto": "4 if it is faster on this machine and adds little to what was lost already, else 0",
    "4": "int8: fast",
    "0": "float32: exact",
}
PLAIN, NODE = "plain", "transformers-js"
LAYOUTS = {
    PLAIN: "model.onnx and its weights beside it",
    NODE: "the weights below onnx/, where transformers.js under node finds them too; all others read the same folder",
}
LOGITS = {
    "last": "those of the last position, unless a consumer asks for more",
    "all": "those of every position, which n-gram decoding of onnxruntime-genai needs; its prompts take more memory",
}
INT8 = "int8"
CACHES = {
    "float": "as the activations",
    INT8: "a quarter of the memory, and faster where the text is long; on the CPU, not for optimum and transformers.js",
}
WEB = "web"
TARGETS = {
    "cpu": "onnxruntime on the CPU",
    "cuda": "onnxruntime-gpu on an NVIDIA GPU, in float16",
    WEB: "browsers, by transformers.js: 8 bits and one scale a row; measured by onnxruntime on the CPU",
}


def _calibration(usual: Path = CALIBRATION_TEXT) -> Path:
    return option(  # its help says all defaults, for build shows that of the first stage alone
        usual, "calibration text: .txt, .jsonl, .json or .csv, or 'self': what the model itself writes, sampled once, or 'mixed': "
        "that, the shipped prose and technical prose (default: 'mixed' to choose bits and to quantize, 'self' to tune, else the "
        "shipped calibration.txt)",
    )  # fmt: skip


def _calibration_model() -> Path | None:
    return option(None, "the model that writes for --calibration self and mixed (default: SRC or --original; in a build its SRC)")


def _check_model(calibration: Path, model: Path | None) -> None:
    if model is not None and calibration not in WRITTEN:
        raise OptionError("--calibration-model is the model that writes for --calibration self or mixed; give both or neither")


def sampler() -> str:
    """What of ``--calibration self`` is neither the model's nor an option: the sampler's version, and the prompts."""
    return f"{SAMPLER}-{hashlib.sha256(PROMPTS.read_bytes()).hexdigest()[:16]}"


def _text_key() -> str:
    return option("text", "field of .jsonl, .json and .csv files that has the text, or chat messages")


def _calibration_tokens() -> int:
    return option(32768, "calibration tokens at most", at_least=16)


def _shared_tokens(held_out: str) -> int | None:
    text = f"calibration tokens; the last quarter {held_out} (default: {PRUNE_TOKENS}, or all there are)"
    return option(None, text, at_least=64)


def _calibration_skip() -> int:
    return option(0, "tokens of the calibration text to leave out at its beginning", at_least=0)


def _other_text() -> Path:
    return option(
        OTHER_TEXT, "text of another kind that removal and healing are judged on, too (default: the shipped technical prose)"
    )


def _text() -> Path:
    return option(EVALUATION_TEXT, "text that quality is measured on (default: the shipped evaluation.txt)")


def _text_tokens() -> int:
    return option(16000, "tokens of that text to use at most", at_least=16)


def _threads() -> int:
    return option(0, "threads; 0 leaves the choice to onnxruntime", at_least=0)


def _lookup() -> str:
    return option(
        "auto",
        "read several tokens in one pass where the text repeats what stood in it before",
        choices={"auto": "as many as pay by the guesses that came true so far", "off": "one after the other"},
    )


def _trust() -> bool:
    return option(False, "run the Python code that the checkpoint brings; read it first")


def _target() -> str:
    return option("cpu", "what the artifact is for", TARGETS)


@dataclass(frozen=True)
class ImportOptions(Options):
    """Turn a GGUF file into a plain Hugging Face checkpoint, dequantized to float32."""

    keep_codes: bool = option(
        False, "keep Q4_0 and Q8_0 matrices as they are: the very integers and scales of the file are exported, and quantize takes "
        "the rest alone; for quantize and export, nothing can be removed or healed",
    )  # fmt: skip


@dataclass(frozen=True)
class PruneOptions(Options):
    """Remove decoder blocks, or parts of them: those of least Block Influence, or of least measured cost."""

    parts: str = option(BLOCKS, "what goes", REMOVABLE)
    criterion: str | None = option(
        None,
        "how layers are chosen (default: healed; greedy in a build that does not heal, and with --max-loss outside a build; "
        "list with --remove-layers)",
        CRITERIA,
    )
    remove_count: int | None = option(None, "how many decoder blocks, or parts of blocks, to remove", at_least=0)
    remove_fraction: float | None = option(None, "share of the blocks or parts that are left, rounded down, at least one")
    max_loss: float | None = option(
        None,
        "remove only as long as the loss on held-out text, and on what the model itself would write (KL), grows by at most so many "
        "nats a token, healed where that chooses",
        at_least=0,
    )
    remove_layers: tuple[int, ...] = option((), "which blocks to remove: indices from 0, separated by commas", at_least=0)
    shortlist: int = option(
        8, "blocks of lowest Block Influence that healed and greedy try in each round (a build: as --effort says)", at_least=1
    )
    greedy_tokens: int = option(
        4096, "calibration tokens that healed and greedy measure each trial on (a build: as --effort says)", at_least=16
    )
    calibration: Path = _calibration()
    calibration_model: Path | None = _calibration_model()
    calibration_tokens: int | None = _shared_tokens("is held out and ranks nothing")
    calibration_skip: int = _calibration_skip()
    text_key: str = _text_key()
    other_text: Path = _other_text()
    trust_remote_code: bool = _trust()

    def __post_init__(self) -> None:
        _check_model(self.calibration, self.calibration_model)
        amounts = [flag(name) for name in ("remove_count", "remove_fraction") if getattr(self, name) is not None]
        named = self.remove_layers
        if named and (amounts or self.max_loss is not None):
            raise OptionError(f"--remove-layers names the layers already; leave out {(*amounts, '--max-loss')[0]}")
        if self.criterion == "list" and not named:
            raise OptionError("--criterion list needs --remove-layers, for example 4,5")
        if named and self.criterion not in (None, "list"):
            raise OptionError(f"--remove-layers names the layers already; leave out --criterion {self.criterion}")
        if self.parts != BLOCKS and self.criterion == "angular":
            raise OptionError(f"--criterion angular looks at runs of blocks; with --parts {self.parts} give bi, greedy or healed")
        if len(set(named)) != len(named):
            raise OptionError(f"--remove-layers names a layer twice: {', '.join(map(str, named))}; leave one out")
        if len(amounts) == 2:
            raise OptionError("give --remove-count or --remove-fraction, not both")
        if not (amounts or named or self.max_loss is not None):
            raise OptionError(
                "say how much to remove: --remove-count N, --remove-fraction F, --max-loss NATS, or --remove-layers 4,5"
            )
        if self.remove_fraction is not None and not 0 < self.remove_fraction < 1:
            raise OptionError(f"--remove-fraction must lie between 0 and 1, not {self.remove_fraction}")

    def resolved(self) -> PruneOptions:
        """The same with the criterion in force, as it is recorded."""
        # A limit holds for what is written, where nothing is known of a heal stage.
        chosen = self.criterion or ("list" if self.remove_layers else "healed" if self.max_loss is None else "greedy")
        # What nothing reads must not make a finished stage look like another.
        return dataclasses.replace(self, criterion=chosen, other_text=self.other_text if chosen == "healed" else OTHER_TEXT)

    def amount(self, layers: int, absent: Sequence[int] = ()) -> int:
        """Blocks or parts to remove from a model of ``layers``, at most; OptionError when none would be left or one is not there.

        absent: layers that lack the part already.
        """
        named = self.remove_layers
        if named and max(named) >= layers:
            raise OptionError(f"there is no layer {max(named)} in a model of {layers}; give indices from 0 to {layers - 1}")
        if gone := sorted({*named} & {*absent}):
            raise OptionError(f"the {self.parts} of layer {gone[0]} was removed before; leave it out of --remove-layers")
        count, layers = len(named) if named else self.remove_count, layers - len(absent)
        if count is None:
            count = layers - 1 if self.remove_fraction is None else max(1, int(layers * self.remove_fraction))
        what = "layers" if self.parts == BLOCKS else f"{self.parts} parts" if self.parts == "feed-forward" else "layers' attention"
        if not layers:
            raise OptionError(f"no layer has its {self.parts} part any more; leave --parts out")
        if count >= layers:
            raise OptionError(f"cannot remove {count} of {layers} {what}; one must stay, so at most {layers - 1} can go")
        return count


@dataclass(frozen=True)
class TrimOptions(Options):
    """Trim the vocabulary: rows of embedding and head, and pieces of the tokenizer, that a use never needs."""

    keep_tokens: int | None = option(
        None,
        "tokens to keep: those that must stay, then those that the texts use most, then in the tokenizer's own order",
        at_least=1,
    )
    keep_text: tuple[Path, ...] = option((), "texts whose tokens all stay: .txt, .jsonl, .json or .csv")
    languages: tuple[str, ...] = option(
        (), "languages by their codes, as en,de: tokens in other scripts go, unless --keep-text uses them"
    )
    text: Path = _text()
    text_key: str = _text_key()
    trust_remote_code: bool = _trust()

    def __post_init__(self) -> None:
        if self.keep_tokens is None and not self.keep_text and not self.languages:
            raise OptionError("give what stays: --keep-tokens N, --keep-text FILE, or --languages en,de")


@dataclass(frozen=True)
class NarrowOptions(Options):
    """Take feed-forward channels out of every block, and refit what reads the others, block by block."""

    remove_channels: float | None = option(None, "share of the channels to remove, rounded so that kernels like what is left")
    refit: bool = option(True, "let the channels that stay make up for those that go")
    calibration: Path = _calibration()
    calibration_model: Path | None = _calibration_model()
    calibration_tokens: int | None = _shared_tokens("judges and teaches nothing")
    calibration_skip: int = _calibration_skip()
    text_key: str = _text_key()
    trust_remote_code: bool = _trust()

    def __post_init__(self) -> None:
        _check_model(self.calibration, self.calibration_model)
        if self.remove_channels is None:
            raise OptionError("say how much to remove: --remove-channels 0.1")
        if not 0 < self.remove_channels < 1:
            raise OptionError(f"--remove-channels must lie between 0 and 1, not {self.remove_channels}")


@dataclass(frozen=True)
class HealOptions(Options):
    """Recover what layer removal cost, with no new parameter; kept only if perplexity improves on two held-out texts."""

    healer: str = option("linear", "how the model is healed", HEALERS)
    original: Path | None = option(None, "the checkpoint before layers were removed (a build knows it)")
    calibration: Path = _calibration()
    calibration_model: Path | None = _calibration_model()
    calibration_tokens: int | None = _shared_tokens("judges and teaches nothing")
    calibration_skip: int = _calibration_skip()
    text_key: str = _text_key()
    other_text: Path = _other_text()
    lora_tokens: int = option(262144, "tokens that lora trains on, the calibration text again and again", at_least=16)
    lora_rank: int = option(16, "rank of the low-rank change of each matrix", at_least=1)
    lora_blocks: int = option(0, "train only so many blocks on each side of a gap; 0 trains all", at_least=0)
    learning_rate: float = option(2e-3, "peak learning rate of lora", at_least=0)
    temperature: float = option(1.0, "softmax temperature of lora's loss", at_least=0)
    contrastive: float = option(0.0, "weight of the contrastive term on hidden states (Contrastive Pruning)", at_least=0)
    trust_remote_code: bool = _trust()

    def __post_init__(self) -> None:
        _check_model(self.calibration, self.calibration_model)
        for name in ("learning_rate", "temperature"):
            if getattr(self, name) <= 0:
                raise OptionError(f"{flag(name)} must be greater than 0, not {getattr(self, name)}")


@dataclass(frozen=True)
class QuantizeOptions(Options):
    """Quantize the matrices of the decoder blocks.

    OUT is for edgepress export. GPTQ that was interrupted goes on where it stood when the same command is given again.
    """

    method: str = option("gptq", "how weights are quantized", {name: row.help for name, row in METHODS.items()})
    bits: int | None = option(
        None, f"bits of a weight, for {joined(ADJUSTABLE, 'and')} (default: 4); 3, 5 and 6 make only the file smaller", BITS
    )
    group_size: int | None = option(
        None, f"weights that share one scale; -1 is a whole row (default: {defaults_of_group_size()})", GROUP_SIZES
    )
    bits_for: tuple[str, ...] = option(
        (), "bits of some matrices, as 'model.layers.(0|23).mlp.*=8', or bits and group size, as '.*o_proj=8/64': a regular "
        "expression for the whole name, the first that matches counts, 16 leaves them float; repeat the flag for more rules "
        f"({joined(ADJUSTABLE, 'and')}; "
        "edgepress sensitivity proposes some)", rules=True,
    )  # fmt: skip
    head_bits: int = option(
        8, "bits of the output head, and of the embedding where the two are tied; 16 leaves it float", (4, 8, 16)
    )
    rare_rows: tuple[str, ...] = option(
        (), "rows of a head of 8 bits that get 4, as '9216-49151': ids of tokens that are seldom likely, ranges in their order. "
        "--max-growth and --max-size find them, unless this is none", metavar="FIRST-LAST,...",
    )  # fmt: skip
    embedding_bits: int | None = option(
        None, "bits of the embedding (default: those of the head, which decides where the two are tied); 16 leaves it float",
        (4, 8, 16),
    )  # fmt: skip
    max_growth: float | None = option(
        None, "perplexity may grow by this share (0.05 is 5 %): with no --bits, 8 are taken where 4 would lose more, as measured "
        "on the calibration text, on what the model writes and, where none is given, on technical prose; where that saves a fifth "
        "of the bytes, or with --tuned, as few as that allows, matrix by matrix; without --tuned, rare tokens of the head get 4 "
        "where the body has not 8 everywhere",
    )  # fmt: skip
    target_bits: float | None = option(
        None, "mean bits of a block weight, scales and zero points counted (between 2.4 and 8.4): every matrix gets 2 to 8 bits in "
        "groups of 32 to 128, so that the measured loss is least",
    )  # fmt: skip
    max_size: str | None = option(
        None, "the exported folder has at most this size, as 90MB or 1.2GB: every matrix gets 2 to 8 bits, and the head 4, 8, or "
        "4 for its rare tokens, so that the measured loss is least", metavar="SIZE",
    )  # fmt: skip
    native_bits: bool = option(
        False, "--target-bits and --max-size choose among 2, 4 and 8 bits alone: more bytes in the file for the same loss, but "
        "decoding reads no more than those (of 3 bits it reads 4, of 5 and 6 it reads 8), and loading takes less memory",
    )  # fmt: skip
    tuned: bool = option(False, "reckon with a tune stage afterwards in what --max-growth allows (a build knows it)")
    symmetric: bool = option(
        False, f"no zero points; 3, 5 and 6 bits keep theirs ({joined(ADJUSTABLE, 'and')}). Asymmetric is more exact at equal speed"
    )
    act_order: bool = option(
        False,
        f"groups too in order of activation ({joined(ACT_ORDER, 'and')}); adds a Gather on the input, and wins little with gptq",
    )
    calibration: Path = _calibration(MIXED)
    calibration_model: Path | None = _calibration_model()
    calibration_tokens: int = _calibration_tokens()
    calibration_skip: int = _calibration_skip()
    text_key: str = _text_key()
    calibration_seed: int | None = option(
        None,
        "draw the calibration windows from all of the text by this seed (default: the text from its beginning); with "
        "--calibration self and mixed the seed that the model writes by, too",
        at_least=0,
    )
    trust_remote_code: bool = _trust()

    def __post_init__(self) -> None:
        """Refuse what the method would ignore."""
        _check_model(self.calibration, self.calibration_model)
        name, row = self.method, look_up(METHODS, self.method, "method")
        if self.bits is not None and self.bits not in row.bits:
            raise OptionError(
                f"{name} weights have {joined(tuple(sorted(row.bits)))} bits, not {self.bits}; leave --bits out, or use --method "
                + joined(tuple(other for other, method in METHODS.items() if method.run and self.bits in method.bits))
            )
        if not row.adjustable and row.run and (self.bits_for or self.symmetric):
            refused = "--bits-for" if self.bits_for else "--symmetric"
            raise OptionError(f"{name} takes no {refused}; use --method {joined(ADJUSTABLE)}")
        if self.act_order and not row.act_order:
            raise OptionError(
                f"--act-order is for {joined(ACT_ORDER, 'and')}, and the method is {name}; leave it out, or use --method "
                + joined(ACT_ORDER)
            )
        if self.group_size is not None and self.group_size not in row.groups:
            raise OptionError(
                f"{name} has blocks of {joined(tuple(sorted(row.groups)))}; give one of these for --group-size, "
                f"not {self.group_size}"
            )
        self._check_choice()
        if other := [rule.bits for rule in bits_rules(self.bits_for) if rule.bits not in (*row.bits, 16)]:
            raise OptionError(
                f"{name} weights have {joined(tuple(sorted(row.bits)))} bits, and --bits-for gives {other[0]}; give one of these"
            )
        if rows_of(self.rare_rows) and (self.head_bits != 8 or row.run is None):
            having = f"it has {self.head_bits}" if row.run else f"{name} leaves it as it is"
            raise OptionError(f"--rare-rows is for a head of 8 bits, and {having}; leave either out")

    def _check_choice(self) -> None:
        """What chooses the bits itself leaves nothing else to say of them."""
        choosing = [flag(name) for name in ("max_growth", "target_bits", "max_size") if getattr(self, name) is not None]
        if self.native_bits and (self.bits is not None or self.bits_for):
            raise OptionError("--native-bits is for --target-bits and --max-size; leave it or --bits and --bits-for out")
        if not choosing:
            return
        if len(choosing) > 1:
            raise OptionError(f"{' and '.join(choosing)} both choose the bits; leave one out")
        if self.bits is not None or self.bits_for:
            raise OptionError(f"{choosing[0]} chooses the bits; leave it or --bits and --bits-for out")
        if not METHODS[self.method].adjustable:
            raise OptionError(f"{choosing[0]} is for {joined(ADJUSTABLE, 'and')}, and the method is {self.method}; leave it out")
        if self.max_growth is not None and rows_of(self.rare_rows):
            raise OptionError("--max-growth chooses the rare rows; leave --rare-rows out, or give none")
        if self.max_growth is not None and self.max_growth <= 0:
            raise OptionError(f"--max-growth must be greater than 0, not {self.max_growth}")
        if self.target_bits is not None:
            _check_target_bits(self.target_bits)
        if self.max_size is not None:
            size_in_bytes(self.max_size, "--max-size")
            if self.head_bits != 8 or self.embedding_bits is not None or rows_of(self.rare_rows):
                raise OptionError(
                    "--max-size chooses the bits of head and embedding; leave --head-bits, --embedding-bits and --rare-rows out"
                )

    @property
    def fits_web(self) -> bool:
        """Whether every matrix gets 8 bits and one scale a row, or stays float, which is what a browser runs."""
        chosen = any(x is not None for x in (self.max_growth, self.target_bits, self.max_size)) or self.act_order
        if (
            chosen
            or rows_of(self.rare_rows)
            or 4 in (self.head_bits, self.embedding_bits)
            or any(rule.bits != 16 for rule in bits_rules(self.bits_for))
        ):
            return False
        return self.method == "none" or (METHODS[self.method].adjustable and self.bits == 8 and self.group_size == -1)

    @property
    def chooses(self) -> bool:
        """Whether the stage settles the bits itself."""
        return any(given is not None for given in (self.max_growth, self.target_bits, self.max_size))

    def resolved(self) -> QuantizeOptions:
        """The same with the method's defaults where nothing was said, as they are recorded."""
        bits = self.bits if self.chooses else self.weight_bits
        return dataclasses.replace(self, bits=bits, group_size=self.group)

    @property
    def weight_bits(self) -> int:
        """``bits``, or the method's default."""
        return METHODS[self.method].bits[0] if self.bits is None else self.bits

    @property
    def group(self) -> int:
        """``group_size``, or the method's default; -1 for a whole row."""
        return METHODS[self.method].groups[0] if self.group_size is None else self.group_size


_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def size_in_bytes(text: str, name: str) -> int:
    """Bytes of a size, as ``90MB`` or ``1.2 GB``. Raises OptionError that names the flag."""
    found = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([a-zA-Z]*)\s*", text)
    if found is None or (unit := found[2].upper()) not in _UNITS or not (size := round(float(found[1]) * _UNITS[unit])):
        raise OptionError(f"{name} takes a size, as 90MB or 1.2GB, not '{text}'")
    if not unit and size < _UNITS["MB"]:
        raise OptionError(f"{name} {text} would be {size} bytes; give the unit, as {text.strip()}MB")
    return size


def _check_target_bits(bits: float) -> None:
    """The least and the most that the forms of quantize.mix can store."""
    if not 2.4 <= bits <= 8.4:
        raise OptionError(f"--target-bits must lie between 2.4 and 8.4, not {bits}")


@dataclass(frozen=True)
class BitsRule:
    """One rule of ``bits_for``; group_size: None for that of all others."""

    pattern: re.Pattern[str]
    bits: int
    group_size: int | None


def bits_rules(rules: tuple[str, ...]) -> list[BitsRule]:
    """``bits_for``, read. Raises OptionError for what is no such rule."""
    read, widths, groups = [], (*BITS, 16), tuple(size for size in GROUP_SIZES if size > 0)
    for rule in rules:
        pattern, sign, form = rule.rpartition("=")
        bits, slash, group = form.partition("/")
        if not sign or bits not in map(str, widths) or (slash and group not in map(str, groups)):
            raise OptionError(
                f"--bits-for takes PATTERN=BITS or PATTERN=BITS/GROUP, BITS one of {', '.join(map(str, widths))} and GROUP one of "
                f"{', '.join(map(str, groups))}, not '{rule}'"
            )
        read.append(BitsRule(regular_expression("--bits-for", pattern), int(bits), int(group) if slash else None))
    return read


def rows_of(ranges: tuple[str, ...]) -> list[slice]:
    """``rare_rows``, read; "none" is no row. Raises OptionError for what is no range, or ranges that are not in order."""
    read: list[slice] = []
    for given in () if tuple(ranges) == (NONE,) else ranges:
        first, dash, last = given.partition("-")
        if not (dash and first.isascii() and first.isdigit() and last.isascii() and last.isdigit() and len(given) < 40):
            raise OptionError(f"--rare-rows takes a range of ids, as 9216-49151, not '{given}'")
        rows = slice(int(first), int(last) + 1)
        if rows.stop <= rows.start or (read and rows.start <= read[-1].stop):
            raise OptionError(f"--rare-rows {given} is not after the rows before it, or is empty; give ranges in order, with gaps")
        read.append(rows)
    return read


def regular_expression(name: str, pattern: str) -> re.Pattern[str]:
    """Compiled. Raises OptionError that names the flag."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise OptionError(f"{name}: '{pattern}' is not a valid regular expression ({error}); correct it") from error


@dataclass(frozen=True)
class TuneOptions(Options):
    """Recover what quantization and removal cost: scales, norms and biases learn the original's predictions; no integer moves.

    Kept only if the KL divergence falls on two held-out texts. What was interrupted goes on when the same command is given again.
    """

    original: Path | None = option(None, "the float checkpoint before anything was removed or quantized (a build knows it)")
    minutes: float = option(
        10.0, "time to train, as estimated at the start, ten passes over the text at most; the result then depends on this "
        "machine's speed",
    )  # fmt: skip
    tune_tokens: int | None = option(
        None, "tokens to train on instead, the text again and again (default: as many as --minutes allow)", at_least=256
    )
    tune_rate: float | None = option(
        None, "peak learning rate, as a share of the mean size of each parameter (default: 0.003 or, where the model has lost less "
        "than 0.22 nats, a 75th of that)",
    )  # fmt: skip
    calibration: Path = option(
        SELF, "text to learn from: .txt, .jsonl, .json or .csv, or 'self': what the original itself writes, sampled once "
        "(default: self; the writing comes on top of --minutes)",
    )  # fmt: skip
    calibration_model: Path | None = _calibration_model()
    calibration_tokens: int | None = option(
        None, "calibration tokens, of which some are held out (default: all there are up to 32768; of the original's own text what "
        "--minutes or --tune-tokens read about once, 32768 to 131072)", at_least=64,
    )  # fmt: skip
    calibration_skip: int = _calibration_skip()
    text_key: str = _text_key()
    other_text: Path = _other_text()
    trust_remote_code: bool = _trust()

    def __post_init__(self) -> None:
        _check_model(self.calibration, self.calibration_model)
        for name in ("minutes", "tune_rate"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise OptionError(f"{flag(name)} must be greater than 0, not {value}")

    def own_tokens(self, parameters: int) -> int:
        """Tokens that a model of so many parameters writes for itself to learn from: a power of two from 32768 to 131072.

        What is read again and again is learnt by heart (docs/tuning.md); what is never read to its end was written for nothing.
        """
        read = self.tune_tokens or self.minutes * READ_A_MINUTE / parameters
        return min(MOST_OWN_TOKENS, max(PRUNE_TOKENS, 1 << int(read).bit_length() - 1))


@dataclass(frozen=True)
class SensitivityOptions(Options):
    """Estimate what each matrix costs at 2 to 8 bits, and which bits a mean allows at least loss."""

    target_bits: float = option(4.5, "mean bits of a block weight that are proposed for, scales and zero points counted")
    native_bits: bool = option(False, "propose 2, 4 and 8 bits alone, as quantize --native-bits")
    calibration: Path = _calibration(MIXED)
    calibration_model: Path | None = _calibration_model()
    calibration_tokens: int = option(COST_TOKENS, "tokens of it to measure on at most", at_least=16)
    calibration_skip: int = _calibration_skip()
    text_key: str = _text_key()
    trust_remote_code: bool = _trust()

    def __post_init__(self) -> None:
        _check_model(self.calibration, self.calibration_model)
        _check_target_bits(self.target_bits)


@dataclass(frozen=True)
class BoundOptions(Options):
    """What the artifact must keep to besides its size, here or elsewhere: of those that do, the one of least loss is made."""

    max_memory: str | None = option(
        None, "peak memory, at most, of a process that runs a prompt of 128 tokens, as 500MB", metavar="SIZE"
    )
    min_speed: float | None = option(None, "tokens a second, at least, that one sequence is decoded at", at_least=0)
    max_ttft: float | None = option(None, "milliseconds, at most, to the first token after a prompt of 128", at_least=0)
    machine: Path | None = option(
        None,
        "what edgepress machine measured on another computer, of probes that plan wrote: bounds are of that one",
        metavar="FILE",
    )

    def __post_init__(self) -> None:
        if self.machine is not None and not self.machine.is_file():
            raise OptionError(f"--machine {self.machine} is no file; give the one that edgepress machine wrote")
        if self.max_memory is not None:
            size_in_bytes(self.max_memory, "--max-memory")
        for name in ("min_speed", "max_ttft"):
            if getattr(self, name) == 0:
                raise OptionError(f"{flag(name)} must be above 0")

    @property
    def first(self) -> str:
        """The flag of the first that is given, "" where none is."""
        names = (item.name for item in dataclasses.fields(BoundOptions) if item.name != "machine")
        return next((flag(name) for name in names if getattr(self, name) is not None), "")

    @property
    def given(self) -> bool:
        """Whether there is any."""
        return bool(self.first)


@dataclass(frozen=True)
class PlanOptions(BoundOptions):
    """Show what could be made of a model: sizes, what each loses, its speed and memory here. Figures are kept for the next time."""

    max_size: str | None = option(
        None, "a size to show as well, as 90MB; refused where the model has no artifact so small", metavar="SIZE"
    )
    speed: bool = option(True, "measure speed and memory of five artifacts, made for that, and reckon those of the others")
    probes: Path | None = option(
        None, "a new folder: only write these five artifacts into it, for edgepress machine on another computer", metavar="DIR"
    )
    threads: int = _threads()
    method: str = option("gptq", "what is reckoned with", {name: METHODS[name].help for name in ("gptq", "rtn")})
    tuned: bool = option(False, "reckon with a tune stage afterwards")
    symmetric: bool = option(False, "reckon without zero points")
    native_bits: bool = option(False, "2, 4 and 8 bits alone, as quantize --native-bits; bounds of speed and memory try that, too")
    rare_rows: tuple[str, ...] = option(
        (), "rare tokens get 4 bits in a head of 8 where that loses least, unless this is", {NONE: "they keep 8"}, metavar=NONE
    )
    calibration: Path = _calibration(MIXED)
    calibration_model: Path | None = _calibration_model()
    calibration_skip: int = _calibration_skip()
    text: Path = _text()
    text_key: str = _text_key()
    trust_remote_code: bool = _trust()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.quantize()
        if self.given and not self.speed:
            raise OptionError("--no-speed measures nothing to compare with a bound; leave it or the bound out")
        if self.machine is not None and not self.speed:
            raise OptionError("--no-speed shows no speeds, and --machine has some; leave one of them out")
        asked = {"--machine": self.machine, "--max-size": self.max_size, "--no-speed": not self.speed, self.first: self.given}
        if self.probes is not None and (other := next((name for name, given in asked.items() if given), "")):
            raise OptionError(f"--probes only writes artifacts to be measured elsewhere; leave {other} out")

    def quantize(self) -> QuantizeOptions:
        """The options of the quantize stage that is planned. Raises OptionError."""
        known = {item.name for item in dataclasses.fields(QuantizeOptions)}
        return QuantizeOptions(**{i.name: getattr(self, i.name) for i in dataclasses.fields(self) if i.name in known})


@dataclass(frozen=True)
class ExportOptions(Options):
    """Write the ONNX artifact and prove that it computes what the checkpoint computes."""

    target: str = _target()
    exporter: str = option("auto", "which graph to write", EXPORTERS)
    accuracy_level: str = option("auto", "activations of quantized matrices", LEVELS)
    exact_layers: str | None = option(
        None, "matrices that keep float activations at level 4: a number takes those that int8 hurts most, as measured; "
        "anything else is a regular expression for the whole name, as '.*down_proj'",
    )  # fmt: skip
    max_added_kl: float | None = option(
        None, "KL divergence, nats a token, that int8 activations may add: above it --accuracy-level auto looks for matrices to "
        "keep at float activations, and 4 fails (default: a tenth of what was lost since --reference, at least 0.01)",
        at_least=0,
    )  # fmt: skip
    cache: str = option("float", "numbers of the key-value cache", CACHES)
    logits: str = option("last", "what the graph gives who asks for nothing", LOGITS)
    layout: str = option(PLAIN, "where the files lie", LAYOUTS)
    reference: Path | None = option(None, "the original checkpoint, to know how much was lost before int8 activations add to it")
    text: Path = _text()
    text_key: str = _text_key()
    original: Path | None = option(None, "float original of a third-party GPTQ checkpoint with ambiguous zero points")
    trust_remote_code: bool = _trust()

    def __post_init__(self) -> None:
        if self.cache == INT8 and (self.target != "cpu" or self.layout == NODE):
            given = f"--target {self.target}" if self.target != "cpu" else f"--layout {NODE}"
            raise OptionError(f"--cache int8 is for the CPU, and not for transformers.js; leave it or {given} out")
        if self.target != "cpu" and self.accuracy_level == "4":
            raise OptionError(f"int8 activations are CPU-only, and the target is {self.target}; leave --accuracy-level out")
        if self.target != "cpu" and self.exact_layers is not None:
            raise OptionError(
                f"--exact-layers is for int8 activations, which are CPU-only; leave it out for --target {self.target}"
            )
        if self.exact_layers is not None:
            if self.accuracy_level == "0":
                raise OptionError("--exact-layers is for int8 activations, and --accuracy-level 0 has none; leave one of them out")
            regular_expression("--exact-layers", self.exact_layers)


@dataclass(frozen=True)
class BenchOptions(Options):
    """Measure the artifact as it ships: size, memory, speed and quality."""

    target: str = option("cpu", "what it is measured on", TARGETS)
    text: Path = _text()
    text_key: str = _text_key()
    text_tokens: int = _text_tokens()
    reference: Path | None = option(None, "the original checkpoint: adds KL divergence and top-1 agreement")
    stages: tuple[Path, ...] = option((), "checkpoints in between, measured on the same tokens to show where quality went")
    plans: tuple[Path, ...] = option((), "plan.json of builds, to show what was planned of their artifacts (a build knows it)")
    compare_with: tuple[Path, ...] = option((), "more artifact folders, measured in turn with the first and compared with it")
    baseline: bool = option(
        True, "in a build that removes layers or channels: build the same without removal too, and measure it beside"
    )
    original_speed: bool = option(True, "with an original: measure its speed and memory too, as plain transformers runs it")
    tasks: tuple[str, ...] = option((), "tasks of lm-evaluation-harness, by its names (arc_easy,lambada_openai) or as .yaml files")
    task_files: tuple[Path, ...] = option(
        (), "their documents in local .jsonl files, in the same order (default: it downloads them)"
    )
    task_limit: int = option(0, "documents of each task at most; 0 takes all", at_least=0)
    prompt_lengths: tuple[int, ...] = option((32, 128), "prompt lengths in tokens, separated by commas", at_least=1)
    new_tokens: int = option(64, "tokens to decode in a speed measurement", at_least=2)
    repeats: int = option(5, "fresh processes for speed and memory, one sample of each figure from each", at_least=1)
    threads: int = _threads()
    trust_remote_code: bool = _trust()

    def __post_init__(self) -> None:
        if self.task_files and len(self.task_files) != len(self.tasks):
            raise OptionError(f"--task-files gives {len(self.task_files)} files for {len(self.tasks)} --tasks; give one for each")

    def lengths_within(self, room: int) -> list[int]:
        """The prompt lengths that fit a context of ``room`` tokens. Raises OptionError when nothing does."""
        lengths = [length for length in self.prompt_lengths if length <= room]
        if not lengths:
            raise OptionError(f"no prompt length fits the context of {room} tokens; give shorter --prompt-lengths")
        if min(lengths) + self.new_tokens + 8 > room:
            raise OptionError(
                f"{min(lengths)} prompt and {self.new_tokens} new tokens exceed the context of {room}; give fewer --new-tokens"
            )
        return lengths


@dataclass(frozen=True)
class PageOptions(Options):
    """Write a folder of static files that chats with an artifact for browsers (export --target web) without a server.

    Any web server can send it. The first visit loads the model; later ones need no network. transformers.js and onnxruntime's
    WebAssembly build are downloaded once, by npm.
    """

    title: str | None = option(None, "what the page calls the model (default: the name of its folder)")
    modules: str | None = option(
        None, "a node_modules folder to take the libraries from (default: npm downloads them)", metavar="DIR"
    )


@dataclass(frozen=True)
class SweepOptions(Options):
    """Build many models, recipes and budgets, as a file says, on this machine or a cluster, and measure them on one page.

    FILE is YAML: models (what build takes), and, if you like, recipes (names or files; default: default), budgets (each the flags
    of a build, as {max_size: 90MB} or {remove_count: 2}) and bench (flags of bench). Ray runs the builds; each model's artifacts
    are then measured in turn, alone on a node. OUT must be where all nodes can write. The same command goes on with a sweep that
    was stopped.
    """

    cores: int = option(0, "processor cores of a build; 0 gives it a whole node", at_least=0)
    memory: str | None = option(
        None, "memory of a build, as 3GB: no more run at a time on a node than it has memory for", metavar="SIZE"
    )
    ray_address: str | None = option(
        None, "of a Ray cluster (default: a Ray of this machine, for as long as the sweep takes)", metavar="HOST:PORT"
    )

    def __post_init__(self) -> None:
        if self.memory is not None:
            size_in_bytes(self.memory, "--memory")


@dataclass(frozen=True)
class RunOptions(Options):
    """Continue a prompt, tokens streamed, or keep a conversation."""

    chat: bool = option(False, "keep a conversation: Ctrl-C ends an answer, /new starts over, Ctrl-D or /bye quits")
    system: str | None = option(None, "with --chat: what the model is told before the first message")
    max_new_tokens: int | None = option(None, "tokens to generate at most (default: 64, and 1024 an answer in --chat)", at_least=1)
    temperature: float | None = option(
        None,
        "0 takes the most likely token, about 0.8 varies (default of this and the next four: as the model's own "
        "generation_config.json says, else the most likely token)",
        at_least=0,
        at_most=100,
    )
    top_k: int | None = option(None, "draw from so many of the likeliest tokens alone, 0 for all", at_least=0)
    top_p: float | None = option(None, "draw from the likeliest tokens that together have this probability", at_least=0, at_most=1)
    min_p: float | None = option(None, "draw from tokens with this share of the likeliest one's probability", at_least=0, at_most=1)
    repetition_penalty: float | None = option(
        None, "above 1, tokens that stand in the text already become less likely", at_least=0.01, at_most=100
    )
    seed: int = option(0, "random seed for sampling", at_least=0)
    lookup: str = _lookup()
    threads: int = _threads()

    def __post_init__(self) -> None:
        if self.system is not None and not self.chat:
            raise OptionError("--system is for a conversation; give --chat too, or leave it out")

    @property
    def limit(self) -> int:
        """``max_new_tokens``, known."""
        return self.max_new_tokens or (1024 if self.chat else 64)


@dataclass(frozen=True)
class MachineOptions(Options):
    """Measure here what edgepress plan --probes wrote elsewhere, for its --machine and that of build: needs no torch, no model."""

    threads: int = _threads()


@dataclass(frozen=True)
class ServeOptions(Options):
    """Answer OpenAI's HTTP interface from an artifact, on the CPU, with a page to chat."""

    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 is open to the network, where --api-key is wise")
    port: int = option(8080, "port to listen on, 0 for any that is free", at_least=0, at_most=65535)
    api_key: str | None = option(None, "what clients must send as their key (default: $EDGEPRESS_API_KEY, else none is asked)")
    memory: float = option(
        1.0, "GB for the caches of conversations, those that run and those that may go on", at_least=0.01, at_most=1e6
    )
    parallel: int = option(2, "requests that take turns, token by token; others wait in line", at_least=1)
    queue: int = option(32, "requests that may wait; more are refused with status 429", at_least=1)
    max_tokens: int = option(1024, "new tokens for a request that does not say how many", at_least=1)
    time_limit: float = option(600.0, "seconds after which an answer is cut", at_least=1, at_most=1e9)
    lookup: str = _lookup()
    threads: int = _threads()

    def __post_init__(self) -> None:
        if self.api_key is not None and not re.fullmatch("[!-~]+", self.api_key):  # what an HTTP header carries as it is
            raise OptionError("--api-key must be letters, digits and signs of ASCII, one at least, without spaces")


@dataclass(frozen=True)
class VerifyOptions(Options):
    """Check an artifact: whole, sound, running; and with --original that it computes what its checkpoint computes."""

    original: Path | None = option(
        None, "the checkpoint that it was exported from: proven equal again; or an earlier one: the difference is measured"
    )
    text: Path = option(EVALUATION_TEXT, "text to compare on (default: the shipped evaluation.txt)")
    text_key: str = _text_key()
    trust_remote_code: bool = _trust()
