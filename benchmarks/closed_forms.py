"""Published ways to make up for removed layers without training, beside that of ``heal --healer linear``, at the same gaps.

    python benchmarks/closed_forms.py MODEL --remove 14,15,17 --calibration self --text stories.txt --text wiki.txt

Every form changes what leaves the block before a gap, from statistics of the same windows, gap after gap on the stream that the
model changed so far has. Prints Markdown: mean KL divergence from the whole model on each text, nats a token, float32. Nothing is
written, judged on held-out text or refused: this compares forms, not artifacts.

- magnitude: the state times the mean of |L| / |X| over tokens (after Prune&Comp, Chen et al. 2025); X the state before the gap, L
  the state behind it in the whole model, |.| the length of a token's state.
- channels: each channel times E|L_c| / E|X_c|; rotated: the same in an orthogonal basis of Hadamard's kind (after LinearPatch, Chen
  et al. 2025).
- map: the MLP's output M times a matrix T, least squares of M T + Y - L, Y what M is added to (ReplaceMe, Shopkhoev et al. 2025,
  section 3); cosine: T by Adam on the cosine distance, from that solution.
- linear: any change of the matrix that writes M, least squares weighted by 1 / |L|^2; the ridge by the error of the last eighth.
- constant: that and a constant vector, which a matrix without a bias cannot hold; linear, cosine: from there on by Adam.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from edgepress.pipeline.checkpoint.blocks import BlockArgs, BlockOutput, Blocks, block_output
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.checkpoint.least_squares import Sums, last_matrix
from edgepress.pipeline.metrics.torch_scores import divergences, logits_of
from edgepress.pipeline.options import HealOptions
from edgepress.pipeline.own_text.kept import with_text
from edgepress.pipeline.text.windows import text_windows

RIDGES = (0.0, 1e-3, 1e-2, 1e-1, 1.0)
STEPS, RATE, BATCH = 600, 1e-3, 1024  # of Adam on the cosine distance
Patch = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # state, MLP's output, what enters its last matrix


Form = Callable[["Seen"], "Patch | None"]


@dataclass(frozen=True)
class Seen:
    """Rows a token: the state that leaves the block, the output of its last matrix, what enters that, and what should leave."""

    state: torch.Tensor
    output: torch.Tensor
    entering: torch.Tensor
    target: torch.Tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--remove", type=lambda text: [int(part) for part in text.split(",")], required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--calibration-tokens", type=int, default=16384)
    parser.add_argument("--text", type=Path, action="append", required=True)
    parser.add_argument("--text-tokens", type=int, default=4096)
    options = parser.parse_args()
    blocks = Blocks(Checkpoint(options.model).model())
    given = with_text(HealOptions(original=options.model, calibration=options.calibration), options.model)
    windows = text_windows(given.calibration, options.model, budget=options.calibration_tokens, length=512)
    texts = {path.stem: text_windows(path, options.model, budget=options.text_tokens, length=512) for path in options.text}
    judge, gaps = Judge(blocks, texts, options.remove), Gaps(blocks, options.remove, windows)
    print("| form |" + "".join(f" {name} |" for name in texts) + " mean |")
    print("| --- |" + " ---: |" * (len(texts) + 1))
    for name, form in FORMS.items():
        scores = judge(gaps.closed(form))
        print(f"| {name} | " + " | ".join(f"{score:.4f}" for score in [*scores, float(np.mean(scores))]) + " |", flush=True)


class Judge:
    """KL from the whole model on each text, of the model without the layers ``removed`` and with some patches."""

    def __init__(self, blocks: Blocks, texts: dict[str, list[np.ndarray]], removed: Sequence[int]) -> None:
        self.blocks, self.texts, self.removed = blocks, texts, removed
        self.truth = {name: [torch.from_numpy(logits_of(blocks.model, ids)) for ids in rows] for name, rows in texts.items()}

    def __call__(self, patches: dict[int, Patch]) -> list[float]:
        """Nats a token, a number a text."""
        with patched(self.blocks, patches), self.blocks.without(self.removed):
            return [
                float(torch.cat([self._divergence(*pair) for pair in zip(self.truth[name], rows, strict=True)]).mean())
                for name, rows in self.texts.items()
            ]

    def _divergence(self, truth: torch.Tensor, ids: np.ndarray) -> torch.Tensor:
        return divergences(truth, torch.from_numpy(logits_of(self.blocks.model, ids))).double()


def patched(blocks: Blocks, patches: dict[int, Patch]) -> ExitStack:
    """Within the context what leaves these blocks is changed."""
    stack, ids = ExitStack(), torch.arange(32)[None]
    for index, patch in patches.items():
        seen = dict[str, torch.Tensor]()

        def look(module: torch.nn.Module, args: BlockArgs, output: torch.Tensor, seen: dict[str, torch.Tensor] = seen) -> None:
            seen.update(entering=args[0], output=output)

        def change(
            module: torch.nn.Module,
            args: BlockArgs,
            output: BlockOutput,
            patch: Patch = patch,
            seen: dict[str, torch.Tensor] = seen,
        ) -> BlockOutput:
            state = patch(block_output(output), seen["output"].reshape(block_output(output).shape), seen["entering"])
            return (state, *output[1:]) if isinstance(output, tuple) else state

        matrix = last_matrix(blocks, index, ids).matrix
        stack.callback(matrix.register_forward_hook(look).remove)
        stack.callback(blocks.modules[index].register_forward_hook(change).remove)
    return stack


class Gaps:
    """The gaps that ``removed`` leaves, and what is seen at each; at the first gap all forms see the same."""

    def __init__(self, blocks: Blocks, removed: Sequence[int], windows: list[np.ndarray]) -> None:
        self.blocks, self.removed, self.windows = blocks, removed, [torch.from_numpy(ids)[None] for ids in windows]
        kept = [index for index in range(len(blocks) + 1) if index not in removed]
        self.gaps = [(before, after) for before, after in pairwise(kept) if after - before > 1]
        wanted = [blocks.states(ids, [after for _, after in self.gaps]) for ids in self.windows]
        self.targets = {after: torch.cat([states[after][0] for states in wanted]) for _, after in self.gaps}
        self.first = self._look({}, *self.gaps[0])

    def closed(self, form: Form) -> dict[int, Patch]:
        """The patch of each gap, in order, by the block before it."""
        patches: dict[int, Patch] = {}
        for before, after in self.gaps:
            patch = form(self._look(patches, before, after) if patches else self.first)
            if patch is None:
                return {}
            patches[before] = patch
        return patches

    def _look(self, patches: dict[int, Patch], before: int, after: int) -> Seen:
        """What there is behind block ``before``, on the stream that the patches so far give."""
        matrix = last_matrix(self.blocks, before, torch.arange(32)[None]).matrix
        rows: list[tuple[torch.Tensor, ...]] = []
        seen = dict[str, torch.Tensor]()
        handle = matrix.register_forward_hook(lambda module, args, output: seen.update(entering=args[0], output=output))
        with patched(self.blocks, patches), self.blocks.without(self.removed):
            for ids in self.windows:
                state = self.blocks.states(ids, [before + 1])[before + 1][0]
                rows.append((state, seen["output"].reshape(state.shape), seen["entering"].reshape(len(state), -1)))
        handle.remove()
        return Seen(*(torch.cat(parts) for parts in zip(*rows, strict=True)), target=self.targets[after])


def none(seen: Seen) -> Patch | None:
    return None


def magnitude(seen: Seen) -> Patch:
    factor = (seen.target.norm(dim=-1) / seen.state.norm(dim=-1).clamp_min(1e-6)).mean()
    return lambda state, output, entering: state * factor


def channels(seen: Seen) -> Patch:
    factors = seen.target.abs().mean(0) / seen.state.abs().mean(0)
    return lambda state, output, entering: state * factors


def rotated(seen: Seen) -> Patch:
    basis = hadamard(seen.state.shape[1])
    factors = (seen.target @ basis).abs().mean(0) / (seen.state @ basis).abs().mean(0)
    whole = basis @ torch.diag(factors) @ basis.T
    return lambda state, output, entering: state @ whole


def hadamard(width: int) -> torch.Tensor:
    """Orthogonal, (width, width): Sylvester's matrices on the power of two in ``width``, a discrete cosine on what is left."""
    power = width & -width
    basis = torch.ones(1, 1)
    while len(basis) < power:
        basis = torch.cat([torch.cat([basis, basis], 1), torch.cat([basis, -basis], 1)])
    rest, n = torch.arange(width // power).double(), width // power
    cosine = torch.cos(torch.pi / n * (rest[:, None] + 0.5) * rest[None]) * (2 / n) ** 0.5
    cosine[:, 0] /= 2**0.5
    return torch.kron(cosine.float(), basis / power**0.5)


def solved(features: torch.Tensor, missing: torch.Tensor, weights: torch.Tensor) -> Callable[[float], torch.Tensor]:
    sums = Sums.empty(features.shape[1], missing.shape[1])
    sums.add(features, missing, weights)
    return lambda ridge: sums.solved(ridge).float()


def mapped(seen: Seen) -> Patch:
    found = solved(seen.output, seen.target - seen.state, torch.ones(len(seen.state), 1))(1e-4)
    return lambda state, output, entering: state + output @ found


def turned(start: torch.Tensor, features: torch.Tensor, seen: Seen, count: int) -> torch.Tensor:
    """The change from ``start`` on, by Adam, to the largest cosine of state + features @ change and target, on ``count`` rows."""
    found = start.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([found], lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        rows = torch.randint(count, (BATCH,), generator=generator)
        loss = 1 - torch.cosine_similarity(seen.state[rows] + features[rows] @ found, seen.target[rows], dim=-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return found.detach()


def cosine(seen: Seen) -> Patch:
    start = solved(seen.output, seen.target - seen.state, torch.ones(len(seen.state), 1))(1e-4)
    found = turned(start, seen.output, seen, len(seen.state))
    return lambda state, output, entering: state + output @ found


def fitted(constant: bool = False, by_cosine: bool = False) -> Form:
    """The free change, with or without a constant, or from there on by cosine; the ridge by the error of the last eighth."""

    def extended(entering: torch.Tensor) -> torch.Tensor:
        return torch.cat([entering, torch.ones(*entering.shape[:-1], 1)], -1) if constant else entering

    def form(seen: Seen) -> Patch:
        count, weights = len(seen.state) * 7 // 8, 1 / seen.target.norm(dim=-1, keepdim=True).clamp_min(1e-6)
        features, missing = extended(seen.entering), seen.target - seen.state
        by_ridge = solved(features[:count], missing[:count], weights[:count])
        errors = {
            r: float(((features[count:] @ by_ridge(r) - missing[count:]) * weights[count:]).square().sum()) for r in RIDGES[1:]
        }
        found = by_ridge(min(errors, key=lambda ridge: errors[ridge]))
        found = turned(found, features, seen, count) if by_cosine else found
        return lambda state, output, entering: state + (extended(entering) @ found).reshape(state.shape)

    return form


FORMS: dict[str, Form] = {
    "none": none, "magnitude": magnitude, "channels": channels, "rotated": rotated, "map": mapped, "cosine": cosine,
    "linear": fitted(), "constant": fitted(constant=True), "linear, cosine": fitted(by_cosine=True),
}  # fmt: skip

if __name__ == "__main__":
    main()
