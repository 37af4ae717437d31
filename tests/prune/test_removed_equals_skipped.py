"""Every family without some of its blocks: loadable by plain transformers, and computing the original with blocks skipped."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.checkpoint.blocks import decoder_blocks
from edgepress.pipeline.files import read_json
from edgepress.pipeline.options import PruneOptions
from edgepress.pipeline.prune.stage import prune
from edgepress.pipeline.text.windows import text_windows
from families import FAMILIES, LAYERS, family_config
from transformers import AutoConfig, AutoModelForCausalLM

REMOVED = (0, 2, 5)  # the first, and none of any period's length beside another


PLAIN = """
import sys
import numpy as np, torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
ids = torch.from_numpy(np.load(sys.argv[1]))
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    settings = dict(max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0, attention_mask=torch.ones_like(ids))
    with torch.inference_mode():
        computed = {"logits": model(input_ids=ids, use_cache=False).logits}
        for name, use_cache in (("cached", True), ("uncached", False)):
            computed[name] = model.generate(ids, use_cache=use_cache, **settings)
    np.savez(folder + "/computed.npz", **{name: value.numpy() for name, value in computed.items()})
"""


@dataclass(frozen=True)
class Pressed:
    """A family's model without REMOVED: reference logits from the model in memory, and what a fresh process computed."""

    folder: Path
    reference: np.ndarray

    @property
    def computed(self) -> dict[str, np.ndarray]:
        """Logits, and tokens generated with the cache and without."""
        return dict(np.load(self.folder / "computed.npz"))


@pytest.fixture(scope="module")
def pressed(tmp_path_factory: pytest.TempPathFactory, text: Path, random_model: Callable[..., Path]) -> dict[str, Pressed]:
    """Every family, pruned; then all of them loaded by plain transformers in one process that knows nothing of edgepress."""
    base = tmp_path_factory.mktemp("families")
    made = {}
    for name in FAMILIES:
        folder, out = random_model(family_config(name), base / name / "whole"), base / name / "pruned"
        out.mkdir()
        ids = torch.from_numpy(text_windows(text, folder, budget=40, length=40)[0])[None]
        prune(Artifact.load(folder), out, PruneOptions(remove_layers=REMOVED, calibration=text, calibration_tokens=256))
        made[name] = Pressed(out, logits_with_blocks_hooked_out(folder, ids))
    np.save(base / "ids.npy", ids.numpy())
    folders = [str(one.folder) for one in made.values()]
    subprocess.run([sys.executable, "-c", PLAIN, str(base / "ids.npy"), *folders], check=True, cwd=base)
    return made


def logits_with_blocks_hooked_out(folder: Path, ids: torch.Tensor) -> np.ndarray:
    """Plain transformers, the output of the removed blocks replaced by their input."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    _, blocks = decoder_blocks(model)

    def identity(module: torch.nn.Module, args: tuple, kwargs: dict, output: object) -> object:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    for index in REMOVED:
        blocks[index].register_forward_hook(identity, with_kwargs=True)
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False).logits.numpy()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_reloads_and_computes_the_same(name: str, pressed: dict[str, Pressed]) -> None:
    """Logits bit for bit those with the blocks skipped; generation with the cache as without."""
    one = pressed[name]
    assert read_config_layers(one.folder) == LAYERS - len(REMOVED)
    assert np.array_equal(one.computed["logits"], one.reference)
    assert np.array_equal(one.computed["cached"], one.computed["uncached"])
    assert (one.folder / "influence.png").read_bytes().startswith(b"\x89PNG")
    content = read_json(one.folder / "influence.json")
    assert [row["layer"] for row in content["layers"] if row["removed"]] == list(REMOVED)
    assert content["rank_correlation_of_halves"] is not None


def read_config_layers(folder: Path) -> int:
    return int(AutoConfig.from_pretrained(folder).num_hidden_layers)
