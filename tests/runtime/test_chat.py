"""`edgepress run --chat`: the template as transformers renders it, the cache kept between turns, and ends of all kinds."""

from __future__ import annotations

import itertools
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from edgepress.pipeline import interrupt, stages
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.cli.conversation import COMMANDS
from edgepress.pipeline.errors import InputError, OptionError
from edgepress.pipeline.files import read_json, write_json
from edgepress.pipeline.model_files import end_tokens
from edgepress.pipeline.options import ExportOptions, QuantizeOptions, RunOptions
from edgepress.pipeline.runtime import decoder as runtime
from edgepress.pipeline.runtime import generate
from edgepress.pipeline.runtime.chat import Conversation, loops
from edgepress.pipeline.runtime.chat_template import ChatTemplate, read_template, special_tokens
from edgepress.pipeline.runtime.decoder import Decoder
from edgepress.pipeline.runtime.sampler import Sampler
from edgepress.pipeline.text.windows import load_tokenizer
from families import TINY
from manifests import recorded
from patience import HUNG
from transformers import AutoTokenizer, LlamaConfig

MAIN = "from edgepress.pipeline.cli import main; sys.exit(main(sys.argv[1:]))"
CHATML = """{%- for message in messages %}
    {%- if loop.first and message['role'] != 'system' %}
        {{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""
MARKED = """{{ bos_token }}{% for m in messages %}
    {% if m.role == 'assistant' %}
        {% generation %}
{{ m.content | trim }}{{ eos_token }}
        {% endgeneration %}
    {% elif m.role == 'user' %}
[{{ m | tojson }}]
        {% continue %}
    {% else %}
{{ raise_exception('only user and assistant, not ' ~ m.role) }}
    {% endif %}
{% endfor %}"""
FORGETFUL = "{% for m in messages %}{{ m.role }}: {{ m.content if m.role == 'user' else '' }}\n{% endfor %}assistant: "
MESSAGES = [
    {"role": "user", "content": "Good day <to> you & 'yours', Zoë"},
    {"role": "assistant", "content": " And to you. "},
    {"role": "user", "content": "Thanks"},
]


@pytest.fixture(scope="module", params=["shared cache", "growing cache"])
def artifact(request: pytest.FixtureRequest, random_model: Callable, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model with a chat template, in a folder whose name has a blank and letters beyond ASCII."""
    folder = tmp_path_factory.mktemp("chat") / "Grüße, Zoë"
    config = LlamaConfig(**{**TINY, "num_hidden_layers": 1}, tie_word_embeddings=False)
    random_model(config, folder / "model")
    (folder / "model" / "chat_template.jinja").write_text(CHATML)
    packed = stages.run("quantize", Artifact.load(folder / "model"), folder / "packed", QuantizeOptions(method="rtn"))
    made = stages.run("export", packed, folder / "onnx", ExportOptions(accuracy_level="0", text=text)).path
    if request.param == "growing cache":  # as the portable graph has
        graph = ir.load(made / "model.onnx")
        graph.metadata_props["edgepress.shared_cache"] = "0"
        ir.save(graph, made / "model.onnx")
        recorded(made, "model.onnx")
    assert Decoder(made).shared == (request.param == "shared cache")
    return made


@pytest.mark.parametrize("template", [CHATML, MARKED, FORGETFUL], ids=["chatml", "marked", "forgetful"])
@pytest.mark.parametrize("in_config", [True, False])
def test_templates_render_as_in_transformers(template: str, in_config: bool, copy_of: Callable, reference: Path) -> None:
    folder = copy_of(reference)
    if in_config:
        settings = read_json(folder / "tokenizer_config.json")
        write_json(folder / "tokenizer_config.json", settings | {"chat_template": template})
    else:
        (folder / "chat_template.jinja").write_text(template)
    mine, theirs = read_template(folder), AutoTokenizer.from_pretrained(folder)
    assert mine is not None
    for messages in (MESSAGES[:1], MESSAGES):
        for answer in (True, False):
            reference = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer)
            assert mine.render(messages, answer) == reference
    if template is MARKED:
        with pytest.raises(InputError, match="only user and assistant, not system"):
            mine.render([{"role": "system", "content": "Be brief."}, *MESSAGES])


def plain_answer(conversation: Conversation, folder: Path, questions: list[str], limit: int) -> list[str]:
    """What a decoder that reads the whole conversation afresh at each turn answers."""
    tokenizer, template = load_tokenizer(folder), read_template(folder)
    messages, answers = [], []
    for text in questions:
        messages.append({"role": "user", "content": text})
        ids = tokenizer.encode(template.render(messages), add_special_tokens=False).ids
        new = Decoder(folder).greedy(np.array(ids), limit, end_tokens(folder))
        answers.append("".join(generate.pieces(tokenizer, ids[-1], new)))
        messages.append({"role": "assistant", "content": answers[-1]})
    return answers


@pytest.mark.parametrize("template", [CHATML, FORGETFUL], ids=["chatml", "forgetful"])
def test_the_cache_is_kept_between_turns(template: str, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same answers as from reading all of it again; read is only what is new, or what a template renders differently."""
    original = (artifact / "chat_template.jinja").read_text()
    monkeypatch.setattr(runtime, "FIRST_CAPACITY", 40)  # the cache has to grow on the way
    try:
        (artifact / "chat_template.jinja").write_text(template)
        conversation = Conversation(artifact, RunOptions(chat=True, max_new_tokens=9))
        questions = ["Good day", "What is new?", "Well then"]
        answers, read = [], []
        for text in questions:
            answers.append("".join(conversation.answer(text)))
            read.append(conversation.read)
        assert answers == plain_answer(conversation, artifact, questions, 9) and all(answers)
        whole = len(conversation._fed)
        assert whole > 45 and read[2] < whole / 2
        conversation.forget()
        assert "".join(conversation.answer(questions[0])) == answers[0]
    finally:
        (artifact / "chat_template.jinja").write_text(original)


@pytest.mark.parametrize(
    "template",
    [
        "{{ range(1000000) }}",
        "{{ 1//0 }}",
        "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
        "{{ messages|tojson(cls=namespace) }}",
    ],
)
def test_whatever_a_template_does_is_one_line(template: str) -> None:
    """A template is a program of unknown origin."""
    with pytest.raises(InputError, match="refuses this conversation"):
        ChatTemplate(template, {}, "t").render([{"role": "user", "content": "x"}])


def test_odd_special_tokens_are_left_out() -> None:
    assert special_tokens({"eos_token": {}, "bos_token": {"content": "<s>"}, "pad_token": None}) == {"bos_token": "<s>"}


def test_growing_may_be_interrupted(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C between two layers: what was read stays, and the next tokens are read as if nothing had happened."""
    monkeypatch.setattr(runtime, "FIRST_CAPACITY", 8)
    decoder, ids = Decoder(artifact), np.arange(3, 23)
    reference = Decoder(artifact).feed(ids)
    decoder.feed(ids[:8])
    filled, calls = Decoder._filled, []

    def interrupted(self: Decoder, array: np.ndarray) -> object:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return filled(self, array)

    if decoder.shared:
        monkeypatch.setattr(Decoder, "_filled", interrupted)
        with pytest.raises(KeyboardInterrupt):
            decoder.feed(ids[8:])
    assert np.allclose(decoder.feed(ids[8:]), reference, atol=0.05 * reference.std())
    decoder.reset()
    assert np.allclose(decoder.feed(ids), reference, atol=0.05 * reference.std())


def test_text_that_is_no_utf8_is_one_line(artifact: Path, call: Callable) -> None:
    result = call("run", artifact, "caf\udce9", "--chat")
    assert result.code == 2 and "not UTF-8" in result.err.splitlines()[-1]


def test_a_full_context_is_reported_and_survived(artifact: Path, call: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that meets the end of the context says so, a message that no longer fits too, and /new goes on."""
    lines = iter(["Good day", "And what now?", "/new", "Good day", "/bye"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    result = call("run", artifact, "--chat")
    assert result.code == 0
    reports = result.err.splitlines()
    assert sum(line.startswith("the context of 256 tokens is full") for line in reports) == 2
    assert sum(line.startswith("error: the context is full") and "/new" in line for line in reports) == 1
    assert sum("tokens/s" in line for line in reports) == 2


def test_a_message_that_does_not_fit_leaves_the_talk_as_it_was(artifact: Path) -> None:
    conversation = Conversation(artifact, RunOptions(chat=True, max_new_tokens=4))
    list(conversation.answer("Good day"))
    before = list(conversation.messages)
    with pytest.raises(OptionError, match="start afresh with /new"):
        next(conversation.answer("word " * 300))
    assert conversation.messages == before
    assert list(conversation.answer("Short"))


def test_answers_end_at_the_end_tokens(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of generation_config.json, and the tokenizer's own."""
    conversation = Conversation(artifact, RunOptions(chat=True, max_new_tokens=12))
    whole = "".join(conversation.answer("Good day"))
    new = conversation._fed[-12:]
    later = Conversation(artifact, RunOptions(chat=True, max_new_tokens=12))
    assert 0 in later._stop  # <|endoftext|>
    later._stop = frozenset({new[5]})
    answers = "".join(later.answer("Good day"))
    assert len(answers) < len(whole) and whole.startswith(answers) and new[5] not in later._fed[-5:]


def test_ctrl_c_ends_the_answer_and_not_the_talk(
    artifact: Path, call: Callable, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """What was generated until then belongs to the conversation."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and so would this
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    lines, fed = iter(["Good day", "Go on", "/bye"]), []
    real = generate.tokens

    def interrupted(decoder: Decoder, ids: np.ndarray, *rest: object) -> object:
        fed.append(len(ids))
        for count, token in enumerate(real(decoder, ids, *rest)):  # type: ignore[arg-type]
            if len(fed) == 1 and count == 3:
                signal.raise_signal(signal.SIGINT)
            yield token

    monkeypatch.setattr(generate, "tokens", interrupted)
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    result = call("run", artifact, "--chat", "--max-new-tokens", 5)
    assert result.code == 0 and len(fed) == 2, result.err
    assert sum("tokens/s" in line for line in result.err.splitlines()) == 1
    assert not interrupt.signals


def test_a_missing_template_is_reported(reference: Path, artifact: Path, copy_of: Callable, call: Callable) -> None:
    """With what to do instead."""
    folder = copy_of(artifact, "no template")
    (folder / "chat_template.jinja").unlink()
    result = call("run", folder, "--chat")
    (line,) = result.err.splitlines()
    assert result.code == 2 and "has no chat template" in line and f"edgepress run '{folder}' " in line


def test_a_text_ended_at_once_names_chat(
    artifact: Path, copy_of: Callable, call: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a model trained to chat does with a bare question."""
    folder = copy_of(artifact, "no template")
    (folder / "chat_template.jinja").unlink()
    monkeypatch.setattr(generate, "tokens", lambda *_: iter(()))
    for where, hint in ((artifact, True), (folder, False)):
        result = call("run", where, "Good day")
        assert result.code == 0 and result.out == "Good day\n" and ("--chat" in result.err) == hint, result.err


def test_chat_in_the_light_base(artifact: Path) -> None:
    """From a pipe, with a system message, without torch and transformers; the end of the input ends the conversation."""
    heavy = ["torch", "transformers", "safetensors", "onnx", "onnx_ir"]
    code = f"import sys; sys.modules.update(dict.fromkeys({heavy}))\n{MAIN}"
    arguments = ["run", str(artifact), "--chat", "--max-new-tokens", "6", "--system", "Be brief."]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], input="Good day\n\nAnd now?\n", capture_output=True, text=True, timeout=HUNG
    )
    assert done.returncode == 0 and done.stderr.count("tokens/s") == 2 and len(done.stdout) > 10, done.stderr


def turns(
    call: Callable, folder: Path, *lines: str, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...] = ()
) -> tuple[str, str]:
    """What a piped conversation prints, and says beside."""
    given = iter([*lines, "/bye"])
    monkeypatch.setattr("builtins.input", lambda _: next(given))
    result = call("run", folder, "--chat", "--max-new-tokens", 5)
    assert result.code == 0, result.err
    return result.out, result.err


def test_commands_of_a_conversation(artifact: Path, call: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What begins with a slash is for edgepress: settings, another beginning, files; what is unknown is not sent to the model."""
    plain, said = turns(call, artifact, "Good day", "Go on", monkeypatch=monkeypatch)
    assert "a context of 256 tokens, the most likely tokens" in said and said.count("cut at 5 tokens") == 2
    out, said = turns(call, artifact, "/hlep", "/nothing at all", "/help", monkeypatch=monkeypatch)
    assert not out and "did you mean '/help'" in said and "there is no /nothing" in said and all(name in said for name in COMMANDS)
    file = tmp_path / "talk.json"
    out, said = turns(call, artifact, "Good day", f"/save {file}", monkeypatch=monkeypatch)
    assert [m["role"] for m in read_json(file)["messages"]] == ["user", "assistant"] and "2 messages saved" in said
    rest, _ = turns(call, artifact, f"/load {file}", "Go on", monkeypatch=monkeypatch)
    assert out + rest == plain
    turns(call, artifact, "Good day", "/system Be brief.", "Good day", f"/save {file}", monkeypatch=monkeypatch)
    assert [m["content"] for m in read_json(file)["messages"]][:2] == ["Be brief.", "Good day"]
    (notes := tmp_path / "notes.txt").write_text("mine")
    assert "is there already, and no conversation" in turns(call, artifact, f"/save {notes}", monkeypatch=monkeypatch)[1]
    assert notes.read_text() == "mine"
    write_json(others := tmp_path / "others.json", more := {"model": "x", "messages": [{"role": "user", "content": "mine"}]})
    assert "no conversation" in turns(call, artifact, f"/save {others}", monkeypatch=monkeypatch)[1] and read_json(others) == more
    assert "0 messages saved" in turns(call, artifact, "/save /dev/null", monkeypatch=monkeypatch)[1]
    write_json(file, {"messages": [{"role": "wizard", "content": "x"}]})
    for line in (f"/load {file}", "/load /nowhere/at/all", "/save /nowhere/at/all", "/set heat 3", "/set top_p 5", "/set seed x"):
        out, said = turns(call, artifact, line, monkeypatch=monkeypatch)
        assert not out and said.count("error: ") == 1, said


def test_settings_of_a_conversation(artifact: Path, call: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """They hold from the next answer on."""
    lines = ("/set temperature 0.9", "/set --top-k=40", "/set max_new_tokens 7", "/set", "Good day", "/set temperature", "Good day")
    _, said = turns(call, artifact, *lines, monkeypatch=monkeypatch)
    assert "temperature 0.9, top-k 40" in said and said.count("cut at 7 tokens") == 2
    assert said.rindex("the most likely tokens") > said.rindex("top-k 40")


def test_a_setting_without_a_value_is_as_before(artifact: Path, call: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that a model does not have, too; and a seed begins its numbers again."""
    _, said = turns(call, artifact, "/set lookup off", "/set seed 7", "/set lookup", "/set seed", "/set", monkeypatch=monkeypatch)
    assert "error" not in said and "lookup               auto" in said and "seed                 0" in said
    draws = ("/set temperature 3", "/set seed 7", "Good day", "/new", "Good day", "/new", "/set seed 7", "Good day")
    out, _ = turns(call, artifact, *draws, monkeypatch=monkeypatch)
    first, second, third = [answer for answer in out.split("\n") if answer]
    assert first == third != second


def test_a_refused_message_ends_nothing(artifact: Path, call: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A template may refuse what is asked; the conversation goes on as it was."""
    plain, _ = turns(call, artifact, "Good day", "Go on", monkeypatch=monkeypatch)
    copy = shutil.copytree(artifact, tmp_path / "strict")
    template = copy / "chat_template.jinja"
    strict = "{%- if messages[-1]['content'] == 'No' %}{{ raise_exception('never') }}{% endif %}"
    template.write_text(strict + template.read_text())
    out, said = turns(call, copy, "Good day", "No", "Go on", monkeypatch=monkeypatch)
    assert out == plain and said.count("error: ") == 1 and "never" in said


def test_a_message_of_several_lines(artifact: Path, call: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between quotes, a slash at its beginning included; one that the input's end cuts is sent as it is."""
    seen: list[str] = []
    real = Conversation.answer
    monkeypatch.setattr(Conversation, "answer", lambda self, text: seen.append(text) or real(self, text))
    turns(call, artifact, '"""/one', "", 'two"""', '"""alone"""', '  """', '"""/bye"""', " /bye", monkeypatch=monkeypatch)
    assert seen == ["/one\n\ntwo", "alone", '"""', "/bye", "/bye"]


def test_text_that_loops_ends(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy text that repeats itself would go on up to its limit; text that varies is left alone."""
    run = list(range(30))
    assert loops([7] * 128) and loops((run * 5)[-128:]) and not loops([*run * 4, *range(100, 108)]) and not loops([7] * 100)
    assert not loops(list(range(64)) * 2)  # twice is no loop
    for period, ends in ((9, True), (100, False)):
        talk = Conversation(artifact, RunOptions(chat=True, max_new_tokens=180))
        cycle = itertools.cycle(range(300, 300 + period))
        monkeypatch.setattr(Sampler, "__call__", lambda *_, cycle=cycle: next(cycle))
        assert "".join(talk.answer("Good day"))
        assert talk.ended.startswith("the text repeats itself" if ends else "cut at 180 tokens; /set max_new_tokens")
