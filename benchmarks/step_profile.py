"""An artifact on a target: logits beside the CPU's and torch's, speed, and where a step spends its time by operator and provider.

    python benchmarks/step_profile.py ARTIFACT --target cuda [--checkpoint QUANTIZED]

The plain clock of one process, no warm-up beyond one prompt: for a first look. ``edgepress bench`` is what a report is made of.
"""

from __future__ import annotations

import argparse
import collections
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime
from edgepress.pipeline.runtime import targets
from edgepress.pipeline.runtime.decoder import Decoder

PROMPTS, STEPS = (32, 128, 512, 2000), 150
SHOWN = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--target", default="cpu", choices=targets.TARGETS)
    parser.add_argument("--checkpoint", type=Path, help="what it was exported from, to compare logits with torch in float32")
    options = parser.parse_args()
    if options.checkpoint:
        compare(options.artifact, options.checkpoint, options.target)
    profile(options.artifact, options.target)
    speed(options.artifact, options.target)


def compare(artifact: Path, checkpoint: Path, target: str) -> None:
    """Divergence from torch of 64 positions read at once, and one after the other."""
    from edgepress.pipeline.checkpoint.folder import Checkpoint
    from edgepress.pipeline.metrics.torch_scores import logits_of

    ids = np.random.default_rng(0).integers(1, 4000, 64)
    truth = logits_of(Checkpoint(checkpoint).model(), ids)
    for name in dict.fromkeys((target, "cpu")):
        at_once = Decoder(artifact, target=name).forward([ids])[0]
        decoder = Decoder(artifact, target=name)
        for how, logits in (("at once", at_once), ("in steps", np.concatenate([decoder.feed(ids[i : i + 1]) for i in range(64)]))):
            divergence = (np.exp(logarithms(truth)) * (logarithms(truth) - logarithms(logits))).sum(-1).mean()
            print(f"{name}, {how}: logits {np.abs(logits - truth).max():.4f} from torch's at most, KL divergence {divergence:.6f}")


def logarithms(logits: np.ndarray) -> np.ndarray:
    """Log probabilities, float64."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    found: np.ndarray = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return found


def profile(artifact: Path, target: str) -> None:
    """Milliseconds a step of a prompt of 128 tokens and 40 steps after it, which hold the first call's set-up."""
    plain = onnxruntime.InferenceSession
    with tempfile.TemporaryDirectory() as folder:

        def profiled(model: str, options: onnxruntime.SessionOptions, **rest: object) -> onnxruntime.InferenceSession:
            options.enable_profiling, options.profile_file_prefix = True, f"{folder}/profile"
            return plain(model, options, **rest)

        onnxruntime.InferenceSession = profiled
        try:
            decoder = Decoder(artifact, target=target)
        finally:
            onnxruntime.InferenceSession = plain
        decoder.feed(np.arange(1, 129))
        for _ in range(40):
            decoder.feed(np.array([5]))
        events = json.loads(Path(decoder.session.end_profiling()).read_text())
    times, counts = collections.Counter[tuple[str, str]](), collections.Counter[tuple[str, str]]()
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            key = event["args"]["provider"], event["args"]["op_name"]
            times[key], counts[key] = times[key] + event["dur"], counts[key] + 1
    for (provider, operator), spent in times.most_common(SHOWN):
        nodes = counts[provider, operator] / 41
        print(f"{provider.removesuffix('ExecutionProvider')} {operator}: {spent / 41e3:.3f} ms a step, {nodes:.0f} nodes")


def speed(artifact: Path, target: str) -> None:
    """Medians of five prompts of each length, and of the steps after a short one."""
    decoder = Decoder(artifact, target=target)
    for length in PROMPTS:
        if length < decoder.context:
            seconds = []
            for _ in range(5):
                decoder.reset()
                seconds.append(timed(decoder, np.arange(1, length + 1)))
            print(f"prefill of {length}: {length / np.median(seconds):.0f} tokens/s")
    decoder.reset()
    decoder.feed(np.arange(1, 33))
    steps = [timed(decoder, np.array([7])) for _ in range(STEPS)]
    print(f"decode: {1 / np.median(steps):.0f} tokens/s; GPU memory {targets.gpu_memory() if target == 'cuda' else 'none'}")


def timed(decoder: Decoder, ids: np.ndarray) -> float:
    begun = time.perf_counter()
    decoder.feed(ids)
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
