"""Which decoder blocks to remove: each criterion yields a set for one block, for two, and so on up to the amount asked for."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from edgepress.pipeline.checkpoint.blocks import Blocks
from edgepress.pipeline.metrics.torch_scores import batches, divergences, mean_loss
from edgepress.pipeline.options import PruneOptions
from edgepress.pipeline.progress import bar
from edgepress.pipeline.prune.influence import Influence, measure_influence

log = logging.getLogger("edgepress")


@dataclass(frozen=True)
class Choice:
    """Which blocks to remove, and how that was found.

    removed: block indices, ascending. path: held-out loss in nats of each set tried against a limit. rounds: what
    ``greedy`` measured, one entry a removal. evaluations: sets tried by measurement, and the seconds they took.
    """

    removed: list[int]
    path: list[dict[str, Any]] = field(default_factory=list)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    evaluations: int = 0
    seconds: float = 0.0


@dataclass
class Search:
    """What a criterion chooses by, and the record of what it measured.

    windows: the ranking text that trials are measured on, never the held-out one.
    """

    blocks: Blocks
    influence: Influence
    windows: list[np.ndarray]
    shortlist: int
    rounds: list[dict[str, Any]] = field(default_factory=list)
    evaluations: int = 0
    seconds: float = 0.0


def choose(
    options: PruneOptions, amount: int, blocks: Blocks, influence: Influence, ranking: list[np.ndarray], held_out: list[np.ndarray]
) -> Choice:
    """The blocks to remove: ``amount`` of them, or as many as keep the loss on ``held_out`` within options.max_loss."""
    if options.remove_layers:
        return Choice(sorted(options.remove_layers))
    search = Search(blocks, influence, _first_tokens(ranking, options.greedy_tokens), options.shortlist)
    limit, removed, path = options.max_loss, list[int](), []
    before = mean_loss(blocks.model, held_out) if limit is not None else 0.0
    for wanted in CRITERIA[str(options.criterion)](search, amount):
        if limit is not None:
            with blocks.without(wanted):
                growth = mean_loss(blocks.model, held_out) - before
            path.append({"layers": wanted, "held_out_loss_growth": round(growth, 6)})
            log.info("without layers %s the held-out loss grows by %.4f nats", ", ".join(map(str, wanted)), growth)
            if growth > limit:
                log.info("that is more than --max-loss %g: %s will be removed", limit, listed(removed))
                break
        removed = wanted
    if limit is None and options.criterion == "greedy" and amount > 1:
        removed = _best_of(search, removed)
    return Choice(removed, path, search.rounds, search.evaluations, search.seconds)


def listed(layers: Sequence[int]) -> str:
    """``layers 2, 10`` or ``no layer``."""
    return f"layers {', '.join(map(str, layers))}" if layers else "no layer"


def bi(search: Search, amount: int) -> Iterator[list[int]]:
    """The blocks of lowest Block Influence (ShortGPT, section 3)."""
    order = np.argsort(search.influence.block_influence, kind="stable").tolist()
    yield from (sorted(order[: count + 1]) for count in range(amount))


def angular(search: Search, amount: int) -> Iterator[list[int]]:
    """The contiguous run across which the residual stream turns least (Gromov et al. 2024, section 3.2)."""
    for length in sorted(search.influence.angles):
        if length <= amount:
            first = int(np.argmin(search.influence.angular_distance(length)))
            yield list(range(first, first + length))


def greedy(search: Search, amount: int) -> Iterator[list[int]]:
    """One block after another: of those of lowest Block Influence in what is left, the one that costs least when left out.

    The cost is the mean KL divergence from the whole model on the ranking text.
    """
    removed: list[int] = []
    for count in range(amount):
        begun = time.monotonic()
        with search.blocks.without(removed):
            influence = (
                measure_influence(search.blocks, search.windows).block_influence if removed else search.influence.block_influence
            )
        left = [index for index in np.argsort(influence, kind="stable").tolist() if index not in removed]
        candidates = sorted(left[: search.shortlist])
        costs = _costs(search, removed, candidates, f"greedy, layer {count + 1} of {amount}")
        best = min(candidates, key=lambda index: costs[index])
        removed = sorted([*removed, best])
        seconds = time.monotonic() - begun
        _count(search, len(candidates), seconds)
        search.rounds.append(
            {"removed": best, "kl": {str(i): round(costs[i], 6) for i in candidates}, "seconds": round(seconds, 2)}
        )
        log.info(
            "greedy: layer %d goes (KL %.4f, the best of %d candidates, next %s; %.1f s)",
            best, costs[best], len(candidates), _runner_up(costs, best), seconds,
        )  # fmt: skip
        yield removed


CRITERIA = {"bi": bi, "angular": angular, "greedy": greedy}


def _costs(search: Search, removed: list[int], candidates: list[int], label: str) -> dict[int, float]:
    """Mean KL(original || without ``removed`` and one candidate), in nats a token, for each candidate.

    All candidates share the blocks before them: each starts from the state that enters it in the model without ``removed``.
    """
    blocks, sums, tokens = search.blocks, dict.fromkeys(candidates, 0.0), 0
    parts = batches(blocks.model, search.windows)
    with bar(label, len(parts) * len(candidates), "trial") as shown:
        for ids, real in parts:
            original = blocks.logits(ids)[real]
            with blocks.without(removed):
                states = blocks.states(ids, candidates)
            for index in candidates:
                with blocks.entering(index + 1, states[index]), blocks.without(removed):
                    sums[index] += float(divergences(original, blocks.logits(ids)[real]).double().sum())
                shown.update()
            tokens += int(real.sum())
    return {index: total / tokens for index, total in sums.items()}


def _best_of(search: Search, found: list[int]) -> list[int]:
    """One step at a time can miss what a whole set does: the sets of the other criteria are tried beside the one found."""
    begun = time.monotonic()
    sets = [found]
    for criterion in (bi, angular):
        *_, other = criterion(search, len(found))
        if other not in sets:
            sets.append(other)
    if len(sets) == 1:
        return found
    costs = kl_without(search.blocks, sets, search.windows)
    _count(search, len(sets), time.monotonic() - begun)
    search.rounds.append({"sets": [{"layers": s, "kl": round(c, 6)} for s, c in zip(sets, costs, strict=True)]})
    return sets[int(np.argmin(costs))]


def kl_without(blocks: Blocks, sets: list[list[int]], windows: list[np.ndarray]) -> list[float]:
    """Mean KL(original || model without the blocks of a set) in nats a token, for each set."""
    sums, tokens = [0.0] * len(sets), 0
    for ids, real in batches(blocks.model, windows):
        original = blocks.logits(ids)[real]
        for place, removed in enumerate(sets):
            with blocks.without(removed):
                sums[place] += float(divergences(original, blocks.logits(ids)[real]).double().sum())
        tokens += int(real.sum())
    return [total / tokens for total in sums]


def _first_tokens(windows: list[np.ndarray], budget: int) -> list[np.ndarray]:
    """Whole windows from the front until there are ``budget`` tokens, one window at least."""
    ends = np.cumsum([len(row) for row in windows])
    return windows[: int(np.searchsorted(ends, budget)) + 1]


def _count(search: Search, evaluations: int, seconds: float) -> None:
    search.evaluations += evaluations
    search.seconds += seconds


def _runner_up(costs: dict[int, float], best: int) -> str:
    others = {index: cost for index, cost in costs.items() if index != best}
    return f"layer {(second := min(others, key=lambda i: others[i]))} {others[second]:.4f}" if others else "none"
