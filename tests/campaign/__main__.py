"""make test-campaign: bad inputs, kills and races for a time, from a seed; what was tried, and how to repeat each fault.

Bad inputs take most of the time; kills and races are further modules with ``run(seed, seconds)``.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys

from campaign import inputs

OTHERS = ("kills", "races")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=540, help="of all parts together; setting up takes half a minute")
    options = parser.parse_args()
    others = [name for name in OTHERS if importlib.util.find_spec(f"campaign.{name}") is not None]
    share = options.seconds / (3 + len(others))
    tally = inputs.run(options.seed, 3 * share)
    faults = list(tally.faults)
    print(f"bad inputs, seed {options.seed}\n{tally.table()}", flush=True)
    for name in others:
        outcome = importlib.import_module(f"campaign.{name}").run(options.seed, share)
        print(f"\n{name}\n" + "\n".join(f"{count:6}  {kind}" for kind, count in sorted(outcome.tried.items())), flush=True)
        faults += outcome.faults
    print("\n".join(["", *faults, f"faults: {len(faults)}"]))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
