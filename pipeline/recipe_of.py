"""The recipe of an artifact: what was chosen for it is given, so that the same, or a like model, is pressed without trials."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from edgepress.pipeline.artifact import Artifact, Step
from edgepress.pipeline.errors import InputError
from edgepress.pipeline.files import JsonObject, sha256
from edgepress.pipeline.report.model import Report, read
from edgepress.pipeline.report.tables import shown
from edgepress.pipeline.stages import STAGES
from edgepress.pipeline.visible import one_line

_NO_BUILD_HAS = ("export", "original")  # the only folder of another model that a build does not fill in
# By which a stage chooses, or what that settles.
_BITS = {"method", "bits", "bits_for", "group_size", "rare_rows", "max_growth", "target_bits", "max_size", "native_bits", "tuned"}
_LAYERS = {"remove_count", "remove_fraction", "max_loss", "remove_layers", "criterion", "shortlist", "greedy_tokens"}
_LEVELS = {"accuracy_level", "exact_layers", "max_added_kl"}
_MEASURED = {
    "size.total_bytes": "size on disk",
    "quality.perplexity": "perplexity",
    "quality.kl_mean": "KL divergence from the original",
    "speed.decode_tokens_per_s": "decode",
}


def recipe_text(artifact: Artifact) -> str:
    """YAML for ``build --recipe``, with what chose its bits, what was measured of it, and what it cannot say as comments.

    Raises InputError for a folder that no stage of edgepress wrote, and where a stage ran twice, which no recipe can say.
    """
    import yaml

    if not artifact.steps:
        raise InputError(f"{artifact.path} was not written by edgepress, so there is no recipe of it")
    remarks, recipe = list[str](), dict[str, JsonObject]()
    for step in artifact.steps:
        if not _changed_anything(step, recipe):
            continue
        if step.stage in recipe:
            raise InputError(f"{artifact.path}: {step.stage} ran twice, which no recipe can say; run the stages one by one")
        given = dict(_given(step, remarks))
        if step.stage != "import" or given:
            recipe[step.stage] = given
        if step.stage == "export" and step is artifact.steps[-1]:  # a page is made of an artifact, as a benchmark is
            recipe["bench"] = {name: given[name] for name in ("target", "trust_remote_code") if name in given}
        if because := step.facts.get("chosen_because"):
            remarks.append(f"{step.stage} chose, and {because}")
        if step.stage == "tune":
            remarks.append("tune trains for minutes: a faster machine gets further")
    if report := _report(artifact):
        known = {what: report.figures[name] for name, what in _MEASURED.items() if name in report.figures}
        figures = ", ".join(f"{what} {shown(figure.median, figure.unit)}" for what, figure in known.items())
        remarks.append(f"measured: {figures}")
    body = "".join(yaml.safe_dump({stage: options}, sort_keys=False, width=130) for stage, options in recipe.items())
    return "".join(f"# {one_line(remark)}\n" for remark in remarks) + body


def _changed_anything(step: Step, before: dict[str, JsonObject]) -> bool:
    if step.stage == "prune":
        return bool(step.facts.get("removed_layers") or step.facts.get("removed_parts"))
    return (step.stage != "heal" or "prune" in before) and not (step.stage == "tune" and step.facts.get("accepted") is False)


def _given(step: Step, remarks: list[str]) -> Iterator[tuple[str, object]]:
    """The options that are not the defaults, and in the place of a choice what it was; a file without a path is a remark."""
    settled, by = _settled(step)
    options = {name: value for name, value in step.options.items() if name not in by} | settled
    for field in dataclasses.fields(STAGES[step.stage].options):
        value, default = options.get(field.name), field.default
        texts = [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, dict)]
        for text in texts:
            if "folder" in text and (step.stage, field.name) != _NO_BUILD_HAS:  # others are the build's own
                continue
            if named := text.get("file") or text.get("folder"):
                if not _is_shipped(default, text):
                    remarks.append(f"{step.stage} read {named} for {field.name}: add its path")
            elif (kind := next(iter(text), "")) != str(default):
                yield field.name, kind
        if not texts and value is not None and value != (list(default) if isinstance(default, tuple) else default):
            yield field.name, value


def _is_shipped(default: object, text: JsonObject) -> bool:
    return isinstance(default, Path) and default.is_file() and sha256(default) == text.get("sha256")


def _settled(step: Step) -> tuple[JsonObject, set[str]]:
    """What a stage chose, as options, and the options that had it choose."""
    if isinstance(chosen := step.facts.get("chosen"), dict):
        return chosen, _BITS
    if removed := step.facts.get("removed_layers") or step.facts.get("removed_parts"):
        return {"remove_layers": removed}, _LAYERS
    if step.facts.get("accuracy_levels_tried"):
        level: JsonObject = {"accuracy_level": str(step.facts["accuracy_level"])}
        if exact := step.facts.get("exact_layers"):
            level["exact_layers"] = "|".join(map(re.escape, exact))
        return level, _LEVELS
    return {}, set()


def _report(artifact: Artifact) -> Report | None:
    """What the benchmark of the build that made this artifact says of it."""
    for file in sorted(artifact.path.parent.glob("*-bench/report.json")):
        with suppress(InputError):  # another's, perhaps an older one's
            report = read(file).first
            if report.identity == artifact.identity():
                return report
    return None
