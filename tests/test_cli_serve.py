"""serve: what its routes answer, against `generate` of the same model with the same adapter."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, ContinuousBatchingConfig

import quant_moelora as qm

pytest.importorskip("fastapi")  # of the extra `serve`
import httpx

from quant_moelora.cli.openai_api import Engine, create_app, sampling_config
from quant_moelora.integrations.continuous import continuous_batching
from quant_moelora.integrations.session import BASE_NAME
from tests.commands import Command
from tests.integrations.models import GPTQ, A, B, finest, folder_of, load

PROMPT = "t69 t250 t133"
NEW = 6
TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}t9"
Post = Callable[..., Awaitable[httpx.Response]]


class Server:
    """A model that is served within this process."""

    def __init__(self, device: torch.device) -> None:
        self.model = load(GPTQ, device_map=device.type, dtype=finest(device))
        qm.attach_adapters(self.model, {"a": A, "b": B})
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder_of(GPTQ))
        self.batches: list[int] = []

    def ask(self, questions: Callable[[Post], Awaitable[Any]]) -> Any:
        """What ``questions`` returns, which gets a function that posts."""
        config = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)

        async def run() -> Any:
            engine = Engine(self.model, self.tokenizer, "demo", requests)
            transport = httpx.ASGITransport(create_app(engine))
            async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:

                async def post(path: str, **body: Any) -> httpx.Response:
                    return await (client.post(path, json=body) if body else client.get(path))

                return await questions(post)

        def watch(_: Any, __: Any, kwargs: Any) -> None:
            self.batches.append(len({*kwargs["adapter_names"].names}))

        with continuous_batching(self.model, sampling_config(self.model), config, per_request=True) as requests:
            hook = self.model.register_forward_pre_hook(watch, with_kwargs=True)
            try:
                return asyncio.run(run())
            finally:
                hook.remove()

    def generated(self, text: str, name: str) -> str:
        """What `generate` gives, most likely tokens only."""
        inputs = self.tokenizer(text, return_tensors="pt").to(self.model.device)
        out = self.model.generate(**inputs, adapter_names=[name], max_new_tokens=NEW, do_sample=False)
        return self.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.fixture(scope="module")
def server(device: torch.device) -> Server:
    return Server(device)


NAMES = {"demo": BASE_NAME, "a": "a", "b": "b"}


def test_models_together_are_as_alone(server: Server) -> None:
    async def questions(post: Post) -> list[httpx.Response]:
        how = {"prompt": PROMPT, "max_tokens": NEW, "temperature": 0}
        return list(await asyncio.gather(*(post("/v1/completions", model=model, **how) for model in NAMES)))

    answers = [answer.json() for answer in server.ask(questions)]
    texts = [answer["choices"][0]["text"] for answer in answers]
    assert texts == [server.generated(PROMPT, name) for name in NAMES.values()]
    assert len({*texts}) == 3, "adapters differ"
    assert max(server.batches) == 3, "one batch has served all"
    assert [answer["model"] for answer in answers] == list(NAMES)
    prompt = len(server.tokenizer(PROMPT)["input_ids"])
    for answer in answers:
        made = answer["usage"]["completion_tokens"]
        assert answer["usage"] == {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}
        assert answer["choices"][0]["finish_reason"] == ("length" if made == NEW else "stop")


def test_streams_and_several_prompts(server: Server) -> None:
    prompts = [PROMPT, server.tokenizer(PROMPT + " t7")["input_ids"]]

    async def questions(post: Post) -> list[httpx.Response]:
        how = {"model": "b", "max_tokens": NEW, "temperature": 0}
        return [
            await post("/v1/completions", prompt=[prompts[0], PROMPT + " t7"], stream=True, **how),
            await post("/v1/completions", prompt=prompts[1], **how),
        ]

    stream, whole = server.ask(questions)
    lines = [line.removeprefix("data: ") for line in stream.text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    texts = ["", ""]
    finishes: list[str] = []
    for line in lines:
        (choice,) = json.loads(line)["choices"]
        texts[choice["index"]] += choice["text"]
        finishes += [choice["finish_reason"]] if choice["finish_reason"] else []
    assert len(lines) > 2 and len(finishes) == 2
    expected = [server.generated(PROMPT, "b"), server.generated(PROMPT + " t7", "b")]
    assert texts == expected
    assert whole.json()["choices"][0]["text"] == expected[1]


def test_chat(server: Server) -> None:
    messages = [{"role": "user", "content": "t3"}, {"role": "assistant", "content": "t4"}]

    async def questions(post: Post) -> list[httpx.Response]:
        how = {"model": "a", "messages": messages, "temperature": 0, "max_tokens": NEW}
        refused = await post("/v1/chat/completions", **how)
        server.tokenizer.chat_template = TEMPLATE
        asked = [await post("/v1/chat/completions", stream=stream, **how) for stream in (False, True)]
        server.tokenizer.chat_template = None
        return [refused, *asked]

    refused, whole, stream = server.ask(questions)
    assert refused.status_code == 400 and "no chat template" in refused.json()["error"]["message"]
    ids = server.tokenizer("t3 t4 t9", add_special_tokens=False, return_tensors="pt").input_ids.to(server.model.device)
    out = server.model.generate(input_ids=ids, adapter_names=["a"], max_new_tokens=NEW, do_sample=False)
    expected = server.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert whole.json()["choices"][0]["message"] == {"role": "assistant", "content": expected}
    chunks = [json.loads(line.removeprefix("data: ")) for line in stream.text.split("\n\n")[:-2]]
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == expected


def test_temperature_is_each_requests_own(server: Server) -> None:
    """At a temperature of 100 all tokens are nearly as likely: four samples of six tokens do not agree by chance."""

    async def questions(post: Post) -> list[httpx.Response]:
        how = {"model": "a", "max_tokens": NEW, "prompt": PROMPT}
        asked = [post("/v1/completions", temperature=100 if i < 4 else 0, **how) for i in range(6)]
        return list(await asyncio.gather(*asked))

    texts = [answer.json()["choices"][0]["text"] for answer in server.ask(questions)]
    assert texts[4] == texts[5] == server.generated(PROMPT, "a")
    assert len({*texts}) == 5


def test_models_and_refusals(server: Server) -> None:
    bad: list[tuple[dict[str, Any], int, str]] = [
        ({"model": "c"}, 404, "model 'c' is unknown; known ones are demo, a, b"),
        ({"best_of": 2}, 400, "best_of: Extra inputs are not permitted"),
        ({"n": 2}, 400, "n: Input should be less than or equal to 1"),
        ({"prompt": [256]}, 400, "ids below 256"),
        ({"prompt": []}, 400, "a prompt needs tokens"),
        ({"max_tokens": 10**6}, 400, "more than the model's"),
    ]

    async def questions(post: Post) -> list[httpx.Response]:
        good = {"model": "a", "prompt": PROMPT, "max_tokens": 2}
        return [await post("/v1/models"), *[await post("/v1/completions", **{**good, **one}) for one, _, _ in bad]]

    models, *refused = server.ask(questions)
    assert [model["id"] for model in models.json()["data"]] == ["demo", "a", "b"]
    for answer, (_, status, message) in zip(refused, bad, strict=True):
        assert answer.status_code == status
        assert message in answer.json()["error"]["message"]


def test_the_command_serves_what_it_loads(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[Any] = []

    def run(app: Any, host: str, port: int) -> None:
        async def ask() -> httpx.Response:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as client:
                return await client.get("/v1/models")

        served.append((host, port, [model["id"] for model in asyncio.run(ask()).json()["data"]]))

    sizes: list[tuple[Any, Any]] = []

    def watched(model: Any, generation: Any, config: Any, **kwargs: Any) -> Any:
        sizes.append((config.num_blocks, config.max_batch_tokens))
        return continuous_batching(model, generation, config, **kwargs)

    monkeypatch.setattr("uvicorn.run", run)
    monkeypatch.setattr("quant_moelora.integrations.continuous.continuous_batching", watched)
    adapter = f"a={A}"
    done = command(
        "serve", "--model", str(folder_of(GPTQ)), "--adapter", adapter, "--port", "80", "--cache-tokens", "512"
    )
    assert done.code == 0, done.err
    assert served == [("127.0.0.1", 80, [GPTQ, "a"])]
    assert sizes == [(2, 512)], "transformers would fill memory with the batch"
    taken = command("serve", "--model", str(folder_of(GPTQ)), "--adapter", adapter, "--name", "a")
    assert taken.code == 2 and "another name than the base model's" in taken.err


def test_without_the_extra(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    refused = command("serve", "--model", str(folder_of(GPTQ)))
    assert refused.code == 2 and "no package uvicorn" in refused.err and "[serve]" in refused.err
