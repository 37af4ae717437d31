"""What came of one way of healing: perplexity on two held-out texts before and after, and so whether it is kept."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from edgepress.pipeline.files import JsonObject
from edgepress.pipeline.metrics.torch_scores import perplexity

log = logging.getLogger("edgepress")
REJECTED = "; the checkpoint stays as it was (--other-text takes a text of a kind that this model is meant for)"


@dataclass(frozen=True)
class Change:
    """Mean loss on one text, nats a token, before and after."""

    before: float
    after: float

    @property
    def improved(self) -> bool:
        """Whether it fell; NaN did not."""
        return self.after < self.before

    @property
    def perplexities(self) -> list[float]:
        """The same two as perplexities."""
        return [perplexity(self.before), perplexity(self.after)]


@dataclass(frozen=True)
class Outcome:
    """One way of healing, judged.

    changed_tensors: how many it changed. held_out: on held-out text of the calibration's kind. other: on text of another kind.
    details: what the healer itself records.
    """

    method: str
    changed_tensors: int
    held_out: Change
    other: Change
    details: JsonObject

    @property
    def accepted(self) -> bool:
        """Kept only if both texts improve."""
        return self.changed_tensors > 0 and self.held_out.improved and self.other.improved

    @property
    def held_out_perplexity(self) -> list[float]:
        """Before, and of what the checkpoint then holds: a rejected change was undone."""
        before, after = self.held_out.perplexities
        return [before, after if self.accepted else before]

    def facts(self) -> JsonObject:
        """For the manifest."""
        texts = {"held_out_perplexity": self.held_out.perplexities, "other_perplexity": self.other.perplexities}
        if not self.accepted:
            texts = {f"rejected_{key}": pair for key, pair in texts.items()} | {k: [pair[0]] * 2 for k, pair in texts.items()}
        return {
            "method": self.method, "accepted": self.accepted, "changed_tensors": self.changed_tensors, **texts, **self.details,
        }  # fmt: skip

    def report(self) -> None:
        """One line in the log."""
        (b, a), (other_b, other_a) = self.held_out.perplexities, self.other.perplexities
        shown = f"held-out {b:.4g} -> {a:.4g} and other {other_b:.4g} -> {other_a:.4g}"
        if self.accepted:
            log.info("heal: %s accepted; perplexity of %s text", self.method, shown)
        elif self.changed_tensors:
            log.warning("warning: %s did not help both kinds of text (perplexity of %s)%s", self.method, shown, REJECTED)
        else:
            log.info("heal: %s found no change that helps both kinds of text%s", self.method, REJECTED)
