"""`edgepress serve`: the answers are those of `run`, whoever asks at once, goes away, or sends nonsense."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import openai
import pytest
import uvicorn
from edgepress.pipeline import stages
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.errors import OptionError
from edgepress.pipeline.flags import make
from edgepress.pipeline.options import ExportOptions, QuantizeOptions, RunOptions, ServeOptions
from edgepress.pipeline.runtime.chat import Conversation
from edgepress.pipeline.runtime.decoder import Decoder
from edgepress.pipeline.runtime.generate import TextModel
from edgepress.pipeline.runtime.sampler import Sampling
from edgepress.pipeline.runtime.stop_words import StopWords
from edgepress.pipeline.serve import engine as engine_module
from edgepress.pipeline.serve.answers import Answer
from edgepress.pipeline.serve.app import LARGEST_BODY, application, is_local
from edgepress.pipeline.serve.engine import WORTH, Done, Engine, Event, Job
from families import TINY
from patience import HUNG
from transformers import LlamaConfig

CHATML = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
QUESTIONS = [
    "Good day to you all, how is it in the town where your brother and his wife live",
    "What is new in the old house by the river?",
    "Well then, tell me of the weather",
    "No",
]
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def artifact(random_model: Callable, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that never ends by itself; level 0, so that no rounding depends on what is read beside."""
    folder = tmp_path_factory.mktemp("serve") / "tiny"
    config = LlamaConfig(**{**TINY, "num_hidden_layers": 1, "max_position_embeddings": 2048}, tie_word_embeddings=False)
    random_model(config, folder / "model")
    (folder / "model" / "chat_template.jinja").write_text(CHATML)
    packed = stages.run("quantize", Artifact.load(folder / "model"), folder / "packed", QuantizeOptions(method="rtn"))
    return stages.run("export", packed, folder / "04-export", ExportOptions(accuracy_level="0", text=text)).path


def until(true: Callable[[], bool]) -> bool:
    """Whether it becomes true within a few seconds."""
    end = time.monotonic() + 5
    while not true() and time.monotonic() < end:
        time.sleep(0.02)
    return true()


class Server:
    """A server of this process, at a port of its own."""

    def __init__(self, folder: Path, options: ServeOptions) -> None:
        self.engine = Engine(folder, options)
        self.app = uvicorn.Server(uvicorn.Config(application(self.engine), port=0, log_level="error", timeout_graceful_shutdown=1))
        self.thread = threading.Thread(target=self.app.run, daemon=True)
        self.thread.start()
        while not self.app.started:
            time.sleep(0.01)
        self.port: int = self.app.servers[0].sockets[0].getsockname()[1]
        self.client = openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=options.api_key or "none", max_retries=0)

    def ask(self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> tuple[int, dict]:
        """Status and content of a plain request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request(method, path, body, JSON if headers is None else headers)
        response = connection.getresponse()
        content = response.read()
        connection.close()
        return response.status, json.loads(content) if content.startswith(b"{") else {"text": content.decode()}

    def idle(self) -> bool:
        """Whether all is done, within a few seconds."""
        return until(lambda: not self.engine.running and not self.engine.waiting)

    def end(self) -> None:
        """And with it the engine's thread."""
        self.engine.close()
        self.app.should_exit = True
        self.thread.join(20)
        assert not self.engine._thread.is_alive()


OPTIONS = ServeOptions(threads=1, parallel=3, max_tokens=24)


@pytest.fixture(scope="module")
def server(artifact: Path) -> Iterator[Server]:
    made = Server(artifact, OPTIONS)
    yield made
    made.end()


@pytest.fixture
def another(artifact: Path) -> Iterator[Callable[..., Server]]:
    """Servers with other options."""
    made: list[Server] = []

    def start(**options: object) -> Server:
        made.append(Server(artifact, replace(OPTIONS, **options)))  # type: ignore[arg-type]
        return made[-1]

    yield start
    for one in made:
        one.end()


def asked(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def expected(artifact: Path, questions: list[str], **options: object) -> list[str]:
    """The answers of `run --chat`."""
    talk = Conversation(artifact, RunOptions(chat=True, max_new_tokens=24, threads=1, **options))  # type: ignore[arg-type]
    return ["".join(talk.answer(question)) for question in questions]


def test_answers_are_those_of_run(server: Server, artifact: Path) -> None:
    """Whole and streamed, of a conversation and of a text, by OpenAI's own client."""
    talk = server.client.chat.completions
    (wanted,) = expected(artifact, ["Good day"])
    whole = talk.create(model="tiny", messages=asked("Good day"))
    assert whole.choices[0].message.content == wanted and whole.choices[0].finish_reason == "length" and whole.model == "tiny"
    assert whole.usage.completion_tokens == 24 and whole.usage.total_tokens == whole.usage.prompt_tokens + 24
    chunks = list(talk.create(model="tiny", messages=asked("Good day"), stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == wanted
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-2].choices[0].finish_reason == "length"
    assert not chunks[-1].choices and chunks[-1].usage.completion_tokens == 24
    text = "".join(TextModel(artifact, 1).stream("One day", 10))
    made = server.client.completions.create(model="", prompt="One day", max_tokens=10)
    assert made.choices[0].text == text and made.object == "text_completion"
    stream = server.client.completions.create(model="", prompt=["One day"], max_tokens=10, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == text
    ids = server.engine.model.tokenizer.encode("One day").ids
    assert server.client.completions.create(model="", prompt=ids, max_tokens=10).choices[0].text == text
    assert [model.id for model in server.client.models.list()] == ["tiny"]
    assert server.client.models.retrieve("tiny").owned_by == "edgepress"


def test_samples_are_drawn_as_run_draws(server: Server, artifact: Path) -> None:
    """With the same settings and seed; without a seed each time anew."""
    (wanted,) = expected(artifact, ["Good day"], temperature=0.9, top_p=0.9, top_k=500, seed=5)
    settings = {"model": "", "messages": asked("Good day"), "temperature": 0.9, "top_p": 0.9}
    create = server.client.chat.completions.create
    assert create(**settings, extra_body={"top_k": 500}, seed=5).choices[0].message.content == wanted
    assert create(**settings).choices[0].message.content != create(**settings).choices[0].message.content
    best = server.engine.model.tokenizer.encode("house").ids[-1]
    pushed = create(model="", messages=asked("Good day"), logit_bias={str(best): 100}, max_tokens=3)
    assert pushed.choices[0].message.content == server.engine.model.tokenizer.decode([best] * 3)


def test_a_conversation_goes_on_in_its_cache(server: Server, artifact: Path) -> None:
    """Only what is new is read; the answers are those of a conversation that `run` keeps."""
    wanted = expected(artifact, QUESTIONS)
    messages, ids = list[dict[str, str]](), list[int]()
    for question, answer in zip(QUESTIONS, wanted, strict=True):
        messages += asked(question)
        before, ids = ids, server.engine.conversation_ids(messages)
        made = server.client.chat.completions.create(model="", messages=messages)  # type: ignore[arg-type]
        assert made.choices[0].message.content == answer
        messages.append({"role": "assistant", "content": answer})
        common = next((place for place, pair in enumerate(zip(before, ids, strict=False)) if pair[0] != pair[1]), len(before))
        assert made.usage.prompt_tokens_details.cached_tokens >= (common if common >= WORTH else 0)
    assert common >= WORTH


def test_a_request_again_reads_two_tokens(server: Server) -> None:
    """Not one, which int8 activations round otherwise when it is read alone: the same request has the same answer."""
    ids = server.engine.text_ids("It was a cold morning in the town where your brother and his wife live, and it was raining there")
    counts, answers = [], set()
    for _ in range(3):
        made = server.client.completions.create(model="", prompt=ids, max_tokens=6)
        counts.append(made.usage.prompt_tokens_details.cached_tokens)
        answers.add(made.choices[0].text)
    assert counts[1:] == [len(ids) - 2] * 2 and len(answers) == 1


def test_stop_words_and_logarithms(server: Server) -> None:
    """A stop word is not shown, whatever tokens it lies across."""
    talk = server.client.chat.completions
    whole = talk.create(model="", messages=asked("No"), logprobs=True, top_logprobs=3, max_tokens=20)
    text, rows = whole.choices[0].message.content, whole.choices[0].logprobs.content
    told = bytes(byte for row in rows for byte in row.bytes).decode(errors="replace")
    assert told.replace("\ufffd", "") == text.replace("\ufffd", "") and len(rows) == 20
    for row in rows:
        assert row.top_logprobs[0].token == row.token and row.top_logprobs[0].logprob == row.logprob < 0  # greedy
    word = text[9:14]
    for stream in (False, True):
        made = talk.create(model="", messages=asked("No"), stop=["never there", word], max_tokens=20, stream=stream)
        shown = "".join(c.choices[0].delta.content or "" for c in made) if stream else made.choices[0].message.content
        assert shown == text[: text.index(word)]
    old = server.client.completions.create(model="", prompt="One day", max_tokens=5, logprobs=2).choices[0].logprobs
    assert len(old.tokens) == len(old.token_logprobs) == 5 and all(len(best) == 2 for best in old.top_logprobs)


@pytest.mark.parametrize("seed", range(20))
def test_stop_words_do_not_depend_on_pieces(seed: int) -> None:
    """Against the whole text searched at once."""
    chance = random.Random(seed)
    text = "".join(chance.choices("ab\n", k=60))
    words = ["".join(chance.choices("ab\n", k=chance.randint(1, 5))) for _ in range(3)]
    stops, shown = StopWords(words), ""
    rest = text
    while rest:
        size = chance.randint(1, 6)
        piece, rest = rest[:size], rest[size:]
        shown += stops.add(piece)
    shown += stops.rest()
    assert shown == text[: min((text.find(word) for word in words if word in text), default=len(text))]
    assert stops.found == any(word in text for word in words)


WRONG: dict[str, tuple[object, str | None]] = {
    "no JSON": (b"{", None),
    "a list": ([], None),
    "no messages": ({}, None),
    "a call without text": ({"messages": [{"role": "tool", "content": None}]}, "messages[0].role"),
    "none of them": ({"messages": []}, "messages"),
    "a role": ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
    "a picture": ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0].content"),
    "temperature": ({"messages": asked("x"), "temperature": "hot"}, "temperature"),
    "too hot": ({"messages": asked("x"), "temperature": 1e9}, "temperature"),
    "top_p": ({"messages": asked("x"), "top_p": 2}, "top_p"),
    "a penalty of nothing": ({"messages": asked("x"), "repetition_penalty": 1e-50}, "repetition_penalty"),
    "max_tokens": ({"messages": asked("x"), "max_tokens": 0}, "max_tokens"),
    "n": ({"messages": asked("x"), "n": 3}, "n"),
    "tools": ({"messages": asked("x"), "tools": [{"type": "function"}]}, "tools"),
    "response_format": ({"messages": asked("x"), "response_format": {"type": "json_object"}}, "response_format"),
    "logit_bias": ({"messages": asked("x"), "logit_bias": {"house": 3}}, "logit_bias"),
    "a token beyond": ({"messages": asked("x"), "logit_bias": {"99999999": 3}}, "logit_bias"),
    "stop": ({"messages": asked("x"), "stop": ["a"] * 99}, "stop"),
    "too long": ({"messages": asked("word " * 3000)}, None),
    "longer than can be": ({"messages": asked("1" * 2_000_000)}, None),
    "half a character": (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', None),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named(server: Server, name: str) -> None:
    """In OpenAI's shape, with the field at fault."""
    body, param = WRONG[name]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    status, answer = server.ask("POST", "/v1/chat/completions", content)
    assert status == 400, answer
    assert set(answer["error"]) == {"message", "type", "param", "code"} and answer["error"]["type"] == "invalid_request_error"
    assert answer["error"]["param"] == param and "\n" not in answer["error"]["message"]
    assert ("tokens can be" in answer["error"]["message"]) == (name == "longer than can be")  # it was not read


def test_what_clients_send_is_taken(server: Server) -> None:
    """Nulls for what has a default, a batch of one prompt, a temperature next to nothing."""
    plain = {"prompt": "One day", "max_tokens": 3, "temperature": 0}
    ids = server.engine.text_ids("One day")
    changes = ({}, {"model": None, "stream_options": {"include_usage": None}}, {"prompt": [ids]}, {"temperature": 1e-320})
    told = [server.ask("POST", "/v1/completions", json.dumps(plain | change).encode()) for change in changes]
    assert {status for status, _ in told} == {200}
    assert len({answer["choices"][0]["text"] for _, answer in told}) == 1


def test_the_bytes_of_half_a_character(server: Server) -> None:
    """Logprobs tell what a token stands for, not the sign that shows it as broken."""
    answer, text = Answer(server.engine, chat=True), "a \U0001f409!"
    rows = [answer._token(token, -1.0) for token in server.engine.model.tokenizer.encode(text, add_special_tokens=False).ids]
    assert any(row["token"] == "\ufffd" for row in rows)
    assert bytes(byte for row in rows for byte in row["bytes"]).decode().strip() == text


def test_what_is_not_there_is_refused(server: Server) -> None:
    """Routes, methods, kinds and sizes; and names that do not lead to this machine."""
    good = json.dumps({"messages": asked("x")}).encode()
    assert server.ask("GET", "/v1/nothing")[0] == 404
    assert server.ask("GET", "/v1/models/other")[0] == 404
    assert server.ask("GET", "/v1/chat/completions")[0] == 405
    assert server.ask("POST", "/v1/chat/completions", good, {"Content-Type": "text/plain"})[0] == 415
    assert server.ask("POST", "/v1/chat/completions", b" " * (LARGEST_BODY + 1))[0] == 413
    assert server.ask("GET", "/v1/models", headers={"Host": "rebound.example"})[0] == 400
    status, page = server.ask("GET", "/")
    assert status == 200 and "<title>edgepress</title>" in page["text"] and "http" not in page["text"].replace("https", "http")
    for prompt in ([], ["a", "b"], [-1], [10**9], ["a", 5]):
        status, answer = server.ask("POST", "/v1/completions", json.dumps({"prompt": prompt}).encode())
        assert status == 400 and answer["error"]["message"], (prompt, answer)


def test_nonsense_never_ends_it(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    """Three hundred bodies that are nearly right: each is refused or answered, and the next one is answered right."""
    chance = random.Random(0)
    whole = json.dumps(
        {"messages": asked("Good day"), "max_tokens": 1, "stop": ["x"], "seed": 3, "logit_bias": {"5": 1.5}}
    ).encode()
    values = [None, True, -1, 0, 1e308, "", "x" * 300, [], {}, [[]], {"a": 1}, 2**70, "\x00", "\ud800"]
    keys = ["messages", "max_tokens", "stop", "seed", "logit_bias", "top_k", "stream_options", "n", "prompt", "logprobs", "top_p"]
    for number in range(300):
        if number % 2:
            body = json.loads(whole)
            body[chance.choice(keys)] = chance.choice(values)
            content = json.dumps(body).encode()
        else:
            spoiled = bytearray(whole)
            for _ in range(chance.randint(1, 4)):
                spoiled[chance.randrange(len(spoiled))] = chance.randrange(256)
            content = bytes(spoiled)
        status, answer = server.ask("POST", chance.choice(["/v1/chat/completions", "/v1/completions"]), content)
        assert status == 200 or (400 <= status < 500 and answer["error"]["message"]), (status, answer, content)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
    assert server.ask("POST", "/v1/chat/completions", whole)[0] == 200


def test_a_client_that_goes_away_ends_its_answer(server: Server) -> None:
    """Streamed or not: the engine is free again long before the answer would be done."""
    for stream in (True, False):
        body = json.dumps({"messages": asked("Good day"), "max_tokens": 1900, "stream": stream}).encode()
        link = socket.create_connection(("127.0.0.1", server.port))
        head = [
            "POST /v1/chat/completions HTTP/1.1",
            "Host: localhost",
            f"Content-Length: {len(body)}",
            "Content-Type: application/json",
        ]
        link.sendall("\r\n".join([*head, "", ""]).encode() + body)
        if stream:
            link.recv(500)
        else:
            time.sleep(0.2)
        assert until(lambda: server.engine.running == 1)
        link.close()
        assert server.idle()
        told = server.ask("GET", "/metrics")[1]["text"]
        assert 'edgepress_requests_total{end="cancelled"}' in told


def job_of(engine: Engine, ids: list[int], limit: int, events: list[Event], **sampling: object) -> Job:
    return Job(ids, limit, Sampling(**sampling), 0, (), None, events.append)  # type: ignore[arg-type]


def test_tokens_without_text_are_turns_too(server: Server) -> None:
    """Halves of characters: others have their turn in between, and whoever leaves ends them."""
    engine, events, others = server.engine, list[Event](), list[Event]()
    half = engine.model.tokenizer.encode("\U0001f409", add_special_tokens=False).ids[0]
    assert engine.model.tokenizer.decode([half]) == "\ufffd"
    ids = engine.text_ids("One day")
    first = job_of(engine, ids, 1900, events, bias={half: 1000.0})
    engine.submit(first)
    assert until(lambda: engine.running == 1)
    engine.submit(job_of(engine, ids, 5, others))
    assert until(lambda: bool(others) and isinstance(others[-1], Done))
    assert not events
    first.cancelled.set()
    assert server.idle() and not events


def test_whoever_left_the_line_holds_nobody_up(another: Callable[..., Server], artifact: Path) -> None:
    """A request that does not fit yet, and whose client went away, must not wait for its turn before others."""
    server = another(memory=3000 * TextModel(artifact).decoder.cache_bytes(1) / 1e9)
    engine, ids, ends = server.engine, server.engine.text_ids("One day"), [list[Event]() for _ in range(3)]
    long, gone = job_of(engine, ids, 1900, ends[0]), job_of(engine, ids, 1900, ends[1])
    engine.submit(long)
    assert until(lambda: engine.running == 1)
    with engine._changed:
        engine.submit(gone)
        engine.submit(job_of(engine, ids, 3, ends[2]))
        gone.cancelled.set()
    assert until(lambda: bool(ends[2]) and isinstance(ends[2][-1], Done))
    assert not any(isinstance(event, Done) for event in ends[0])
    long.cancelled.set()
    assert server.idle()


@pytest.mark.parametrize("count", [17, 18, 24, 25])
def test_a_long_prompt_is_read_in_pieces_of_two_tokens_at_least(
    server: Server, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One alone is rounded otherwise: see _common."""
    monkeypatch.setattr(engine_module, "CHUNK", 8)
    read, real, events = list[int](), Decoder.feed, list[Event]()

    def feed(self: Decoder, ids: np.ndarray, keep: int = 1) -> np.ndarray:
        read.append(len(ids))
        return real(self, ids, keep)

    monkeypatch.setattr(Decoder, "feed", feed)
    server.engine.submit(job_of(server.engine, list(range(100 + count, 100 + 2 * count)), 1, events))
    assert until(lambda: bool(events) and isinstance(events[-1], Done))
    assert sum(read) == count and min(read) > 1 and max(read) <= 8


def test_more_than_may_wait_are_told_so(another: Callable[..., Server]) -> None:
    """Status 429 at once, and those in line are answered in their order."""
    server = another(parallel=1, queue=2)
    body = json.dumps({"messages": asked("Good day"), "max_tokens": 300}).encode()
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: server.ask("POST", "/v1/chat/completions", body), range(8)))
    statuses = sorted(status for status, _ in answers)
    assert statuses[0] == 200 and statuses[-1] == 429 and statuses.count(200) >= 3, statuses
    assert len({answer["choices"][0]["message"]["content"] for status, answer in answers if status == 200}) == 1


def test_many_at_once_get_what_each_would_alone(server: Server, artifact: Path) -> None:
    """Eight clients, some of which go away in the middle."""
    wanted = {question: answer for question in QUESTIONS for answer in expected(artifact, [question])}
    chance, faults = random.Random(1), list[str]()
    plans = [[(chance.choice(QUESTIONS), chance.random() < 0.3) for _ in range(6)] for _ in range(8)]

    def client(plan: list[tuple[str, bool]]) -> None:
        for question, leaves in plan:
            stream = server.client.chat.completions.create(model="", messages=asked(question), stream=True)
            text = ""
            for chunk in stream:
                text += chunk.choices[0].delta.content or ""
                if leaves and len(text) > 10:
                    stream.close()
                    break
            if not (wanted[question].startswith(text) if leaves else text == wanted[question]):
                faults.append(text)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(client, plans))
    assert not faults and server.idle()


def test_caches_stay_within_the_memory(another: Callable[..., Server], artifact: Path) -> None:
    """The longest unused goes first; a prompt that can never fit is refused."""
    a_token = TextModel(artifact).decoder.cache_bytes(1)
    server = another(memory=200 * a_token / 1e9)
    assert server.engine.context == 200
    for number in range(12):
        made = server.client.chat.completions.create(model="", messages=asked(f"{number} is a number"), max_tokens=40)
        assert made.usage.completion_tokens == 40
        assert 0 < server.engine.cache_bytes <= 200 * a_token
    with pytest.raises(openai.BadRequestError, match="context is 200"):
        server.client.chat.completions.create(model="", messages=asked("word " * 300))


def test_a_key_is_asked_for(another: Callable[..., Server]) -> None:
    """Of all but the page and its health."""
    server = another(api_key="sesame")
    assert server.client.models.list().data
    for path in ("/v1/models", "/metrics"):
        assert server.ask("GET", path)[0] == 401
    assert server.ask("POST", "/v1/chat/completions", b"{}", JSON | {"Authorization": "Bearer wrong"})[0] == 401
    assert server.ask("GET", "/")[0] == server.ask("GET", "/health")[0] == 200

    assert server.ask("GET", "/v1/models", headers={"Authorization": "bearer sesame"})[0] == 200
    for key in ("", "schl\u00fcssel", "open sesame"):
        with pytest.raises(OptionError, match="--api-key must be"):
            make(ServeOptions, {"api_key": key})


@pytest.mark.parametrize("host", ["127.0.0.2", "::1"])
def test_names_that_lead_here_are_refused(another: Callable[..., Server], host: str) -> None:
    """However the address of this machine is written."""
    server = another(host=host)
    assert server.ask("GET", "/v1/models")[0] == 200
    assert server.ask("GET", "/v1/models", headers={"Host": "rebound.example"})[0] == 400
    assert server.ask("GET", "/v1/models", headers={"Host": f"[{host}]:80" if ":" in host else host})[0] == 200
    assert all(map(is_local, ("::ffff:127.0.0.1", "127.1.2.3", "::1", "localhost")))
    assert not any(map(is_local, ("::ffff:8.8.8.8", "0.0.0.0", "192.168.1.4", "::", "example.org")))


@pytest.mark.parametrize(
    "flags", ["--host {}", "--host a..b", "--memory inf", "--memory 1e-9", "--port 65536", "--time-limit 1e300"]
)
def test_what_cannot_be_served_is_one_line(artifact: Path, call: Callable, flags: str) -> None:
    given = flags.format("x" * 70).split()
    result = call("serve", artifact, *given)
    assert result.code == 2 and result.err.startswith("error: ") and result.err.count("\n") == 1, result.err


def test_an_answer_ends_in_time(another: Callable[..., Server]) -> None:
    """Cut, and said to be."""
    server = another(time_limit=1.0)
    server.engine.options = replace(server.engine.options, time_limit=0.05)
    made = server.client.chat.completions.create(model="", messages=asked("Good day"), max_tokens=1900)
    assert made.choices[0].finish_reason == "length" and made.usage.completion_tokens < 1900


def test_the_command(artifact: Path, tmp_path: Path) -> None:
    """It says where it is, needs no torch, and ends by Ctrl-C as it said; a port that is taken is one line."""
    script = "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
    script += "from edgepress.pipeline.cli import main; sys.exit(main())"
    start = [sys.executable, "-c", script, "serve", str(artifact), "--port"]
    process = subprocess.Popen([*start, "0"], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert line.startswith("serving tiny at http://127.0.0.1:"), line
        port = int(line.split("127.0.0.1:")[1].split()[0])
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        assert client.chat.completions.create(model="", messages=asked("Good day"), max_tokens=2).choices[0].message.content
        taken = subprocess.run([*start, str(port)], capture_output=True, text=True, timeout=HUNG, check=False)
        assert taken.returncode == 2 and taken.stderr.count("\n") == 1 and "already in use" in taken.stderr, taken.stderr
        stream = client.chat.completions.create(model="", messages=asked("Good day"), max_tokens=1900, stream=True)
        next(iter(stream))
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
        process.send_signal(signal.SIGINT)  # whoever presses it twice is no worse off
        assert process.wait(20) == 0 and process.stderr.read() == ""
    finally:
        process.kill()
    absent = subprocess.run([*start[:-2], str(tmp_path)], capture_output=True, text=True, timeout=HUNG, check=False)
    assert absent.returncode == 2 and absent.stderr.startswith("error: ") and absent.stderr.count("\n") == 1


BAD: dict[str, list[object]] = {
    "messages": [
        [], "hi", None, 5, [{}], [{"role": "wizard", "content": "x"}], [{"content": "x"}], [[]], [{"role": "user", "content": 5}],
        [{"role": "user", "content": [{"text": "x"}]}], [{"role": "user", "content": [{"type": "image_url"}]}],
    ],
    "max_tokens": [0, -1, 1.5, "many", [], 1 << 40], "max_completion_tokens": [0, "x"], "temperature": [-1, 101, "hot", []],
    "top_p": [-0.1, 1.1, "x"], "top_k": [-1, 0.5, {}], "min_p": [2, "x"], "repetition_penalty": [0, "x", 1e9],
    "presence_penalty": [3, "x"], "frequency_penalty": [-3, []], "logit_bias": [[], {"x": 1}, {"1": 500}, {"1": "x"}, {"-1": 1}],
    "stop": [5, {}, [5], ["x"] * 50, ["x" * 5000]], "seed": [1.5, "x", 1 << 70], "stream": ["yes", 1], "n": [2, "x"],
    "tools": [[{"type": "function"}]], "response_format": [{"type": "json_object"}, 5], "logprobs": ["yes", 5],
    "top_logprobs": [-1, 21, "x"], "stream_options": [5, {"include_usage": "x"}], "model": [5, []],
}  # fmt: skip
PATHS = ["/", "/v1", "/v1/models", "/v1/embeddings", "/v1/chat", "/../../etc/passwd", "/%00", "/v1/chat/completions/x"]
KINDS = ["text/plain", "", "application/xml", "multipart/form-data"]
STRANGE = [
    b"[" * 100_000, b'{"a":' * 50_000, b'"' + b"\\u0000" * 1000, b'{"messages": NaN}', b'{"prompt": "\xff"}', b"null", b"1e999",
]  # fmt: skip


def malformed(rng: random.Random) -> tuple[str, str, bytes, dict[str, str]]:
    """Method, path, body and headers of a request that nobody can answer."""
    good = {"messages": [{"role": "user", "content": "No"}], "max_tokens": 2}
    kind = rng.randrange(9)
    if kind < 4:  # what is asked for cannot be
        field = rng.choice(list(BAD))
        return "POST", "/v1/chat/completions", json.dumps(good | {field: rng.choice(BAD[field])}).encode(), JSON
    whole = json.dumps(good).encode()
    if kind == 4:  # cut
        return "POST", "/v1/chat/completions", whole[: rng.randrange(len(whole))], JSON
    if kind == 5:  # noise
        return "POST", "/v1/completions", rng.randbytes(rng.randrange(200)), JSON
    if kind == 6:  # not where or how
        return rng.choice(["POST", "PUT", "DELETE", "PATCH"]), rng.choice(PATHS), whole, JSON
    if kind == 7:  # not said to be JSON
        return "POST", "/v1/chat/completions", whole, {"Content-Type": rng.choice(KINDS)}
    return "POST", rng.choice(["/v1/completions", "/v1/chat/completions"]), rng.choice(STRANGE), JSON


def test_a_thousand_malformed_requests(server: Server, capfd: pytest.CaptureFixture[str]) -> None:
    """Each is refused in OpenAI's shape; nothing breaks, and the next good one is answered."""
    rng = random.Random(0)
    for number in range(1000):
        method, path, body, headers = malformed(rng)
        status, content = server.ask(method, path, body, headers)
        assert 400 <= status < 500, (number, method, path, body[:200], status, content)
        assert content["error"]["message"] and "Traceback" not in str(content), (number, content)
    said = capfd.readouterr()
    assert "Traceback" not in said.out + said.err
    good = json.dumps({"messages": [{"role": "user", "content": "No"}], "max_tokens": 2}).encode()
    assert server.ask("POST", "/v1/chat/completions", good)[0] == 200 and server.idle()


@pytest.mark.parametrize("sent", [b"\x00\x01\x02", b"GET\r\n\r\n", b"POST /v1/completions HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
                                  b"POST /v1/completions HTTP/1.1\r\nContent-Length: 999\r\n\r\n{", b"GET / HTTP/9.9\r\n\r\n",
                                  b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\n\r\n"])  # fmt: skip
def test_what_is_hardly_http(sent: bytes, server: Server, capfd: pytest.CaptureFixture[str]) -> None:
    """Refused or cut off, and the server goes on."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as line:
        line.sendall(sent)
        line.shutdown(socket.SHUT_WR)
        answer = b""
        with contextlib.suppress(ConnectionError):
            while part := line.recv(1 << 16):
                answer += part
    assert not answer or answer.split(b" ", 2)[1].startswith(b"4"), answer[:200]
    assert "Traceback" not in "".join(capfd.readouterr())
    assert server.ask("GET", "/health")[0] == 200
