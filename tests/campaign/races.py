"""Two commands in one folder, interleaved at file-system steps: A stops before one, B comes, A goes on to its end, then B.

PYTHONPATH=tests python -m campaign.races --seed 1 --seconds 60
"""  # fmt: skip

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from campaign.forks import Outcome, Place, broken, content, ended, hidden, last_line, prepared, report, said, scratch, start

Command = Callable[[Place, Path], list[object]]


def prune(place: Place, out: Path, *flags: object) -> list[object]:
    return ["prune", place.model, out, "--remove-layers", 1, "--calibration", place.text, "--calibration-tokens", 128, *flags]


def quantize(place: Place, out: Path) -> list[object]:
    return ["quantize", place.model, out, "--method", "rtn", "--group-size", 32]


def build(place: Place, out: Path) -> list[object]:
    return ["build", place.model, out, "--recipe", place.folder / "recipe.yaml", "--calibration", place.text]


# A, and B beside it; where the last is true, both leave the same and A's command afterwards must succeed.
PAIRS: dict[str, tuple[Command, Command, bool]] = {
    "the same stage twice": (prune, prune, True),
    "a stage with other options": (prune, lambda place, out: [*prune(place, out)[:4], 2, *prune(place, out)[5:]], True),
    "another stage": (prune, quantize, True),
    "the same build twice": (build, build, True),
    "a stage into a build": (build, lambda place, out: prune(place, out / "01-prune"), True),
    "a build around a stage": (lambda place, out: prune(place, out / "01-prune"), build, True),
    "a stage in place of a build": (build, prune, False),
    "a build inside a stage": (prune, build, False),
}


def run(seed: int, seconds: float) -> Outcome:
    """Race pairs until the time is over."""
    outcome, random_ = Outcome(), random.Random(seed)
    with scratch() as folder:
        place, begun = prepared(Path(folder)), time.monotonic()
        recipe = "prune: {remove_layers: [1], calibration_tokens: 128}\nquantize: {method: rtn, group_size: 32}\n"
        (place.folder / "recipe.yaml").write_text(recipe)
        alone = {name: undisturbed(place, name) for name in PAIRS}
        while time.monotonic() - begun < seconds:
            number = sum(outcome.tried.values())
            name = list(PAIRS)[number % len(PAIRS)]
            wanted, steps = alone[name]
            first, second = random_.randint(1, steps), random_.randint(1, steps)
            killed = random_.random() < 0.2
            kind = f"{name}, the first one killed" if killed else name
            outcome.tried[kind] += 1
            trial = place.folder / f"race{number}"
            trial.mkdir()
            faults = raced(place, trial, name, first, second, killed, wanted)
            outcome.faults += [f"seed {seed}, race {number}, {kind} ({first}:{second}): {fault}" for fault in faults]
            shutil.rmtree(trial, ignore_errors=True)
    return outcome


def undisturbed(place: Place, name: str) -> tuple[dict[str, str], int]:
    """What A leaves when it is alone, and in how many steps."""
    trial, steps = place.folder / f"alone-{len(list(place.folder.glob('alone-*')))}", place.folder / "steps"
    trial.mkdir()
    assert ended(start(PAIRS[name][0](place, trial / "out"), trial, steps=steps)) == 0, last_line(trial)
    return content(trial / "out"), len(steps.read_text().splitlines())


def raced(place: Place, trial: Path, name: str, first: int, second: int, killed: bool, wanted: dict[str, str]) -> list[str]:
    """Faults of one race."""
    out, (one, other, same) = trial / "out", PAIRS[name]
    a = start(one(place, out), trial, at=first, sent=signal.SIGSTOP)
    state = ended(a, or_stopped=True)
    b = start(other(place, out), trial, at=second, sent=signal.SIGSTOP)
    states = [state, ended(b, or_stopped=True)]
    faults: list[str] = []
    for index, process in enumerate((a, b)):
        if states[index] == "stopped":
            os.kill(process, signal.SIGKILL if killed and not index else signal.SIGCONT)
            states[index] = ended(process)
        if states[index] not in ((0, 2, -signal.SIGKILL) if killed and not index else (0, 2)):
            faults.append(f"{'AB'[index]} ends with {states[index]}: {last_line(trial)}")
        faults += [f"after {'AB'[index]}: {fault}" for fault in broken(out)]
    code = ended(start(one(place, out), trial))
    if "Traceback" in said(trial):
        faults.append(f"traceback: {last_line(trial)}")
    if same and code != 0:
        faults.append(f"A alone afterwards: exit code {code}: {last_line(trial)}")
    if code == 0 and any(content(out).get(file) != digest for file, digest in wanted.items()):
        faults.append("A alone afterwards leaves other bytes than undisturbed")
    left = [] if code else hidden(trial)
    return faults + broken(out) + ([f"left over: {left[:3]}"] if left else [])


if __name__ == "__main__":
    sys.exit(report(run, __doc__ or ""))
