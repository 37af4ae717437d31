"""Which stage lost what: the loss of each stage, its share, and stages that changed what they must not change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
from edgepress.pipeline.report.model import StageRow

# Mean change of a token's loss, in nats, between a packed checkpoint in torch and its ONNX graph at float activations.
# Rounding alone gives about 1e-6; one changed scale of one group gives a hundred times this limit or more.
EXACT = 1e-4
# Perplexity that int8 activations may add before the report warns.
ACTIVATION_TOLERANCE = 1.02
# Perplexity that grows by this factor leaves a model of little use.
WORRYING = 1.5
# Below this much loss in all, in nats a token, shares of it would be noise.
LEAST = 1e-3


def attribute(
    rows: Sequence[StageRow], losses: Sequence[np.ndarray | None], exact: Mapping[str, str] | None = None
) -> tuple[StageRow, ...]:
    """The rows with what changed since the last row that was scored, its share of the whole loss, and any suspicion.

    rows: stages in order. losses: of every scored token in nats (tokens,), None for a failed row. exact: name of a row -> name of
    the row before it whose results it must reproduce but for rounding.
    """
    scored = [(i, loss.astype(np.float64)) for i, loss in enumerate(losses) if loss is not None]
    if not scored:
        return tuple(rows)
    result = list(rows)
    total = scored[-1][1].mean() - scored[0][1].mean()
    for (first, earlier), (second, loss) in pairwise(scored):
        change = float((loss - earlier).mean())
        row = replace(
            rows[second],
            change_nats=change,
            token_change_nats=float(np.abs(loss - earlier).mean()),
            share=float(change / total) if total > LEAST else None,
        )
        must_equal = (exact or {}).get(row.name) == rows[first].name
        result[second] = replace(row, suspect=_suspicion(rows[first], row, must_equal))
    return tuple(result)


def _suspicion(before: StageRow, row: StageRow, must_equal: bool) -> str | None:
    change = row.token_change_nats or 0.0
    if must_equal and not change <= EXACT:
        return (
            f"does not reproduce the {before.name} checkpoint that it was exported from: the loss of a token moves by "
            f"{change:.2g} nats on average ({EXACT:g} is allowed); the files are damaged or belong to another model"
        )
    if before.name != "onnx_level_0" or before.perplexity is None or row.perplexity is None:
        return None
    if not row.perplexity <= ACTIVATION_TOLERANCE * before.perplexity:
        growth = 100 * (row.perplexity / before.perplexity - 1)
        raised = f"int8 activations (or a cache of int8) raise perplexity by {growth:.1f} %"
        return f"{raised}; export with --accuracy-level 0 (without --cache)"
    return None
