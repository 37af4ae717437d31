"""Safetensors files rewritten by copying bytes: exact, aligned, readable by others, in little memory, and safe from damage."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from edgepress.pipeline.checkpoint import shards as shards_module
from edgepress.pipeline.checkpoint.load import load_model
from edgepress.pipeline.checkpoint.shards import INDEX, ShardIndex, read_header, rewrite, rows_of, shards
from edgepress.pipeline.checkpoint.update import replace_tensors
from edgepress.pipeline.errors import InputError, ModelError
from edgepress.pipeline.files import read_json
from patience import HUNG
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


def bits_of(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Random bits as a tensor: among bfloat16 and float32 there are NaN and subnormal patterns, which arithmetic would change."""
    size = torch.empty(0, dtype=dtype).element_size()
    data = torch.randint(0, 256, (size * int(np.prod(shape)),), dtype=torch.uint8)
    return data.view(dtype).reshape(shape)


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "a.bf16": bits_of(torch.bfloat16, 5, 7),
        "b.f16": bits_of(torch.float16, 3, 11),
        "c.f32": bits_of(torch.float32, 13),
        "d.f64": bits_of(torch.float64, 3),
        "e.i64": bits_of(torch.int64, 2, 3),
        "f.i32": bits_of(torch.int32, 5),
        "g.u8": bits_of(torch.uint8, 7),
        "h.scalar": bits_of(torch.float32),
        "i.empty": torch.empty(0, 4),
    }


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    raw_a, raw_b = (x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(raw_a, raw_b)


def out_folder(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def test_bits_are_copied(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Every dtype comes through bit for bit, and the caller's metadata with it."""
    save_file(tensors, tmp_path / "in.safetensors", metadata={"format": "pt", "note": "naïve"})
    out = out_folder(tmp_path)
    total = rewrite([tmp_path / "in.safetensors"], out, lambda name: name)
    assert [p.name for p in out.iterdir()] == ["model.safetensors"]
    again = load_file(out / "model.safetensors")
    assert set(again) == set(tensors)
    assert all(same_bits(again[name], tensor) for name, tensor in tensors.items())
    assert total == sum(t.numel() * t.element_size() for t in tensors.values())
    with safe_open(out / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "note": "naïve"}


def test_names_and_dropped_tensors(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Pruning renames layers and drops some; no tensor may take another's bytes, and dropped ones must be gone from the disk."""
    save_file(tensors, tmp_path / "in.safetensors")
    out = out_folder(tmp_path)
    wanted = {"a.bf16": "z.new", "c.f32": "c.f32", "e.i64": "a.new", "g.u8": "a.bf16"}  # a.bf16: a name that becomes free
    total = rewrite([tmp_path / "in.safetensors"], out, wanted.get)
    again = load_file(out / "model.safetensors")
    assert set(again) == set(wanted.values())
    assert all(same_bits(again[new], tensors[old]) for old, new in wanted.items())
    kept = sum(tensors[old].numel() * tensors[old].element_size() for old in wanted)
    begin = read_header(out / "model.safetensors").begin
    assert total == kept == (out / "model.safetensors").stat().st_size - begin


@pytest.mark.parametrize("length", range(8))
def test_data_is_aligned(tmp_path: Path, length: int) -> None:
    """Readers map the file and view it as floats: data begins at a multiple of 8 whatever the header's length."""
    save_file({"w": torch.arange(6, dtype=torch.float64)}, tmp_path / "in.safetensors")
    out = out_folder(tmp_path)
    rewrite([tmp_path / "in.safetensors"], out, lambda name: "n" * (length + 1))
    header = read_header(out / "model.safetensors")
    begin = header.begin
    assert begin % 8 == 0
    raw = (out / "model.safetensors").read_bytes()
    assert np.array_equal(np.frombuffer(raw, dtype=np.float64, offset=begin), np.arange(6.0))
    entry = header.entries["n" * (length + 1)]
    assert (entry.begin, entry.end) == (begin, begin + 48)


def test_tensors_keep_the_order_of_their_data(tmp_path: Path) -> None:
    """A header may name tensors in any order; wide ones lie first, and stay aligned only if that order of the data is kept."""
    data = bytes(range(1, 12))
    rows = {
        "narrow": {"dtype": "U8", "shape": [3], "data_offsets": [8, 11]},
        "wide": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    }
    head = json.dumps(rows).encode()
    (tmp_path / "in.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + data)
    out = out_folder(tmp_path)
    rewrite([tmp_path / "in.safetensors"], out, lambda name: name)
    header = read_header(out / "model.safetensors")
    offsets = {name: [entry.begin - header.begin, entry.end - header.begin] for name, entry in header.entries.items()}
    assert offsets == {"wide": [0, 8], "narrow": [8, 11]}
    assert (out / "model.safetensors").read_bytes()[header.begin :] == data


def test_several_shards(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """One new shard for each source that keeps something; index, numbering and total fit what is there."""
    names = sorted(tensors)
    sources = []
    for number, part in enumerate((names[:3], names[3:6], names[6:])):
        sources.append(tmp_path / f"{number}.safetensors")
        save_file({name: tensors[name] for name in part}, sources[-1])
    out = out_folder(tmp_path)
    total = rewrite(sources, out, lambda name: None if name in names[3:6] else f"new.{name}")
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert [p.name for p in shards(out)] == files
    index = json.loads((out / INDEX).read_text())
    assert index["metadata"]["total_size"] == total
    kept = names[:3] + names[6:]
    assert index["weight_map"] == {f"new.{n}": files[n in names[6:]] for n in kept}
    for name in kept:
        assert same_bits(load_file(out / index["weight_map"][f"new.{name}"])[f"new.{name}"], tensors[name])


def test_transformers_loads_the_shards(tmp_path: Path, tiny: Path) -> None:
    """The checkpoint of a big model comes in shards; what we write must load like any other, to the same weights."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="600KB")
    sources = shards(tmp_path / "sharded")
    assert len(sources) > 2
    out = out_folder(tmp_path)
    rewrite(sources, out, lambda name: name)
    shutil.copy(tiny / "config.json", out)
    assert len(shards(out)) == len(sources)
    again = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


def test_metadata_by_default(tmp_path: Path) -> None:
    """Readers ask for a format entry; a file that has none gets it."""
    save_file({"w": torch.ones(2)}, tmp_path / "in.safetensors")
    out = out_folder(tmp_path)
    rewrite([tmp_path / "in.safetensors"], out, lambda name: name)
    with safe_open(out / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def with_header(text: bytes) -> Callable[[bytes], bytes]:
    return lambda data: struct.pack("<Q", len(text)) + text + bytes(64)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "four bytes": lambda data: data[:4],
    "cut in its header": lambda data: data[:30],
    "cut in its data": lambda data: data[: len(data) - 100],
    "one byte short": lambda data: data[:-1],
    "random bytes": lambda data: np.random.default_rng(0).bytes(len(data)),
    "huge header length": lambda data: b"\xff" * 8 + data[8:],
    "pointer file": lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n",
    "header no JSON": with_header(b"{not json}"),
    "header no UTF-8": with_header(b'{"\xff\xfe": 1}'),
    "header a list": with_header(b"[1, 2]"),
    "tensor no object": with_header(b'{"w": 7}'),
    "tensor without offsets": with_header(b'{"w": {"dtype": "F32", "shape": [16]}}'),
    "offsets empty": with_header(b'{"w": {"dtype": "F32", "shape": [16], "data_offsets": []}}'),
    "offsets texts": with_header(b'{"w": {"dtype": "F32", "shape": [16], "data_offsets": ["0", "64"]}}'),
    "tensor without dtype": with_header(b'{"w": {"shape": [16], "data_offsets": [0, 64]}}'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_shard(tmp_path: Path, tensors: dict[str, torch.Tensor], damage: str) -> None:
    """A stopped download or a pointer file is named in one line, and never copied as if it were whole."""
    file = tmp_path / "in.safetensors"
    save_file(tensors, file)
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    out = out_folder(tmp_path)
    with pytest.raises(ModelError, match=r"in\.safetensors"):
        rewrite([file], out, lambda name: name)
    assert not list(out.iterdir())


def test_one_damaged_shard_stops_all(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Sources are checked before the first byte is written: no half checkpoint."""
    sources = [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    save_file(tensors, sources[0])
    sources[1].write_bytes(sources[0].read_bytes()[:-1])
    out = out_folder(tmp_path)
    with pytest.raises(ModelError, match=r"2\.safetensors is cut short"):
        rewrite(sources, out, lambda name: f"{name}.new")
    assert not list(out.iterdir())


MEASURE = """
import sys
from pathlib import Path
from edgepress.pipeline.checkpoint.shards import rewrite

def peak():
    return 1024 * next(int(x.split()[1]) for x in open("/proc/self/status") if x.startswith("VmHWM"))

before = peak()
rewrite([Path(sys.argv[1])], Path(sys.argv[2]), lambda name: None if name == "dropped" else name)
print(before, peak(), "torch" in sys.modules)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory(tmp_path: Path) -> None:
    """A model may be bigger than memory: one tensor of 150 MB passes in pieces. VmHWM is the child's own peak."""
    out, file = out_folder(tmp_path), tmp_path / "in.safetensors"
    piece = np.random.default_rng(0).integers(0, 1 << 32, 5 << 20, dtype=np.uint32)  # 20 MiB
    sizes = {"big": 150 << 20, "dropped": 10 << 20, "small": 40 << 20}
    rows, offset = {}, 0
    for name, size in sizes.items():
        rows[name] = {"dtype": "F32", "shape": [size // 4], "data_offsets": [offset, offset + size]}
        offset += size
    head = json.dumps(rows).encode()
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(head)) + head)
        for _ in range(offset // piece.nbytes):
            stream.write(piece.tobytes())
    try:
        done = subprocess.run([sys.executable, "-c", MEASURE, file, out], capture_output=True, text=True, check=True, timeout=HUNG)
        before, after, torch_there = done.stdout.split()
        assert int(after) - int(before) < 120 << 20
        assert torch_there == "False"
        assert (out / "model.safetensors").stat().st_size > 190 << 20
    finally:  # pytest keeps the folders of its last runs
        file.unlink()
        shutil.rmtree(out)


@pytest.fixture
def sharded(tiny: Path, tmp_path: Path) -> Path:
    """The random model in two shards and an index."""
    folder = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(tiny).save_pretrained(folder, max_shard_size="1MB")
    for file in tiny.glob("tokenizer*"):
        shutil.copy(file, folder)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    return folder


@pytest.mark.parametrize("name", ["model-00009-of-00009.safetensors", "model_old.safetensors", "other.safetensors"])
def test_files_that_the_index_does_not_name_are_not_the_checkpoints(name: str, sharded: Path) -> None:
    before = {key: tensor.clone() for key, tensor in load_model(sharded).state_dict().items()}
    stray = {key: torch.zeros_like(tensor) for key, tensor in before.items()}
    save_file(stray, sharded / name, metadata={"format": "pt"})
    after = load_model(sharded).state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_backup_beside_a_single_file_is_not_the_checkpoints(tiny: Path, copy_of: Callable[..., Path]) -> None:
    folder = copy_of(tiny)
    before = load_model(folder).state_dict()
    save_file({key: torch.zeros_like(t) for key, t in before.items()}, folder / "model_old.safetensors", metadata={"format": "pt"})
    after = load_model(folder).state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_an_index_and_a_single_file_are_refused(sharded: Path) -> None:
    """Transformers would take the single file, the index says otherwise: nobody can tell which is meant."""
    save_file({"lm_head.weight": torch.zeros(2, 2)}, sharded / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="move away what"):
        ShardIndex.of(sharded)


def test_a_shard_that_is_named_and_not_there(sharded: Path) -> None:
    next(sharded.glob("model-*.safetensors")).unlink()
    with pytest.raises(ModelError, match="which is not there; give the complete checkpoint"):
        ShardIndex.of(sharded)


def test_nothing_says_which_files_count(sharded: Path) -> None:
    """Transformers would not look for them either."""
    (sharded / INDEX).unlink()
    with pytest.raises(ModelError, match=r"has neither model\.safetensors nor"):
        ShardIndex.of(sharded)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}'])
def test_a_damaged_index(content: str, sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ModelError, match="no weight_map"):
        ShardIndex.of(sharded)


def test_a_pointer_of_git_lfs_is_named(tmp_path: Path) -> None:
    """With what fetches the file: to download it again would not help."""
    (tmp_path / "model.safetensors").write_bytes(DAMAGES["pointer file"](b""))
    with pytest.raises(ModelError, match=r"model\.safetensors is a git-LFS pointer.*; run 'git lfs pull'"):
        ShardIndex.of(tmp_path)


def test_a_shard_that_is_a_pipe(sharded: Path) -> None:
    """Nobody waits for what comes out of it."""
    shard = sorted(sharded.glob("model-*.safetensors"))[0]
    shard.unlink()
    os.mkfifo(shard)
    with pytest.raises(InputError, match=rf"{shard.name} is not a file"):
        shards(sharded)


def test_the_index_tells_the_size_of_what_was_replaced(sharded: Path) -> None:
    """Fewer channels or tokens than before: Hugging Face shows total_size, and tools reserve memory by it."""
    name, entry = max(rows_of(sharded).items(), key=lambda item: item[1].nbytes)
    before = read_json(sharded / INDEX)["metadata"]["total_size"]
    half = torch.zeros(entry.shape[0] // 2, *entry.shape[1:])
    replace_tensors(sharded, {name: half})
    after = read_json(sharded / INDEX)["metadata"]["total_size"]
    assert after == sum(one.nbytes for one in rows_of(sharded).values()) == before - entry.nbytes // 2


@pytest.mark.parametrize("place", [0, 9, 30])
def test_nan_is_found_wherever_it_stands(place: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large tensor is looked at in pieces, the last of which may be short."""
    monkeypatch.setattr(shards_module, "_NUMBERS", 8)
    values = torch.ones(31)
    save_file({"w": values}, tmp_path / "model.safetensors")
    assert len(list(ShardIndex([tmp_path / "model.safetensors"]).tensors({"w"}, {"w"}))) == 1
    values[place] = torch.inf
    save_file({"w": values}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"w in .* holds NaN or Inf"):
        list(ShardIndex([tmp_path / "model.safetensors"]).tensors({"w"}, {"w"}))
