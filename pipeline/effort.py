"""How much time a build takes for its choices and its measurements: what each word of ``--effort`` sets where nothing was said."""

from __future__ import annotations

from collections.abc import Mapping

from edgepress.pipeline.registry import look_up

DEFAULT = "balanced"
# Word -> stage -> options. A recipe and flags go before it; options of a stage that a word does not name keep their own defaults.
EFFORTS: dict[str, dict[str, dict[str, object]]] = {
    "quick": {
        "prune": {"shortlist": 1, "greedy_tokens": 512, "calibration_tokens": 4096},
        "heal": {"calibration_tokens": 4096},
        "narrow": {"calibration_tokens": 8192},
        "quantize": {"calibration_tokens": 4096},
        "tune": {"minutes": 2.0},
        "bench": {"repeats": 2, "text_tokens": 4096},
    },
    "balanced": {
        "prune": {"shortlist": 3, "greedy_tokens": 1024},
    },
    "best": {
        "prune": {"shortlist": 8, "greedy_tokens": 4096},
        "tune": {"minutes": 30.0},
        "bench": {"repeats": 10},
    },
}
HELP = {
    "quick": "fewer tokens and samples, for a first look",
    "balanced": "the usual",
    "best": "more candidates for removal, longer tuning, narrower intervals",
}


def settings(effort: str, stage: str, said: Mapping[str, object]) -> dict[str, object]:
    """What a word sets of a stage, without what is in ``said``. Raises OptionError for an unknown word.

    The number of tokens of a text goes with the shipped one: of another text, which may be shorter, it would be too much to ask.
    """
    chosen = look_up(EFFORTS, effort, "effort").get(stage, {})
    return {k: v for k, v in chosen.items() if k not in said and not (k == "calibration_tokens" and "calibration" in said)}
