"""The stream through the blocks: the states of the whole model, in the memory of one block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from edgepress.pipeline.checkpoint.blocks import Blocks
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.checkpoint.stream import Stream
from edgepress.pipeline.checkpoint.weights import Weights
from edgepress.pipeline.errors import ModelError
from families import FAMILIES, family_config

LENGTHS = (40, 40, 23)
FAST = ("llama", "gemma3_text", "gpt2", "mixtral")


@pytest.fixture(autouse=True)
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgepress.pipeline.checkpoint.stream.prefers_bfloat16", lambda: False)


def windows() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 5000, length) for length in LENGTHS]


def passing(stream: Stream) -> torch.Tensor:
    """What enters the next block, or leaves the last, (tokens, hidden)."""
    return torch.cat([batch.hidden.flatten(0, 1) for batch in stream._batches])


def states(folder: Path, ids: np.ndarray) -> dict[int, torch.Tensor]:
    """What enters each block and leaves the last, of the whole model on one text."""
    blocks = Blocks(Checkpoint(folder).model())
    return {i: found[0] for i, found in blocks.states(torch.from_numpy(ids)[None], range(len(blocks) + 1)).items()}


def check(folder: Path) -> None:
    stream = Stream(Checkpoint(folder), windows())
    truth = [states(folder, ids) for ids in windows()]
    while True:
        found = passing(stream)
        expected = torch.cat([of[stream.done] for of in truth])
        assert found.shape == expected.shape
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.std())), stream.done
        if stream.done == len(stream):
            break
        with stream.block():
            stream.advance()
    found = torch.cat(list(stream.read_by(stream.model.get_output_embeddings())))
    expected = torch.cat([head_inputs(folder, ids) for ids in windows()])
    assert found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.std()))


def head_inputs(folder: Path, ids: np.ndarray) -> torch.Tensor:
    """What enters the output head of the whole model, (tokens, hidden)."""
    model, found = Checkpoint(folder).model(), list[torch.Tensor]()
    model.get_output_embeddings().register_forward_pre_hook(lambda _, args: found.append(args[0][0]))
    with torch.inference_mode():
        model(input_ids=torch.from_numpy(ids)[None], use_cache=False)
    return found[0]


@pytest.mark.parametrize("family", FAST)
def test_states_are_those_of_the_model(family: str, random_model: Callable[..., Path], tmp_path: Path) -> None:
    check(random_model(family_config(family), tmp_path / "model"))


@pytest.mark.families
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in FAST])
def test_states_are_those_of_the_model_in_every_family(family: str, random_model: Callable[..., Path], tmp_path: Path) -> None:
    check(random_model(family_config(family), tmp_path / "model"))


@pytest.mark.parametrize("family", [name for name in FAST if name != "mixtral"])  # random experts are chosen by near ties
def test_states_in_bfloat16(
    family: str, random_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the processor has it, blocks compute in it; the stream is float32 and near what it would be."""
    source = random_model(family_config(family), tmp_path / "model")
    found = []
    for has in (True, False):
        monkeypatch.setattr("edgepress.pipeline.checkpoint.stream.prefers_bfloat16", lambda has=has: has)
        stream = Stream(Checkpoint(source), windows())
        while stream.done < len(stream):
            with stream.block():
                stream.advance()
        found.append(passing(stream))
    assert found[0].dtype == torch.float32 and not torch.equal(*found)
    assert float((found[0] - found[1]).norm() / found[1].norm()) < 0.02


def test_stored_buffers_count(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A number that a model keeps beside its parameters (Gemma 4: a factor of a layer) is the file's, not the constructor's."""
    from edgepress.pipeline.checkpoint.offloaded import build_offloaded_model
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    init = LlamaDecoderLayer.__init__

    def with_factor(self: torch.nn.Module, *args: object, **kwargs: object) -> None:
        init(self, *args, **kwargs)
        self.register_buffer("factor", torch.ones(1))

    monkeypatch.setattr(LlamaDecoderLayer, "__init__", with_factor)
    checkpoint = Checkpoint(tiny)
    weights = _WithBuffers(checkpoint.weights)
    model = build_offloaded_model(checkpoint.config, weights)  # type: ignore[arg-type]
    assert [float(layer.factor) for layer in model.model.layers] == [3.0] * 4


class _WithBuffers:
    """Weights that hold a factor of every layer as well."""

    def __init__(self, weights: Weights) -> None:
        self._weights, self.folder = weights, weights.folder
        self.names = {*weights.names, *(f"model.layers.{index}.factor" for index in range(4))}

    def tensor(self, name: str) -> torch.Tensor:
        return torch.full((1,), 3.0) if name.endswith("factor") else self._weights.tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._weights.shape(name)

    def floats(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self._weights.floats()


def test_what_changes_the_stream_between_blocks_is_refused(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be left out, silently."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    call = LlamaDecoderLayer.__call__
    monkeypatch.setattr(LlamaDecoderLayer, "__call__", lambda self, hidden, *args, **kw: call(self, hidden, *args, **kw) / 2)
    with pytest.raises(ModelError, match="changed before it enters the next"):
        Stream(Checkpoint(tiny), windows())


def test_states_of_other_windows_are_refused(tiny: Path, tmp_path: Path) -> None:
    Stream(Checkpoint(tiny), windows()).keep(tmp_path / "states.safetensors")
    with pytest.raises(ModelError, match="other windows"):
        Stream(Checkpoint(tiny), [row[:20] for row in windows()]).resume(tmp_path / "states.safetensors")


def test_one_block_is_in_memory(tiny: Path) -> None:
    """No weights of other blocks, before, within and after; its modules are as if nobody had to read for them."""
    stream = Stream(Checkpoint(tiny), windows())

    def present() -> list[int]:
        real = [sum(p.numel() for p in block.parameters() if p.device.type != "meta") for block in stream._blocks]
        return [index for index, count in enumerate(real) if count]

    assert present() == []
    while stream.done < len(stream):
        with stream.block() as block:
            assert present() == [stream.done]
            assert not any("forward" in module.__dict__ for module in block.modules())
            stream.advance()
        assert present() == []


def test_a_forward_of_its_own_stays(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some classes choose one when they are made."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    init = LlamaRMSNorm.__init__

    def choosing(self: torch.nn.Module, *args: object, **kwargs: object) -> None:
        init(self, *args, **kwargs)
        self.forward = partial(LlamaRMSNorm.forward, self)

    monkeypatch.setattr(LlamaRMSNorm, "__init__", choosing)
    with Stream(Checkpoint(tiny), windows()).block() as block:
        own = [isinstance(module.forward, partial) for module in block.modules() if isinstance(module, LlamaRMSNorm)]
    assert own == [True, True]


def test_a_kept_stream_goes_on(tiny: Path, tmp_path: Path) -> None:
    """Bit for bit: what was interrupted ends as what was not."""
    stream = Stream(Checkpoint(tiny), windows())
    for _ in range(2):
        with stream.block() as block:
            assert len(list(stream.advance_original())) == len(stream.sizes)
            with torch.no_grad():
                block.mlp.down_proj.weight.mul_(1.5)
            stream.advance()
    stream.keep(tmp_path / "states.safetensors")
    again = Stream(Checkpoint(tiny), windows())
    again.resume(tmp_path / "states.safetensors")
    assert again.done == 2
    for each in (stream, again):
        with each.block():
            list(each.advance_original())
            each.advance()
    assert torch.equal(passing(stream), passing(again)) and len(stream._batches) > 1
    for one, other in zip(stream._batches, again._batches, strict=True):
        assert one.original is not None and other.original is not None and torch.equal(one.original, other.original)
        assert not torch.equal(one.original, one.hidden)
    assert [p.name for p in tmp_path.iterdir()] == ["states.safetensors"]


def test_a_changed_block_counts(tiny: Path) -> None:
    """What was quantized is what the later blocks read."""
    stream, plain = Stream(Checkpoint(tiny), windows()), Stream(Checkpoint(tiny), windows())
    for each in (stream, plain):
        with each.block() as block:
            for _ in each.advance_original():
                pass
            if each is stream:
                with torch.no_grad():
                    block.mlp.down_proj.weight.mul_(2)
            each.advance()
    assert not torch.allclose(passing(stream), passing(plain))
    for changed, other in zip(stream._batches, plain._batches, strict=True):
        assert changed.original is not None and other.original is not None
        assert torch.equal(changed.original, other.original) and torch.equal(other.original, other.hidden)


def test_running_stops_where_it_may(tiny: Path) -> None:
    """What follows the last module that is asked for is not computed."""
    stream, ran = Stream(Checkpoint(tiny), windows()), list[str]()
    with stream.block() as block:
        for name in ("q_proj", "o_proj"):
            module = getattr(block.self_attn, name)
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
        assert len(list(stream.run(block.self_attn.o_proj))) == len(stream._batches)
        assert set(ran) == {"q_proj"}
        stream.advance()
        assert set(ran) == {"q_proj", "o_proj"}
