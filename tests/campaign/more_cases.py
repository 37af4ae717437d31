"""Further kinds of bad input: graphs, reports, recipes, texts, journals and command lines."""

from __future__ import annotations

import json
import random
from pathlib import Path

from campaign import cases
from campaign.bases import RECIPE, copy
from campaign.cases import Argv, Kind, export, prune, used
from campaign.mutations import ODD, changed, dumped, edit_json, put, put_json, spoiled

_YAML = (
    "!!python/object/apply:os.system ['touch PWNED']", "&a [*a]", "*nothing", "!!int x", "!!float x", "!!bool x", "!!timestamp x",
    "2001-13-45", "!!binary '#'", "!!set {a}", "0x", ".nan", ".inf", "1" * 5000, "190:20:30", "[" * 500, "[" * 3000 + "]" * 3000,
    "{a: " * 2000, "? [1]\n: 2", "\t", "%YAML 9.9", "--- a\n--- b", '"\\x00"', "'a\0b'", '"\\ud800"', "!x y", "@", "no", "'",
    "|", "<<: 1",
    "{[1]: 2}", "- - - -", "\ufeff", "=", "(a+)+$=8", "[=8", "x=99", "10000000000000000000000", "-1", "1e400",
)  # fmt: skip
_BOMB = "".join(f"  {b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))


def graph(random_: random.Random, bases: Path, place: Path) -> Argv:
    import onnx

    folder = copy(bases / "onnx", place / "src")
    file, data, how = folder / "model.onnx", folder / "model.onnx.data", random_.random()
    if how < 0.35:
        put(file, spoiled(random_, file.read_bytes()))
    elif how < 0.45:
        put(data, spoiled(random_, data.read_bytes()))
    elif how < 0.5:
        data.unlink()
        data.symlink_to(random_.choice(["/dev/zero", "/etc/passwd", "/", "model.onnx", "nothing"]))
    else:
        model = onnx.load(str(file), load_external_data=False)
        _spoil_graph(random_, model)
        put(file, model.SerializeToString())
    return used(random_, folder)


def _spoil_graph(random_: random.Random, model: object) -> None:
    parts = model.graph  # type: ignore[attr-defined]
    stored = [tensor for tensor in parts.initializer if tensor.external_data]
    how = random_.randrange(9)
    if how == 0:
        for tensor in random_.sample(stored, random_.choice([1, len(stored)])):
            entry = random_.choice(list(tensor.external_data))
            entry.value = random_.choice(
                ["-1", "0", "1", "9" * 20, "x", "", "4096", str(2**63 - 1), "../x", "/etc/passwd", "/dev/zero", "."]
            )
    elif how == 1:
        node = random_.choice(list(parts.node))
        node.op_type = random_.choice(["If", "Loop", "Foo", "MatMul", "", "Scan", "ConstantOfShape"])
    elif how == 2:
        node = random_.choice([node for node in parts.node if node.attribute])
        attribute = random_.choice(list(node.attribute))
        attribute.i, attribute.f = random_.choice([0, -1, 2**31, 2**62, 3, 1 << 40]), float("nan")
    elif how == 3:
        node = random_.choice(list(parts.node))
        node.input[random_.randrange(len(node.input))] = random_.choice(["", "nothing", node.output[0]])
    elif how == 4:
        parts.node.remove(random_.choice(list(parts.node)))
    elif how == 5:
        value = random_.choice([*parts.input, *parts.output])
        value.name = random_.choice(["x", "logits", ""])
    elif how == 6:
        value = random_.choice([*parts.input, *parts.output])
        dims = value.type.tensor_type.shape.dim
        random_.choice(list(dims) or [model.opset_import.add()]).Clear() if random_.random() < 0.4 else setattr(  # type: ignore[attr-defined]
            dims[-1], "dim_value", random_.choice([0, -1, 10**6, 3, 2**40])
        )
    elif how == 7:
        random_.choice([*parts.input, *parts.output]).type.tensor_type.elem_type = random_.choice([0, 1, 6, 7, 10, 16, 99])
    else:
        tensor = random_.choice(list(parts.initializer))
        tensor.dims[:] = random_.choice([[], [0], [-1], [2**40, 2**40], [1], [3, 3]])


def report(random_: random.Random, bases: Path, place: Path) -> Argv:
    folder = copy(bases / "report", place / "src")
    file = folder / "report.json"
    if random_.random() < 0.3:
        content = json.loads(file.read_text())
        odd = [value for value in ODD if isinstance(value, str)]
        content["artifact"], content["compared_with"][0]["artifact"] = random_.choice(odd), random_.choice(odd)
        content["missing"][random_.choice(odd)] = random_.choice(odd)
        put_json(file, content)
    else:
        edit_json(random_, file)
    return ["report", str(folder), "--out", str(place / f"page.{random_.choice(['html', 'md', 'json'])}")]


def recipe(random_: random.Random, bases: Path, place: Path) -> Argv:
    file, how = place / "recipe.yaml", random_.random()
    plain = "prune: {remove_layers: [1]}\nquantize: {method: rtn, group_size: 32}\nexport: {target: cpu}\n"
    if how < 0.35:
        bad = random_.choice(_YAML)
        places = (
            bad,
            f"prune: {bad}",
            f"quantize: {{method: {bad}}}",
            plain.replace("[1]", bad),
            plain.replace("32", bad),
            f"{bad}: {{}}",
        )
        put(file, random_.choice(places))
    elif how < 0.4:
        put(file, f"quantize:\n  a: &a [x, x]\n{_BOMB}  method: {random_.choice(['*i', '*h', '[*i, *i]'])}\n")
    elif how < 0.55:
        put(file, spoiled(random_, plain.encode()))
    else:
        put(file, dumped(changed(random_, RECIPE)))
    out = ["build", str(bases / "hf"), str(place / "out"), "--recipe", str(file)]
    return [*out, "--calibration", str(bases / "text.txt"), "--text", str(bases / "text.txt")]


def text(random_: random.Random, bases: Path, place: Path) -> Argv:
    good, lines = (bases / "text.txt").read_bytes(), (bases / "words.jsonl").read_bytes()
    choices = [
        b"", b"\0" * 5000, random_.randbytes(5000), b"\xef\xbb\xbf" + good, good.decode().encode("utf-16"), b"\n" * 9999,
        b"a" * 300_000,
        b"\xed\xa0\x80" * 99, "é".encode("latin-1") * 999, b"{}", b"[1,2]\n", b'{"text": 5}\n', b'{"text": null}\n',
        b'{"text": "a"\n',
        b"[" * 100_000, b'{"text": "' + b"a " * 999 + b'", "x": ' + b"1" * 5000 + b"}",
        b'{"text": "\\ud800' + b"a " * 999 + b'"}', lines + b"x\n",
    ]  # fmt: skip
    file = place / random_.choice(["t.txt", "t.jsonl", "t.JSONL", "t"])
    put(file, random_.choice([*choices, spoiled(random_, good), spoiled(random_, lines)]))
    if random_.random() < 0.1:
        file.unlink()
        file.symlink_to(random_.choice(["/dev/null", "/nothing", str(place), file.name]))
    if random_.random() < 0.5:
        command = prune(bases / "hf", place)
        command[command.index("--calibration") + 1] = str(file)
        return command
    return [*export(bases / "packed", place), "--text", str(file)]


def arguments(random_: random.Random, bases: Path, place: Path) -> Argv:
    folder, out = str(bases / "onnx"), str(place / "out")
    odd = random_.choice(["", "x" * 5000, "..", "/etc/passwd", "/dev/null", "\udcff", "-1", "1e999", "nan", "9" * 400, "--help",
    "[",
                          "(a+)+=4", "\n", " ", "~nobody", "a/b", "é", "%s", "\x1b[31m", "1,2", "inf", "1e-320",
                          "true"])  # fmt: skip
    flags = ["--temperature", "--seed", "--max-new-tokens", "--threads", "--system", "--nothing"]
    source = str(bases / "hf")
    return random_.choice(
        [
            ["run", folder, odd, "--max-new-tokens", "2"], ["run", odd, "x"], ["run", folder, random_.choice(flags), odd, "Once"],
            ["run", folder, "Once", "--max-new-tokens", "2", random_.choice(flags), odd], ["show", odd], ["verify", odd],
            ["verify", folder, "--original", odd], ["report", odd], ["report", str(bases / "report"), "--out",
            str(place / odd.strip("/"))],
            ["prune", odd, out, "--remove-layers", "1"], ["prune", source, out, "--remove-layers", odd],
            ["quantize", source, out, "--method", odd], ["quantize", source, out, "--method", "rtn", "--bits-for", odd],
            ["export", str(bases / "packed"), out, "--text", odd], ["build", source, out, "--recipe", odd], [odd], [],
            ["sensitivity", source, "--out", odd], ["bench", folder, "--repeats", odd, "--out", out], ["fetch", odd],
        ]
    )  # fmt: skip


KINDS: dict[str, Kind] = {
    "config.json": cases.config, "safetensors": cases.header, "index": cases.index, "GPTQ": cases.gptq,
    "bitsandbytes": cases.bitsandbytes, "packed": cases.packed, "tokenizer": cases.tokenizer, "chat template": cases.template,
    "manifest": cases.manifest, "generation": cases.generation, "graph": graph, "report": report, "recipe": recipe, "text": text,
    "arguments": arguments,
}  # fmt: skip
