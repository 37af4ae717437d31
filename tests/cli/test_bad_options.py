"""Options and recipes that make no sense end in one line that names the value and what is allowed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from refusal import Refused

OPTIONS = [
    ("prune --remove-count 4", ("cannot remove 4 of 4", "at most 3")),
    ("prune --remove-count 9", ("cannot remove 9 of 4", "at most 3")),
    ("prune --remove-count -1", ("--remove-count must be at least 0",)),
    ("prune --remove-count 1.5", ("--remove-count takes a whole number", "1.5")),
    ("prune --remove-fraction 0", ("--remove-fraction", "between 0 and 1")),
    ("prune --remove-fraction 1", ("--remove-fraction", "between 0 and 1")),
    ("prune --remove-fraction 1.5", ("--remove-fraction", "between 0 and 1", "1.5")),
    ("prune --remove-fraction nan", ("--remove-fraction", "takes a number")),
    ("prune --remove-count 1 --remove-fraction 0.5", ("not both",)),
    ("prune", ("--remove-count", "--remove-fraction")),
    ("prune --criterion lowest --remove-count 1", ("unknown criterion 'lowest'", "greedy, bi, angular, list")),
    ("prune --criterion list", ("--criterion list needs", "--remove-layers, for example 4,5")),
    ("prune --criterion bi --remove-layers 1", ("--remove-layers names the layers already", "--criterion bi")),
    ("prune --remove-layers 1,2 --remove-count 2", ("--remove-layers names the layers already", "--remove-count")),
    ("prune --layers 1,2", ("--layers is now --remove-layers",)),
    ("prune --remove-layers 1 --max-loss 0.1", ("--remove-layers names the layers already", "--max-loss")),
    ("prune --remove-layers 2,1,2", ("--remove-layers names a layer twice", "2, 1, 2")),
    ("prune --remove-layers 1,4", ("no layer 4 in a model of 4", "0 to 3")),
    ("prune --remove-layers -1", ("--remove-layers must be at least 0",)),
    ("prune --remove-layers 0,1,2,3", ("cannot remove 4 of 4", "at most 3")),
    ("prune --remove-layers two", ("--remove-layers takes a whole number", "two")),
    ("prune --max-loss -0.1", ("--max-loss must be at least 0",)),
    ("prune --max-loss nan", ("--max-loss takes a number",)),
    ("prune --remove-layers 1 --shortlist 0", ("--shortlist must be at least 1",)),
    ("prune --remove-layers 1 --calibration-tokens 9000000", ("too short", "9000000 were asked for", "ask for fewer")),
    ("prune --parts heads --remove-count 1", ("unknown parts 'heads'", "attention, feed-forward")),
    ("prune --parts attention --remove-count 1 --criterion angular", ("--criterion angular looks at runs", "greedy")),
    ("prune --parts attention --remove-count 4", ("cannot remove 4 of 4 layers' attention", "at most 3")),
    ("build --remove-layers 1,7", ("no layer 7 in a model of 4",)),
    ("quantize --method gtpq", ("unknown method 'gtpq'", "did you mean 'gptq'?")),
    ("quantize --bits 7", ("--bits", "2, 3, 4, 5, 6, 8", "7")),
    ("quantize --bits four", ("--bits takes a whole number", "four")),
    ("quantize --group-size 33", ("--group-size", "32, 64", "33")),
    ("quantize --method nf4 --bits 8", ("nf4 weights have 4 bits, not 8", "leave --bits out")),
    ("quantize --method int8 --bits 4", ("int8 weights have 8 bits, not 4", "leave --bits out")),
    ("quantize --method nf4 --group-size 32", ("nf4 has blocks of 64, 128 or 256", "--group-size", "32")),
    ("quantize --method fp4 --symmetric", ("fp4 takes no --symmetric", "use --method")),
    ("quantize --method rtn --act-order", ("--act-order is for gptq", "rtn")),
    ("quantize --method rtn --bits-for mlp", ("--bits-for takes PATTERN=BITS", "mlp")),
    ("quantize --method rtn --bits-for .*=7", ("--bits-for takes PATTERN=BITS", "one of 2, 3, 4, 5, 6, 8, 16")),
    ("quantize --method rtn --bits-for (=8", ("'(' is not a valid regular expression", "correct")),
    ("quantize --method rtn --bits-for layers.9.*=8", ("first match of no matrix", "model.layers.0.", "correct")),
    ("quantize --method nf4 --bits-for .*=8", ("nf4 takes no --bits-for", "use --method")),
    ("quantize --method rtn --embedding-bits 3", ("--embedding-bits is one of 4, 8, 16",)),
    ("quantize --calibration-tokens 9223372036854775808", ("--calibration-tokens must be at most 9,007,199,254,740,991",)),
    ("quantize --calibration-tokens 3", ("--calibration-tokens must be at least 16",)),
    ("export --exporter fussed", ("unknown exporter 'fussed'", "did you mean 'fused'?")),
    ("export --target gpu", ("unknown target 'gpu'", "did you mean 'cuda'?")),
    ("export --accuracy-level 3", ("unknown accuracy level '3'", "auto, 4, 0")),
    ("export --max-added-kl -1", ("--max-added-kl must be at least 0", "-1")),
    ("export --min-agreement 0.9", ("--min-agreement is now --max-added-kl",)),
    ("export --exact-layers (", ("--exact-layers", "not a valid regular expression", "correct")),
    ("export --accuracy-level 0 --exact-layers 2", ("--exact-layers is for int8", "leave one")),
    ("quantize --methd rtn", ("--methd", "--help")),
    ("build --recipe defalt", ("no recipe 'defalt'", "did you mean 'default'?")),
    ("build --recipe absent.yaml", ("no recipe 'absent.yaml'", "give a YAML file")),
    ("build --remove-count 4 --method rtn", ("cannot remove 4 of 4", "at most 3")),
    ("build --max-size 90", ("--max-size 90 would be 90 bytes", "90MB")),
    ("build --max-size 100kB", ("--max-size 100kB is less than the 0.", "edgepress plan")),
    ("quantize --max-size 100kB", ("--max-size 100kB is less than the 0.", "edgepress plan")),
    ("build --bits 7", ("--bits", "2, 3, 4, 5, 6, 8")),
    # Known before the first stage runs.
    ("build --method rtn --remove-layers 1 --bits-for REGEX=4/32", ("'REGEX=4/32' is the first match of no matrix", "correct")),
    ("build --method rtn --remove-layers 1 --bits-for .*layers.3.*=8", ("first match of no matrix", "model.layers.0.", "correct")),
    # A layer without its attention keeps its number.
    (
        "build --method rtn --parts attention --remove-layers 1 --bits-for .*layers.3.*=8 --threads 100000",
        ("100000 threads", "processors of this machine", "at most"),
    ),
    ("build --method rtn --remove-layers 1 --threads 100000", ("100000 threads", "processors of this machine", "at most")),
]


@pytest.mark.parametrize(("line", "says"), OPTIONS, ids=[line for line, _ in OPTIONS])
def test_bad_option(line: str, says: tuple[str, ...], refused: Refused, tiny: Path, tmp_path: Path) -> None:
    """The flag, the value and what is allowed stand in the line."""
    verb, *flags = line.split()
    refused(verb, tiny, tmp_path / "out", *flags, says=says)


@pytest.mark.parametrize("arguments", [[], ["prnue", "a", "b"], ["prune"], ["run", "a"], ["--nonsense"]], ids=" ".join)
def test_bad_command_line(arguments: list[str], refused: Refused) -> None:
    """The complaints of argparse itself take one line too, and name the help."""
    refused(*arguments, says="--help")


RECIPES = [
    ("prun: {remove_count: 1}", ("unknown stage 'prun'", "did you mean 'prune'?")),
    ("quantize: {bitz: 4}", ("unknown option of quantize 'bitz'", "did you mean 'bits'?")),
    ("quantize: {4: 4}", ("unknown option of quantize '4'", "bits")),
    ("quantize: {bits: 7}", ("--bits", "2, 3, 4, 5, 6, 8")),
    ("quantize: {method: rtn, head_bits: null}", ("--head-bits",)),
    ("quantize: {bits: 4.5}", ("--bits", "whole number")),
    ("quantize: {calibration: null}", ("--calibration",)),
    ("quantize: {symmetric: maybe}", ("--symmetric is true or false", "maybe")),
    ("quantize: {method: [rtn]}", ("method",)),
    ("export: {text: 5}", ("--text", "5")),
    ("prune: {remove_count: 1, remove_fraction: 0.5}", ("not both",)),
    ("bench: {}", ("bench cannot come here", "an ONNX artifact")),
    ("export: {}\nquantize: {method: rtn}", ("quantize cannot come here", "a float checkpoint", "an ONNX artifact")),
    (
        "quantize: {method: rtn}\nprune: {remove_count: 1}",
        ("prune cannot come here", "a float checkpoint", "a quantized checkpoint"),
    ),
    ("quantize: {method: rtn", ("not valid YAML",)),
    ("quantize: &a [*b]", ("not valid YAML",)),
    ("\x00", ("not valid YAML",)),
    ("- quantize", ("must map each stage",)),
    ("quantize: rtn", ("must map each stage",)),
    ("", ("must map each stage",)),
    ("{}", ("stage",)),
]


@pytest.mark.parametrize(("content", "says"), RECIPES, ids=[content or "empty" for content, _ in RECIPES])
def test_bad_recipe(content: str, says: tuple[str, ...], refused: Refused, tiny: Path, tmp_path: Path) -> None:
    """A recipe is checked whole before the first stage begins, also one of odd keys and values."""
    (tmp_path / "own.yaml").write_text(content)
    refused("build", tiny, tmp_path / "out", "--recipe", tmp_path / "own.yaml", says=says)


def test_a_recipe_without_end(refused: Refused, tiny: Path, tmp_path: Path) -> None:
    """Of a file of a terabyte no more is read than a recipe may have."""
    (tmp_path / "own.yaml").touch()
    os.truncate(tmp_path / "own.yaml", 1 << 40)
    refused("build", tiny, tmp_path / "out", "--recipe", tmp_path / "own.yaml", says="too large")


def test_odd_recipe_keys_beside_flags(refused: Refused, tiny: Path, tmp_path: Path) -> None:
    """A flag is merged with the recipe's keys, whatever these are."""
    (tmp_path / "own.yaml").write_text("prune: {4: 2}")
    refused(
        "build", tiny, tmp_path / "out", "--recipe", tmp_path / "own.yaml", "--remove-count", 1, says="unknown option of prune '4'"
    )


def test_flag_that_no_stage_takes(refused: Refused, tiny: Path, tmp_path: Path) -> None:
    """Silently ignored, it would leave the user believing in it."""
    (tmp_path / "own.yaml").write_text("quantize: {method: rtn}")
    refused("build", tiny, tmp_path / "out", "--recipe", tmp_path / "own.yaml", "--repeats", 3, says="repeats")
