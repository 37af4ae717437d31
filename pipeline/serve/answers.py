"""What is sent: OpenAI's objects, whole and in pieces."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence

import msgspec
from edgepress.pipeline.files import JsonObject
from edgepress.pipeline.serve.engine import Done, Engine, Piece
from edgepress.pipeline.text.pieces import piece_bytes


class Answer:
    """The objects of one request: of a conversation ("chat.completion") or of a text ("text_completion")."""

    def __init__(self, engine: Engine, chat: bool) -> None:
        self._tokenizer, self._chat = engine.model.tokenizer, chat
        kind = "chat.completion" if chat else "text_completion"
        id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._base: JsonObject = {"id": id, "object": kind, "created": int(time.time()), "model": engine.name}

    def whole(self, pieces: Sequence[Piece], done: Done) -> JsonObject:
        """The object of an answer that is not streamed."""
        text, logprobs = "".join(piece.text for piece in pieces), self._logprobs(pieces)
        content: JsonObject = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        choice = {"index": 0, **content, "logprobs": logprobs, "finish_reason": done.reason}
        return {**self._base, "choices": [choice], "usage": usage(done)}

    def opening(self) -> JsonObject | None:
        """The first object of a stream, which says who speaks."""
        return self._chunk({"delta": {"role": "assistant", "content": ""}}) if self._chat else None

    def pieces(self, pieces: Sequence[Piece]) -> JsonObject:
        """The object of pieces of a stream."""
        text = "".join(piece.text for piece in pieces)
        content: JsonObject = {"delta": {"content": text}} if self._chat else {"text": text}
        return self._chunk(content, logprobs=self._logprobs(pieces))

    def closing(self, done: Done) -> JsonObject:
        """The object that says why a stream ends."""
        return self._chunk({"delta": {}} if self._chat else {"text": ""}, done.reason)

    def accounts(self, done: Done) -> JsonObject:
        """The object behind it, where usage was asked for."""
        return {**self._chunk({}), "choices": [], "usage": usage(done)}

    def _chunk(self, content: JsonObject, reason: str | None = None, logprobs: JsonObject | None = None) -> JsonObject:
        choice = {"index": 0, **content, "logprobs": logprobs, "finish_reason": reason}
        return {**self._base, **({"object": "chat.completion.chunk"} if self._chat else {}), "choices": [choice]}

    def _logprobs(self, pieces: Sequence[Piece]) -> JsonObject | None:
        rows = [row for piece in pieces for row in zip(piece.tokens, piece.noted, strict=False)]
        if not rows:
            return None
        if self._chat:
            return {
                "content": [
                    self._token(token, value) | {"top_logprobs": [self._token(*item) for item in best.items()]}
                    for token, (value, best) in rows
                ]
            }
        return {
            "tokens": [self._text(token) for token, _ in rows],
            "token_logprobs": [value for _, (value, _) in rows],
            "top_logprobs": [{self._text(token): value for token, value in best.items()} for _, (_, best) in rows],
        }

    def _token(self, token: int, value: float) -> JsonObject:
        text = self._text(token)
        return {"token": text, "logprob": value, "bytes": list(self._bytes(token, text))}

    def _bytes(self, token: int, text: str) -> bytes:
        """Those that the token stands for, which may be no whole character."""
        known = piece_bytes(self._tokenizer.id_to_token(token) or "") if "\ufffd" in text else None
        return text.encode() if known is None else known

    def _text(self, token: int) -> str:
        return str(self._tokenizer.decode([token], skip_special_tokens=False))


def usage(done: Done) -> JsonObject:
    """Tokens of prompt and answer."""
    return {
        "prompt_tokens": done.prompt,
        "completion_tokens": done.new,
        "total_tokens": done.prompt + done.new,
        "prompt_tokens_details": {"cached_tokens": done.cached},
    }


def event(content: JsonObject) -> bytes:
    """A server-sent event."""
    return b"data: " + msgspec.json.encode(content) + b"\n\n"


def error(message: str, kind: str, param: str | None = None, code: str | None = None) -> JsonObject:
    """An error in OpenAI's shape."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
