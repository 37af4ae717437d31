"""Which decoder blocks to remove: each criterion yields a set for one block, for two, and so on up to the amount asked for."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field

import numpy as np
from edgepress.pipeline.checkpoint.blocks import Blocks
from edgepress.pipeline.metrics.torch_scores import batches, mean_loss
from edgepress.pipeline.options import HEALED_TOKENS, PruneOptions
from edgepress.pipeline.prune.healed import HealedTrials, can_heal
from edgepress.pipeline.prune.influence import Influence
from edgepress.pipeline.prune.parts import HealedPartTrials, Parts, influence_of
from edgepress.pipeline.prune.trials import Trials, divergence_sums

log = logging.getLogger("edgepress")


@dataclass(frozen=True)
class Trial:
    """A set of blocks without which the model was measured: KL(original || model without them), nats a token."""

    layers: list[int]
    kl: float


@dataclass(frozen=True)
class Round:
    """One removal by ``greedy`` or ``healed``: the block removed, the KL of each candidate in nats a token, and the seconds.

    healed: the candidates that something could make up for; the KL of the others is as they go.
    """

    removed: int
    kl: dict[int, float]
    seconds: float
    healed: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class PathStep:
    """A set of blocks tried against a limit, and by how many nats a token the held-out loss grows without them.

    Of two kinds of text the greater growth; by ``healed`` that of the healed model; None where ``kl`` exceeds the limit already.
    kl: KL(original || model without them) of the trial, None where the criterion measures none.
    """

    layers: list[int]
    loss_growth: float | None
    kl: float | None = None


@dataclass(frozen=True)
class Choice:
    """Which blocks to remove, and how they were chosen.

    removed: block indices, ascending. path: the sets tried against a limit, in order. rounds: what ``greedy`` or ``healed``
    measured, one entry a removal. sets: greedy's set and those of other criteria, compared at the end. evaluations: sets tried by
    measurement, and the seconds they took. criterion: what chose in the end.
    """

    removed: list[int]
    path: list[PathStep] = field(default_factory=list)
    rounds: list[Round] = field(default_factory=list)
    sets: list[Trial] = field(default_factory=list)
    evaluations: int = 0
    seconds: float = 0.0
    criterion: str = "list"


@dataclass
class Search:
    """What a criterion chooses by, and the record of what it measured.

    windows: what trials are measured on, never held-out text. fitting: what a healing is solved on. limit: what a set may cost,
    None where the amount is given. unhealed: a context in which the weights are what they were, whatever a criterion changed.
    """

    blocks: Blocks
    influence: Influence
    windows: list[np.ndarray]
    fitting: list[np.ndarray]
    shortlist: int
    limit: float | None = None
    rounds: list[Round] = field(default_factory=list)
    sets: list[Trial] = field(default_factory=list)
    evaluations: int = 0
    seconds: float = 0.0
    unhealed: Callable[[], AbstractContextManager[None]] = nullcontext

    def by_influence(self, influence: Influence) -> list[int]:
        """Blocks from the least influence on; without those that lack what is to be removed."""
        absent = self.blocks.absent if isinstance(self.blocks, Parts) else ()
        return [index for index in np.argsort(influence.block_influence, kind="stable").tolist() if index not in absent]

    def count(self, evaluations: int, begun: float) -> float:
        """Add so many trials, begun at this time of the monotonic clock, to the record; returns the seconds they took."""
        seconds = time.monotonic() - begun
        self.evaluations += evaluations
        self.seconds += seconds
        return seconds


def choose(
    options: PruneOptions,
    amount: int,
    blocks: Blocks,
    influence: Influence,
    ranking: list[np.ndarray],
    held_out: list[np.ndarray],
    other: tuple[list[np.ndarray], list[np.ndarray]] | None = None,
) -> Choice:
    """The blocks to remove: ``amount`` of them, or as many as keep the loss on ``held_out`` within options.max_loss.

    other: windows of another kind, which chooses, too, and which a limit holds for, too: what heals could learn one kind of text.
    """
    if options.remove_layers:
        return Choice(sorted(options.remove_layers))
    criterion = str(options.criterion)
    if criterion == "healed" and amount and not can_heal(blocks, ranking[0]):
        log.info(
            "prune: no matrix of these blocks can make up for one that goes, so layers are chosen as the model is without healing"
        )
        criterion = "greedy"
    search = Search(blocks, influence, _first_tokens(ranking, options.greedy_tokens), [], options.shortlist, options.max_loss)
    judged = [held_out]
    if criterion == "healed":
        search.windows, search.fitting = _judging_and_fitting(options.greedy_tokens, ranking, other[0] if other else [])
        judged += [other[1]] if other else []
    removed, path = list[int](), list[PathStep]()
    with closing(CRITERIA[criterion](search, amount)) as sets:
        if options.max_loss is not None:
            removed, path = _within(options.max_loss, sets, search, judged)
        else:
            *_, removed = [], *sets  # the last is the set of ``amount`` blocks
    if options.max_loss is None and criterion == "greedy" and amount > 1:
        removed = _best_of(search, removed)
    return Choice(removed, path, search.rounds, search.sets, search.evaluations, search.seconds, criterion)


def _judging_and_fitting(
    budget: int, ranking: list[np.ndarray], other: list[np.ndarray]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Disjoint windows: ``budget`` tokens to judge trials by, half of them of the other text, and those to solve healings on.

    Of a short text a fifth judges.
    """
    own = _first_tokens(ranking, min(budget // 2 if other else budget, sum(map(len, ranking)) // 5))
    judging = own + (_first_tokens(other, budget // 2) if other else [])
    return judging, _first_tokens(ranking[len(own) :], HEALED_TOKENS * budget)


def _within(
    limit: float, sets: Iterable[list[int]], search: Search, texts: list[list[np.ndarray]]
) -> tuple[list[int], list[PathStep]]:
    """The last of the growing ``sets`` that keeps what it costs within ``limit`` nats a token, and the sets tried.

    What it costs is the growth of the loss on each text, and the KL divergence where the criterion measures it: by that the loss
    grows on what the model itself writes. A text that the model knows badly can hide that it predicts otherwise: Qwen2.5-Coder-0.5B
    without layer 10, healed, loses 0.007 on prose, and its predictions move by 0.060.
    """
    blocks, removed, path, before = search.blocks, list[int](), list[PathStep](), list[float]()
    for layers in sets:
        kl = search.rounds[-1].kl[search.rounds[-1].removed] if search.rounds else None
        growth, said = None, [] if kl is None else [f"the predictions move by {kl:.4f} nats (KL)"]
        if kl is None or kl <= limit:  # held-out text may take as long to read as the set took to try
            if not before:
                with search.unhealed():
                    before = [mean_loss(blocks, windows) for windows in texts]
            with blocks.without(layers):
                growths = [mean_loss(blocks, windows) - loss for windows, loss in zip(texts, before, strict=True)]
            growth = float(np.max(growths))  # not a number where one of them is none, which Python's max may hide
            said.insert(0, f"the held-out loss grows by {growth:.4f} nats")
        path.append(PathStep(layers, growth, kl))
        healed = search.rounds and search.rounds[-1].removed in search.rounds[-1].healed
        log.info("without %s%s %s", listed(layers), " and healed" if healed else "", ", and ".join(said))
        if growth is None or not growth <= limit:
            log.info("%g is allowed (--max-loss): %s will be removed", limit, listed(removed))
            break
        removed = layers
    return removed, path


def listed(layers: Sequence[int]) -> str:
    """``layers 2, 10``, ``layer 2`` or ``no layer``."""
    return f"layer{'s'[: len(layers) != 1]} {', '.join(map(str, layers))}" if layers else "no layer"


def bi(search: Search, amount: int) -> Generator[list[int]]:
    """The blocks of lowest Block Influence (ShortGPT, section 3)."""
    order = search.by_influence(search.influence)
    yield from (sorted(order[: count + 1]) for count in range(amount))


def angular(search: Search, amount: int) -> Generator[list[int]]:
    """The contiguous run across which the residual stream turns least (Gromov et al. 2024, section 3.2)."""
    for length in sorted(search.influence.angles):
        if length <= amount:
            first = int(np.argmin(search.influence.angular_distance(length)))
            yield list(range(first, first + length))


def greedy(search: Search, amount: int) -> Generator[list[int]]:
    """One block after another: of those of lowest Block Influence among the rest, the one whose removal costs least.

    The cost is the mean KL divergence from the whole model on the ranking text.
    """
    yield from _one_by_one(search, amount, "greedy", Trials(search.blocks, search.windows))


def healed(search: Search, amount: int) -> Generator[list[int]]:
    """As ``greedy``, by what a removal costs once the matrix before the gap makes up for it: see healed.py.

    While the caller looks at a set, the model is healed for it. Where a limit is given that healing could not keep to, nothing is
    healed: what a set costs is what it costs as it goes.
    """
    kind = HealedPartTrials if isinstance(search.blocks, Parts) else HealedTrials
    trials = kind(search.blocks, search.windows, search.fitting, search.limit)
    try:
        yield from _one_by_one(search, amount, "healed", trials)
    finally:
        trials.restore()


CRITERIA = {"bi": bi, "angular": angular, "greedy": greedy, "healed": healed}


def _one_by_one(search: Search, amount: int, name: str, trials: Trials) -> Generator[list[int]]:
    """The sets of one block, of two and so on that the cheapest trial of each round makes."""
    removed: list[int] = []
    search.unhealed = trials.unhealed
    for count in range(amount):
        begun = time.monotonic()
        with search.blocks.without(removed):
            influence = influence_of(search.blocks, search.windows) if removed else search.influence
        rest = [index for index in search.by_influence(influence) if index not in removed]
        candidates = sorted(rest[: search.shortlist])
        before = trials.tried
        costs = trials.costs(removed, candidates, f"{name}, layer {count + 1} of {amount}")
        best = min(candidates, key=lambda index: costs[index])
        trials.remove(best)
        removed = sorted([*removed, best])
        seconds = search.count(trials.tried - before, begun)
        search.rounds.append(Round(best, costs, seconds, trials.healed))
        log.info(
            "%s: layer %d costs least (KL %.4f, of %d tried, next %s; %.1f s)",
            name, best, costs[best], len(candidates), _runner_up(costs, best), seconds,
        )  # fmt: skip
        yield removed


def _best_of(search: Search, removed: list[int]) -> list[int]:
    """The best of greedy's set and those of the other criteria: one step at a time can miss what a whole set does."""
    begun = time.monotonic()
    sets = [removed]
    for criterion in (bi, angular) if search.influence.angles else (bi,):
        *_, other = criterion(search, len(removed))
        if other not in sets:
            sets.append(other)
    if len(sets) == 1:
        return removed
    costs = kl_without(search.blocks, sets, search.windows)
    search.count(len(sets), begun)
    search.sets.extend(Trial(layers, cost) for layers, cost in zip(sets, costs, strict=True))
    return sets[int(np.argmin(costs))]


def kl_without(blocks: Blocks, sets: list[list[int]], windows: list[np.ndarray]) -> list[float]:
    """Mean KL(original || model without the blocks of a set) in nats a token, for each set."""
    last, sums, tokens = len(blocks), np.zeros(len(sets)), 0
    for ids, real in batches(blocks.model, windows):
        original, leaving = blocks.states(ids, [last])[last], []
        for removed in sets:
            with blocks.without(removed):
                leaving.append(blocks.states(ids, [last])[last])
        sums += divergence_sums(blocks, original, leaving, real)
        tokens += int(real.sum())
    return [float(total) / tokens for total in sums]


def _first_tokens(windows: list[np.ndarray], budget: int) -> list[np.ndarray]:
    """Whole windows from the front until there are ``budget`` tokens, one window at least."""
    ends = np.cumsum([len(row) for row in windows])
    return windows[: int(np.searchsorted(ends, budget)) + 1]


def _runner_up(costs: dict[int, float], best: int) -> str:
    others = {index: cost for index, cost in costs.items() if index != best}
    if not others:
        return "none"
    second = min(others, key=lambda index: others[index])
    return f"layer {second} {others[second]:.4f}"
