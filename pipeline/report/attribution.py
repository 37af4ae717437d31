"""Which stage lost what: the loss of each stage, its share, and stages that changed what they must not change."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

# Mean change of a token's loss, in nats, between a packed checkpoint in torch and its ONNX graph at float activations.
# Rounding alone gives about 1e-6; one changed scale of one group gives a hundred times this limit or more.
EXACT = 1e-4
# Perplexity that int8 activations may add before the report warns.
ACTIVATIONS = 1.02
# Perplexity that grows by this factor leaves a model of little use.
WORRYING = 1.5
# Below this much loss in all, in nats a token, shares of it would be noise.
LEAST = 1e-3


def attribute(rows: list[dict[str, Any]], losses: list[np.ndarray | None]) -> None:
    """Add to each row after the first what changed since the last row that was measured.

    rows: stages in order, each with "perplexity" unless it failed, and "exact" where it must compute what the row before
    computes. losses: of every scored token in nats (tokens,), None for a failed row. Adds "change_nats" (mean),
    "token_change_nats" (mean of absolute changes), "share" of the whole loss, and "suspect" with the reason.
    """
    known = [(row, loss.astype(np.float64)) for row, loss in zip(rows, losses, strict=True) if loss is not None]
    if not known:
        return
    total = known[-1][1].mean() - known[0][1].mean()
    for (before, earlier), (row, loss) in pairwise(known):
        change = float((loss - earlier).mean())
        row["change_nats"] = change
        row["token_change_nats"] = float(np.abs(loss - earlier).mean())
        if total > LEAST:
            row["share"] = change / total
        if row["exact"] == before["name"] and not row["token_change_nats"] <= EXACT:
            row["suspect"] = (
                f"computes something else than the {before['name']} checkpoint that it was made from: the loss of a token moves by "
                f"{row['token_change_nats']:.2g} nat on average ({EXACT:g} is allowed); the files are damaged or of another model"
            )
        elif before["name"] == "onnx_level_0" and not row["perplexity"] <= ACTIVATIONS * before["perplexity"]:
            row["suspect"] = (
                f"int8 activations cost {100 * (row['perplexity'] / before['perplexity'] - 1):.1f} % of perplexity; "
                "export with --accuracy-level 0"
            )
