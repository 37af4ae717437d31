"""Builds killed before a file-system step or at a random moment: what is left is whole, and the same command goes on.

PYTHONPATH=tests python -m campaign.kills --seed 1 --seconds 60
"""  # fmt: skip

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

from campaign.forks import Outcome, Place, broken, content, ended, hidden, last_line, prepared, report, said, scratch, start

STAGES = ["01-prune", "02-quantize", "03-export"]
# The choice of activations rests on a timing: fixed here, or the bytes differ from run to run.
RECIPE = """
prune: {remove_count: 1, calibration_tokens: 256}
quantize: {method: rtn, bits: 4, group_size: 32}
export: {accuracy_level: "0"}
"""


def run(seed: int, seconds: float) -> Outcome:
    """Kill builds until the time is over, each at another step or moment."""
    outcome, random_ = Outcome(), random.Random(seed)
    with scratch() as folder:
        place, begun = prepared(Path(folder)), time.monotonic()
        (place.folder / "recipe.yaml").write_text(RECIPE)
        whole = place.folder / "undisturbed"
        before = time.monotonic()
        process = start(command(place, whole / "out"), whole, steps=place.folder / "steps")
        assert ended(process) == 0, last_line(whole)
        took, wanted = time.monotonic() - before, content(whole / "out")
        steps = list(range(1, 1 + len((place.folder / "steps").read_text().splitlines())))
        random_.shuffle(steps)
        while time.monotonic() - begun < seconds:
            number = sum(outcome.tried.values())
            trial, moment = place.folder / f"trial{number}", random_.uniform(0, took)
            step = steps.pop() if steps and number % 3 else 0
            name = random_.choice(["SIGKILL", "SIGKILL", "SIGTERM", "SIGINT"])
            kind = f"{name} before a file-system step" if step else f"{name} at a random moment"
            outcome.tried[kind] += 1
            faults = killed(place, trial, step, moment, getattr(signal, name), wanted)
            where = f"step {step}" if step else f"{moment:.2f} s"
            outcome.faults += [f"seed {seed}, trial {number}, {kind} ({where}): {fault}" for fault in faults]
            shutil.rmtree(trial, ignore_errors=True)
    return outcome


def command(place: Place, out: Path) -> list[object]:
    texts = ["--calibration", place.text, "--text", place.text]
    return ["build", place.model, out, "--recipe", place.folder / "recipe.yaml", *texts]


def killed(place: Place, trial: Path, step: int, moment: float, sent: int, wanted: dict[str, str]) -> list[str]:
    """Faults of one trial."""
    out = trial / "out"
    process = start(command(place, out), trial, at=step, sent=sent)
    if not step:
        time.sleep(moment)
        os.kill(process, sent)
    code, faults = ended(process), []
    if code not in (0, 130, -sent):
        faults.append(f"exit code {code} after the signal: {last_line(trial)}")
    finished = [name for name in STAGES if (out / name).exists()]
    faults += [f"passes for whole: {fault}" for fault in broken(out)]
    if code == 130 and out.is_dir() and hidden(out):
        faults.append(f"a polite end leaves {hidden(out)[:3]}")
    begun = said(trial).count("already done")
    code = ended(start(command(place, out), trial))
    if code != 0 or "Traceback" in said(trial):
        faults.append(f"the same command again: exit code {code}: {last_line(trial)}")
    if said(trial).count("already done") - begun != len(finished):
        faults.append(f"the same command again keeps not all of {finished}")
    if content(out) != wanted:
        faults.append(f"other bytes than undisturbed: {sorted(content(out).items() ^ wanted.items())[:2]}")
    if hidden(out):
        faults.append(f"left over: {hidden(out)[:3]}")
    return faults + broken(out)


if __name__ == "__main__":
    sys.exit(report(run, __doc__ or ""))
