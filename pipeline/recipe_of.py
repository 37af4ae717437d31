"""The recipe of an artifact: what was chosen for it is given, so that the same, or a like model, is pressed without trials."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from edgepress.pipeline.artifact import Artifact, Step
from edgepress.pipeline.errors import InputError
from edgepress.pipeline.files import JsonObject, sha256
from edgepress.pipeline.report.model import Report, read
from edgepress.pipeline.report.tables import shown
from edgepress.pipeline.stages import STAGES

# What one build calls its own folders.
_FOLDERS = {"original", "reference", "calibration_model"}
# By which a stage chooses, or what that settles.
_BITS = {"method", "bits", "bits_for", "group_size", "rare_rows", "max_growth", "target_bits", "max_size", "native_bits", "tuned"}
_LAYERS = {"remove_count", "remove_fraction", "max_loss", "remove_layers", "criterion", "shortlist", "greedy_tokens"}
_MEASURED = {
    "size.total_bytes": "size on disk",
    "quality.perplexity": "perplexity",
    "quality.kl_mean": "KL divergence from the original",
    "speed.decode_tokens_per_s": "decode",
}


def recipe_text(artifact: Artifact) -> str:
    """YAML for ``build --recipe``, with what chose its bits and what was measured of it as comments.

    Raises InputError for a folder that no stage of edgepress wrote.
    """
    import yaml

    if not artifact.steps:
        raise InputError(f"{artifact.path} was not written by edgepress, so there is no recipe of it")
    remarks, recipe = list[str](), dict[str, JsonObject]()
    for step in artifact.steps:
        if step.stage == "prune" and not (step.facts.get("removed_layers") or step.facts.get("removed_parts")):
            continue
        if step.stage == "heal" and "prune" not in recipe:
            continue
        given = dict(_given(step, remarks))
        if step.stage != "import" or given:
            recipe[step.stage] = given
        if because := step.facts.get("chosen_because"):
            remarks.append(f"{step.stage} chose, and {because}")
    if "export" in recipe:
        recipe["bench"] = {}
    if report := _report(artifact):
        known = {what: report.figures[name] for name, what in _MEASURED.items() if name in report.figures}
        figures = ", ".join(f"{what} {shown(figure.median, figure.unit)}" for what, figure in known.items())
        remarks.append(f"measured: {figures}")
    body = "".join(yaml.safe_dump({stage: options}, sort_keys=False, width=130) for stage, options in recipe.items())
    return "".join(f"# {remark}\n" for remark in remarks) + body


def _given(step: Step, remarks: list[str]) -> Iterator[tuple[str, object]]:
    """The options that are not the defaults, and in the place of a choice what it was; a text without a path is a remark."""
    settled, by = _settled(step)
    options = {name: value for name, value in step.options.items() if name not in by | _FOLDERS} | settled
    for field in dataclasses.fields(STAGES[step.stage].options):
        value, default = options.get(field.name), field.default
        if isinstance(value, dict):  # a text
            if "file" not in value and (kind := next(iter(value), "")) != str(default):
                yield field.name, kind
            elif "file" in value and not _is_shipped(default, value):
                remarks.append(f"{step.stage} read {value['file']} for {field.name}: add its path")
        elif value is not None and value != (list(default) if isinstance(default, tuple) else default):
            yield field.name, value


def _is_shipped(default: object, text: JsonObject) -> bool:
    return isinstance(default, Path) and default.is_file() and sha256(default) == text.get("sha256")


def _settled(step: Step) -> tuple[JsonObject, set[str]]:
    """What a stage chose, as options, and the options that had it choose."""
    if isinstance(chosen := step.facts.get("chosen"), dict):
        return chosen, _BITS
    if removed := step.facts.get("removed_layers") or step.facts.get("removed_parts"):
        return {"remove_layers": removed}, _LAYERS
    return {}, set()


def _report(artifact: Artifact) -> Report | None:
    """What the benchmark of the build that made this artifact says of it."""
    for file in sorted(artifact.path.parent.glob("*-bench/report.json")):
        report = read(file).first
        if report.identity == artifact.identity():
            return report
    return None
