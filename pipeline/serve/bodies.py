"""What a request may ask for, as OpenAI's interface names it, and the job that comes of it."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Literal, TypeVar

import msgspec
from edgepress.pipeline.documents import shown
from edgepress.pipeline.errors import EdgepressError
from edgepress.pipeline.runtime.chat_template import Message
from edgepress.pipeline.runtime.sampler import with_wishes
from edgepress.pipeline.serve.engine import Engine, Event, Job
from msgspec import Meta, Struct

LONGEST_STOP, MOST_STOPS, MOST_BIASES = 200, 16, 1024
Share = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Count = Annotated[int, Meta(ge=1, le=1 << 31)]


class BadRequest(EdgepressError):
    """A request that cannot be answered; param: the field at fault."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class TextPart(Struct):
    """A part of a message's content."""

    type: str
    text: str = ""


class ChatMessage(Struct):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart] | None = None


class StreamOptions(Struct):
    """What a stream ends with."""

    include_usage: bool | None = False


class Common(Struct, kw_only=True):
    """What both kinds of request share. Fields that are absent here are ignored, but for those of ``refused``."""

    model: str | None = ""
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = None
    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_p: Share | None = None
    top_k: Annotated[int, Meta(ge=0, le=1 << 31)] | None = None
    min_p: Share | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    stop: str | list[str] | None = None
    seed: Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)] | None = None
    n: int | None = 1
    # What would change the answer's form, and is not done.
    tools: list[msgspec.Raw] | None = None
    functions: list[msgspec.Raw] | None = None
    response_format: dict[str, msgspec.Raw] | None = None


class ChatBody(Common, kw_only=True):
    """Body of /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None


class TextBody(Common, kw_only=True):
    """Body of /v1/completions."""

    prompt: str | list[str | int | list[int]]
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    echo: bool | None = False
    suffix: str | None = None
    best_of: int | None = 1


Body = TypeVar("Body", ChatBody, TextBody)


def parsed(content: bytes, kind: type[Body]) -> Body:
    """The body of a request. Raises BadRequest that names the field at fault."""
    try:
        body = msgspec.json.decode(content, type=kind)
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at `$")
        field = where.strip(".`") or None
        raise BadRequest(f"{field}: {what}" if field else what, field) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest(f"the body is not JSON: {error}") from error
    _refuse_what_is_not_done(body)
    return body


def _refuse_what_is_not_done(body: Common) -> None:
    for name in ("tools", "functions", "echo", "suffix"):
        if getattr(body, name, None):
            raise BadRequest(f"{name}: not supported", name)
    if body.response_format and body.response_format.get("type", b"") != msgspec.Raw(b'"text"'):
        raise BadRequest("response_format: only text is supported", "response_format")
    for name in ("n", "best_of"):
        if getattr(body, name, None) not in (None, 1):
            raise BadRequest(f"{name}: only one answer is made", name)
    stops = _stops(body)
    if len(stops) > MOST_STOPS or any(len(word) > LONGEST_STOP for word in stops):
        raise BadRequest(f"stop: at most {MOST_STOPS} words of {LONGEST_STOP} characters", "stop")


def _stops(body: Common) -> tuple[str, ...]:
    return (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())


def chat_messages(body: ChatBody) -> list[Message]:
    """The conversation as a template takes it."""
    messages: list[Message] = []
    for number, message in enumerate(body.messages):
        if message.content is None or isinstance(message.content, str):
            text = message.content or ""
        elif any(part.type != "text" for part in message.content):
            raise BadRequest("only text can be read", f"messages[{number}].content")
        else:
            text = "".join(part.text for part in message.content)
        messages.append({"role": "system" if message.role == "developer" else message.role, "content": text})
    return messages


def prompt_ids(body: TextBody, engine: Engine) -> list[int]:
    """Ids of the one prompt of a request."""
    prompt: object = body.prompt
    if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
        prompt = prompt[0]  # a batch of one
    if isinstance(prompt, str):
        return engine.text_ids(prompt)
    ids = [item for item in prompt if isinstance(item, int)] if isinstance(prompt, list) else []
    if not ids or ids != prompt:
        raise BadRequest("prompt: one a request, as a text or a list of token ids", "prompt")
    if wrong := [id for id in ids if not 0 <= id < engine.model.decoder.vocabulary]:
        raise BadRequest(f"prompt: {wrong[0]} is no token id", "prompt")
    return engine.checked(ids, "the prompt")


def job(body: ChatBody | TextBody, ids: list[int], engine: Engine, deliver: Callable[[Event], None]) -> Job:
    """The job of a request with these ids of its prompt; ``deliver`` as Job's."""
    if isinstance(body, ChatBody):
        wanted, likeliest = body.max_completion_tokens or body.max_tokens, body.top_logprobs or 0 if body.logprobs else None
    else:
        wanted, likeliest = body.max_tokens, body.logprobs
    return Job(
        ids=ids,
        limit=min(wanted or engine.options.max_tokens, engine.context - len(ids)),
        sampling=replace(
            with_wishes(engine.model.own_sampling, body), bias=_bias(body.logit_bias or {}, engine.model.decoder.vocabulary)
        ),
        seed=secrets.randbits(32) if body.seed is None else body.seed % (1 << 64),
        stop=_stops(body),
        likeliest=likeliest,
        deliver=deliver,
        deadline=time.monotonic() + engine.options.time_limit,
    )


def _bias(given: dict[str, float], vocabulary: int) -> dict[int, float]:
    """Token id -> what is added to its logit, from JSON, where keys are text."""
    if len(given) > MOST_BIASES:
        raise BadRequest(f"logit_bias: at most {MOST_BIASES} tokens", "logit_bias")
    if wrong := [key for key in given if not (key.isdecimal() and key.isascii() and len(key) < 10 and int(key) < vocabulary)]:
        raise BadRequest(f"logit_bias: {shown(wrong[0])} is no token id", "logit_bias")
    return {int(key): value for key, value in given.items()}
