"""Checkpoints without some of their blocks: loadable by plain transformers, and computing the original with blocks skipped."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from edgepress.models.config import pruned_configs, renamed
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.checkpoint.blocks import decoder_blocks
from edgepress.pipeline.checkpoint.load import load_model
from edgepress.pipeline.errors import ModelError, ProofError
from edgepress.pipeline.files import read_json
from edgepress.pipeline.options import PruneOptions
from edgepress.pipeline.prune.stage import prune
from edgepress.pipeline.prune.surgery import pruned_config
from edgepress.pipeline.text.calibration import calibration
from edgepress.pipeline.text.windows import text_windows
from families import FAMILIES, LAYERS, family_config
from transformers import AutoConfig, AutoModelForCausalLM, Gemma2Config, GPT2Config, JambaConfig, LlamaConfig, Qwen2Config

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
        found = {"logits": model(input_ids=ids, use_cache=False).logits}
        for name, use_cache in (("cached", True), ("uncached", False)):
            found[name] = model.generate(ids, use_cache=use_cache, **settings)
    np.savez(folder + "/found.npz", **{name: value.numpy() for name, value in found.items()})
"""


@dataclass(frozen=True)
class Pressed:
    """A family's model without REMOVED: expected logits from the model in memory, and what a fresh process found."""

    folder: Path
    expected: np.ndarray

    @property
    def found(self) -> dict[str, np.ndarray]:
        """Logits, and tokens generated with the cache and without."""
        return dict(np.load(self.folder / "found.npz"))


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
    assert np.array_equal(one.found["logits"], one.expected)
    assert np.array_equal(one.found["cached"], one.found["uncached"])
    assert (one.folder / "influence.png").read_bytes().startswith(b"\x89PNG")
    content = read_json(one.folder / "influence.json")
    assert [row["layer"] for row in content["layers"] if row["removed"]] == list(REMOVED)
    assert content["rank_correlation_of_halves"] is not None


def read_config_layers(folder: Path) -> int:
    return int(AutoConfig.from_pretrained(folder).num_hidden_layers)


def small(name: str) -> dict[str, int]:
    return {"vocab_size": 5120, "hidden_size": 64, "num_attention_heads": 4, "bos_token_id": 0, "eos_token_id": 0} | (
        {} if name == "gpt2" else {"intermediate_size": 96, "num_hidden_layers": 8, "num_key_value_heads": 2}
    )


def test_a_period_that_no_list_expresses_is_refused(tmp_path: Path, random_model: Callable[..., Path]) -> None:
    """Jamba's attention layers follow from their number alone: the message names the fields and the runs that could go."""
    config = JambaConfig(
        **small("jamba"), attn_layer_period=4, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, num_experts=2,
        use_mamba_kernels=False, mamba_d_state=4, mamba_d_conv=2, pad_token_id=0,
    )  # fmt: skip
    folder = random_model(config, tmp_path / "jamba")
    with pytest.raises(ModelError, match=r"attn_layer_period.*these can go, by --layers: 0 to 3, 1 to 4, 2 to 5, 3 to 6, 4 to 7$"):
        pruned_config(folder, [0, 2, 4, 6])
    with pytest.raises(ModelError, match=r"these can go, by --layers: 7$"):
        pruned_config(folder, [0, 1, 2, 4, 5, 6, 7])
    kept = [0, 1, 2, 3]
    assert pruned_config(folder, kept)["num_hidden_layers"] == 4


def test_kv_shared_between_layers_is_refused(tmp_path: Path) -> None:
    """Gemma 3n's last layers read the keys of earlier ones, and its embedding has a slice for each layer."""
    from transformers import Gemma3nTextConfig

    config = Gemma3nTextConfig(
        vocab_size=512, vocab_size_per_layer_input=512, hidden_size=64, hidden_size_per_layer_input=8, intermediate_size=96,
        num_hidden_layers=10, num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_kv_shared_layers=4, laurel_rank=4,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="num_kv_shared_layers"):
        pruned_config(tmp_path, [0, 1, 2, 3, 4, 5, 6, 7, 8])


def test_attention_scaled_by_the_layers_number_is_refused(tmp_path: Path) -> None:
    """GPT-2's scale_attn_by_inverse_layer_idx: only the last layers can go without changing the others."""
    GPT2Config(n_embd=64, n_layer=4, n_head=4, scale_attn_by_inverse_layer_idx=True).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"scale_attn_by_inverse_layer_idx.*by --layers: 3$"):
        pruned_config(tmp_path, [0, 2, 3])
    assert pruned_config(tmp_path, [0, 1])["n_layer"] == 2


def gemma2(layers: int = 4) -> Gemma2Config:
    return Gemma2Config(
        vocab_size=5120, hidden_size=64, intermediate_size=96, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, sliding_window=8, max_position_embeddings=128, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip


def test_what_follows_from_a_layers_number_is_written_out(tmp_path: Path, text: Path, random_model: Callable[..., Path]) -> None:
    """A config.json as first published, without layer_types: transformers derives them from the number, which shifts."""
    folder = random_model(gemma2(), tmp_path / "gemma2")
    content = read_json(folder / "config.json")
    kinds = content.pop("layer_types")
    (folder / "config.json").write_text(json.dumps(content))
    out = tmp_path / "out"
    out.mkdir()
    prune(Artifact.load(folder), out, PruneOptions(remove_layers=(0,), calibration=text, calibration_tokens=256))
    assert read_json(out / "config.json")["layer_types"] == kinds[1:]


def test_the_proof_finds_what_the_structure_does_not_show(
    tmp_path: Path, text: Path, random_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the check of the config, a sliding window on the wrong layers must still not pass."""
    from edgepress.pipeline.prune import stage as module

    folder = random_model(gemma2(), tmp_path / "gemma2")
    content = read_json(folder / "config.json")
    del content["layer_types"]
    (folder / "config.json").write_text(json.dumps(content))
    monkeypatch.setattr(module, "pruned_config", lambda folder, kept, trust: content | {"num_hidden_layers": len(kept)})
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(ProofError, match="per-layer settings"):
        prune(Artifact.load(folder), out, PruneOptions(remove_layers=(0,), calibration=text, calibration_tokens=256))


def test_weights_keep_dtype_and_bytes(tmp_path: Path, tiny: Path, text: Path, random_model: Callable[..., Path]) -> None:
    """Removal is no conversion: a bfloat16 checkpoint stays one, tensor for tensor."""
    from safetensors import safe_open

    config = LlamaConfig(**read_json(tiny / "config.json"))
    folder = random_model(config, tmp_path / "model", torch.bfloat16)
    out = tmp_path / "out"
    out.mkdir()
    facts = prune(Artifact.load(folder), out, PruneOptions(remove_count=1, calibration=text, calibration_tokens=100))
    kept = [i for i in range(4) if i not in facts["removed_layers"]]
    before, after = safe_open(folder / "model.safetensors", "pt"), safe_open(out / "model.safetensors", "pt")
    for name in after.keys():  # noqa: SIM118
        parts = name.split(".")
        if parts[1] == "layers":
            parts[2] = str(kept[int(parts[2])])
        old = before.get_tensor(".".join(parts))
        assert old.dtype == torch.bfloat16 and torch.equal(after.get_tensor(name), old)


def test_the_manifest_says_how_layers_were_chosen(tiny: Path, text: Path, tmp_path: Path) -> None:
    """Before and after are of held-out text, which the ranking never saw."""
    out = tmp_path / "out"
    out.mkdir()
    facts = prune(Artifact.load(tiny), out, PruneOptions(remove_count=2, calibration=text, calibration_tokens=1000))
    assert facts["criterion"] == "greedy" and facts["layers"] == [4, 2] and len(facts["removed_layers"]) == 2
    assert facts["evaluations"] >= 4 + 3
    positions = facts["calibration"]
    ranking, held_out = calibration(tiny, PruneOptions(remove_count=2, calibration=text, calibration_tokens=1000))
    assert positions["held_out_positions"] == sum(map(len, held_out)) and positions["ranking_positions"] == sum(map(len, ranking))
    assert not {row.tobytes() for row in ranking} & {row.tobytes() for row in held_out}
    from edgepress.pipeline.metrics.torch_scores import mean_loss

    assert facts["held_out_perplexity"] == pytest.approx(
        [np.exp(mean_loss(load_model(f), held_out)) for f in (tiny, out)], rel=1e-4
    )


def test_qwen2_window_boundary_moves_with_the_blocks() -> None:
    """max_window_layers counts blocks from the first: those removed below it must be taken off."""
    config = Qwen2Config(num_hidden_layers=6, max_window_layers=4, use_sliding_window=True).to_dict()
    changed = next(pruned_configs(config, config, "num_hidden_layers", [0, 2, 3, 5]))
    assert (changed["num_hidden_layers"], changed["max_window_layers"]) == (4, 3)


def test_names_outside_the_blocks_stay() -> None:
    """Renaming touches the block number alone, also where another part of the name is a number or ends alike."""
    both = ("model.layers", "layers")
    assert renamed("model.layers.3.mlp.experts.3.w", both, [0, 3]) == "model.layers.1.mlp.experts.3.w"
    assert renamed("layers.3.mlp.w", both, [0, 3]) == "layers.1.mlp.w"
    assert renamed("model.layers.2.mlp.w", both, [0, 3]) is None
    assert renamed("model.norm.weight", both, [0, 3]) == "model.norm.weight"
    assert renamed("vision.layers.2.w", both, [0, 3]) == "vision.layers.2.w"
    assert renamed("transformer.h.1.attn.bias", ("transformer.h", "h"), [1]) == "transformer.h.0.attn.bias"
    assert renamed("transformer.path.1.w", ("transformer.h", "h"), [1]) == "transformer.path.1.w"


def test_a_layer_of_foreign_names_is_refused(tmp_path: Path, tiny: Path) -> None:
    """Tensors that go by other names than the architecture's would all be kept, and the config would lie about them."""
    from edgepress.pipeline.prune.surgery import remove_blocks

    with pytest.raises(ModelError, match="no tensor in"):
        remove_blocks(tiny, tmp_path, "model.decoder.blocks", [0, 1], {})


def test_known_perplexities(shared_model: Callable[[str], Path], tinystories: Path) -> None:
    """The measured values that came with the shared models, by their protocol: full, and without single layers."""
    from edgepress.pipeline.checkpoint.blocks import Blocks
    from edgepress.pipeline.metrics.torch_scores import mean_loss

    known = {"stories260k": (4.27, [102, 14.6, 9.09, 9.74, 10.1]), "babyllama-361": (2.20, [30.3, 21.4, 9.49, 8.77, 4.81])}
    for name, (full, without) in known.items():
        folder = shared_model(name)
        model = load_model(folder)
        windows = text_windows(tinystories, folder, budget=16000)
        assert np.exp(mean_loss(model, windows)) == pytest.approx(full, rel=2e-3)
        for index, value in enumerate(without):
            with Blocks(model).without([index]):
                assert np.exp(mean_loss(model, windows)) == pytest.approx(value, rel=2e-2)
