"""The routes of `serve`: models, completions and chat completions as OpenAI's API has them.

A request's ``model`` is the name of the base model or of an attached adapter. All requests run in one continuous batch.
Fields that are not served are refused, with status 400: https://platform.openai.com/docs/api-reference says what they
would mean.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from quant_moelora.integrations.adapters import adapters_of
from quant_moelora.integrations.continuous import AdapterRequests
from quant_moelora.integrations.session import BASE_NAME

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer gives for the first bytes of a character


class _Sampling(BaseModel):
    model_config = ConfigDict(extra="forbid")

    model: str
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    n: int = Field(1, ge=1, le=1)
    stream: bool = False
    user: str | None = None


class CompletionRequest(_Sampling):
    """Body of /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int = Field(16, ge=1)


class Message(BaseModel):
    """One message of a chat; chat templates may read more fields."""

    model_config = ConfigDict(extra="allow")

    role: str
    content: str


class ChatRequest(_Sampling):
    """Body of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)


class RefusedError(Exception):
    """A request that is answered with an error, as OpenAI's clients read it."""

    def __init__(self, status: HTTPStatus, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code


def sampling_config(model: PreTrainedModel) -> GenerationConfig:
    """What requests are sampled with unless they say otherwise, which each of them does.

    transformers makes a processor for what differs from its default here, and requests can only change those.
    """
    own = model.generation_config
    ends = own.eos_token_id if own and own.eos_token_id is not None else getattr(model.config, "eos_token_id", None)
    return GenerationConfig(
        do_sample=True, temperature=0.5, top_p=0.5, top_k=1, eos_token_id=-1 if ends is None else ends
    )


@dataclass(frozen=True)
class Piece:
    """What has become of a prompt.

    Attributes:
        index: of the prompt.
        text: new since the piece before.
        tokens: generated so far.
        finish: why it is the last piece, or None.
    """

    index: int
    text: str
    tokens: int
    finish: str | None


class Engine:
    """Completes prompts in the continuous batch that runs.

    Attributes:
        base: name of the base model.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, base: str, requests: AdapterRequests
    ) -> None:
        self.base = base
        self.tokenizer = tokenizer
        self._requests = requests
        self._session = adapters_of(model).session
        config: Any = model.config.get_text_config()
        self._vocabulary, self._longest = int(config.vocab_size), int(config.max_position_embeddings)
        ends: Any = sampling_config(model).eos_token_id
        self._ends = set(ends if isinstance(ends, list) else [ends])

    @property
    def names(self) -> list[str]:
        """Names of the base model and of the attached adapters."""
        return [self.base, *self._session.slots]

    def adapter(self, name: str) -> str:
        """The adapter that a request's model means; RefusedError if there is none."""
        if name not in self.names:
            message = f"model {name!r} is unknown; known ones are {', '.join(self.names)}"
            raise RefusedError(HTTPStatus.NOT_FOUND, message, "model_not_found")
        return BASE_NAME if name == self.base else name

    def prompts(self, prompt: str | list[str] | list[int] | list[list[int]]) -> list[list[int]]:
        """Token ids of each prompt."""
        several: list[Any] = prompt if isinstance(prompt, list) else [prompt]
        if several and isinstance(several[0], int):
            several = [several]
        return [self.tokenizer(one)["input_ids"] if isinstance(one, str) else one for one in several]

    def chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a chat; RefusedError if the tokenizer has no template."""
        if self.tokenizer.chat_template is None:
            raise RefusedError(
                HTTPStatus.BAD_REQUEST, "the model's tokenizer has no chat template; use /v1/completions"
            )
        held = [message.model_dump() for message in messages]
        text: Any = self.tokenizer.apply_chat_template(held, tokenize=False, add_generation_prompt=True)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def check(self, prompts: Sequence[Sequence[int]], new: int) -> None:
        """RefusedError unless every prompt can be completed."""
        for ids in prompts or [[]]:
            if not ids or min(ids) < 0 or max(ids) >= self._vocabulary:
                message = f"a prompt needs tokens, of ids below {self._vocabulary}"
                raise RefusedError(HTTPStatus.BAD_REQUEST, message)
            if len(ids) + new > self._longest:
                message = f"{len(ids)} tokens and {new} new ones are more than the model's {self._longest}"
                raise RefusedError(HTTPStatus.BAD_REQUEST, message, "context_length_exceeded")

    async def complete(
        self, prompts: Sequence[Sequence[int]], adapter: str, new: int, sampling: _Sampling
    ) -> AsyncGenerator[Piece]:
        """Pieces of all prompts as they come; the requests of a caller that goes away are cancelled."""
        queue: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()
        # The most likely token is the best one of a single one.
        greedy = sampling.temperature == 0
        how = {
            "temperature": 1.0 if greedy else float(sampling.temperature),
            "top_k": 1 if greedy else self._vocabulary,
            "top_p": float(sampling.top_p),
        }
        running: dict[int, str] = {}
        try:
            for index, ids in enumerate(prompts):
                request = self._requests.new_id()
                self._requests.manager.register_result_handler(request, _into(queue, index))
                running[index] = self._requests.add_request(
                    ids, adapter, request, max_new_tokens=new, streaming=True, eos_token_id=list(self._ends), **how
                )
            sent = [""] * len(prompts)
            while running:
                index, output = await queue.get()
                if output.error is not None:
                    raise RefusedError(HTTPStatus.INTERNAL_SERVER_ERROR, output.error)
                tokens: list[int] = output.generated_tokens
                finish = None
                if output.is_finished():
                    finish = "stop" if tokens and tokens[-1] in self._ends else "length"
                    self._requests.forget(running.pop(index))
                decoded: Any = self.tokenizer.decode(tokens, skip_special_tokens=True)
                text: str = decoded
                if finish is None and text.endswith(_UNFINISHED):
                    continue
                yield Piece(index, text[len(sent[index]) :], len(tokens), finish)
                sent[index] = text
        finally:
            for request in running.values():
                self._requests.manager.cancel_request(request)
                self._requests.forget(request)


def _into(queue: asyncio.Queue[tuple[int, Any]], index: int) -> Callable[[Any], None]:
    return lambda output: queue.put_nowait((index, output))


@dataclass(frozen=True)
class _Form:
    """What differs between completions and chats in an answer."""

    prefix: str
    whole: str
    chunk: str
    whole_choice: Callable[[str], dict[str, Any]]
    chunk_choice: Callable[[str], dict[str, Any]]


_TEXT = _Form("cmpl", "text_completion", "text_completion", lambda text: {"text": text}, lambda text: {"text": text})
_CHAT = _Form(
    "chatcmpl",
    "chat.completion",
    "chat.completion.chunk",
    lambda text: {"message": {"role": "assistant", "content": text}},
    lambda text: {"delta": {"role": "assistant", "content": text}},
)


async def _answer(
    engine: Engine, body: _Sampling, prompts: list[list[int]], new: int, form: _Form
) -> dict[str, Any] | StreamingResponse:
    adapter = engine.adapter(body.model)
    engine.check(prompts, new)
    head = {"id": f"{form.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model}
    pieces = engine.complete(prompts, adapter, new, body)
    if body.stream:
        return StreamingResponse(_events(pieces, head, form), media_type="text/event-stream")
    texts, tokens, finish = [""] * len(prompts), [0] * len(prompts), [""] * len(prompts)
    async for piece in pieces:
        texts[piece.index] += piece.text
        tokens[piece.index] = piece.tokens
        finish[piece.index] = piece.finish or ""
    choices = [
        {"index": index, **form.whole_choice(text), "logprobs": None, "finish_reason": finish[index]}
        for index, text in enumerate(texts)
    ]
    asked, made = sum(map(len, prompts)), sum(tokens)
    usage = {"prompt_tokens": asked, "completion_tokens": made, "total_tokens": asked + made}
    return {**head, "object": form.whole, "choices": choices, "usage": usage}


async def _events(pieces: AsyncGenerator[Piece], head: dict[str, Any], form: _Form) -> AsyncGenerator[str]:
    try:
        async for piece in pieces:
            choice = {"index": piece.index, **form.chunk_choice(piece.text), "finish_reason": piece.finish}
            yield f"data: {json.dumps({**head, 'object': form.chunk, 'choices': [choice]})}\n\n"
    except RefusedError as error:  # the status has been sent
        yield f"data: {json.dumps(_error(error))}\n\n"
    finally:
        await pieces.aclose()
    yield "data: [DONE]\n\n"


def _error(error: RefusedError) -> dict[str, Any]:
    kind = "server_error" if error.status is HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"
    return {"error": {"message": str(error), "type": kind, "param": None, "code": error.code}}


def _refusal(error: RefusedError) -> JSONResponse:
    return JSONResponse(_error(error), status_code=error.status)


def create_app(engine: Engine) -> FastAPI:
    """The application; the continuous batch has to run while it serves."""
    app = FastAPI(title="quant_moelora")

    @app.exception_handler(RefusedError)
    async def refuse(_: Request, error: RefusedError) -> JSONResponse:
        """Answer what cannot be served."""
        return _refusal(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        """Answer a body with other fields or values than those that are served."""
        told = "; ".join(f"{'.'.join(map(str, each['loc'][1:]))}: {each['msg']}" for each in error.errors())
        return _refusal(RefusedError(HTTPStatus.BAD_REQUEST, told))

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The base model and the adapters."""
        held = [{"id": n, "object": "model", "created": 0, "owned_by": "quant_moelora"} for n in engine.names]
        return {"object": "list", "data": held}

    @app.post("/v1/completions", response_model=None)
    async def completions(body: CompletionRequest) -> dict[str, Any] | StreamingResponse:
        """Complete each prompt."""
        return await _answer(engine, body, engine.prompts(body.prompt), body.max_tokens, _TEXT)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(body: ChatRequest) -> dict[str, Any] | StreamingResponse:
        """Answer a chat, in the form of the tokenizer's template."""
        new = body.max_completion_tokens or body.max_tokens or 256
        return await _answer(engine, body, [engine.chat(body.messages)], new, _CHAT)

    del refuse, invalid, models, completions, chat_completions  # the application has them
    return app
