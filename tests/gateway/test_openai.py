"""OpenAI's protocol, by OpenAI's own client and by hand, against a real engine."""

import asyncio
import base64
import json
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from serving import LLM, SamplingParams
from serving.config import GatewaySpec
from serving.gateway.http import make_app
from serving.gateway.keys import digest
from tests import tiny
from tests.gateway.harness import House, house
from tests.gateway.ingress import http_port, patient  # noqa: F401  (used by being here)

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 12, "extra_body": {"ignore_eos": True}}


@dataclass
class Door:
    house: House
    url: str
    client: openai.AsyncOpenAI
    raw: httpx.AsyncClient


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tiny.checkpoint(tmp_path_factory.mktemp("models") / "tiny")
    (made / "chat_template.jinja").write_text(TEMPLATE)
    return made


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(folder, dtype="float32", slots=4)


@pytest.fixture(scope="module")
async def door(folder: Path) -> AsyncIterator[Door]:
    spec = GatewaySpec(max_message_mb=0.1, max_streams=8)
    async with (
        house(folder, gateway=spec, slots=4, max_tokens=4096) as h,
        http_port(make_app(h.requests, h.fleet, spec, h.metrics)) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
        httpx.AsyncClient(base_url=url, timeout=20) as raw,
    ):
        yield Door(h, url, client, raw)
        await h.idle()


async def test_completions_are_what_the_engine_alone_gives(door: Door, llm: LLM) -> None:
    params = SamplingParams(temperature=0.8, seed=5, n=2, max_tokens=12, ignore_eos=True)
    expected = llm.generate("def f", params)[0].outputs
    for prompt in ("def f", llm.encode("def f")):
        answer = await door.client.completions.create(
            model="tiny",
            prompt=prompt,
            n=2,
            seed=5,
            temperature=0.8,
            max_tokens=12,
            extra_body={"ignore_eos": True, "return_tokens": True},
        )
        assert [choice.text for choice in answer.choices] == [one.text for one in expected]
        assert [choice.finish_reason for choice in answer.choices] == ["length", "length"]
        for choice, one in zip(answer.choices, expected, strict=True):
            told = choice.model_extra["tokens"]
            assert [t["id"] for t in told] == one.token_ids and [t["depth"] for t in told] == one.depths
            assert {t["exit_reason"] for t in told} == {"full_depth"}
            assert choice.text.startswith("".join(t["text"] for t in told))
        assert answer.usage.completion_tokens == 24
        assert answer.usage.total_tokens == 24 + len(llm.encode("def f"))
        assert answer.usage.model_extra["mean_depth"] == 1


async def test_a_stream_adds_up_to_the_whole(door: Door) -> None:
    options: dict[str, Any] = {
        "model": "tiny",
        "prompt": ["def f", "x ="],
        "n": 2,
        "seed": 1,
        "max_tokens": 20,
    }
    whole = await door.client.completions.create(**options, logprobs=2)
    streamed = await door.client.completions.create(
        **options, logprobs=2, stream=True, stream_options={"include_usage": True}
    )
    texts, ends, usage, offsets = [""] * 4, [None] * 4, [], [[] for _ in range(4)]
    async for chunk in streamed:
        usage.append(chunk.usage)
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            offsets[choice.index] += choice.logprobs.text_offset
            ends[choice.index] = ends[choice.index] or choice.finish_reason
    assert texts == [choice.text for choice in whole.choices]
    assert ends == [choice.finish_reason for choice in whole.choices]
    assert offsets == [choice.logprobs.text_offset for choice in whole.choices]
    assert usage[-1].completion_tokens == whole.usage.completion_tokens and set(usage[:-1]) == {None}


async def test_log_probabilities_and_the_prompt_echoed(door: Door, llm: LLM) -> None:
    scored = llm.score("def f(x)")[0]
    answer = await door.client.completions.create(
        model="tiny", prompt="def f(x)", echo=True, logprobs=1, **GREEDY | {"max_tokens": 3}
    )
    alone = await door.client.completions.create(
        model="tiny", prompt="def f(x)", echo=True, logprobs=1, max_tokens=0
    )
    told, only = answer.choices[0].logprobs, alone.choices[0].logprobs
    count = len(llm.encode("def f(x)"))
    assert len(told.tokens) == count + 3 and told.tokens[:count] == only.tokens
    assert only.token_logprobs[0] is None
    assert only.token_logprobs[1:] == pytest.approx(scored, abs=1e-5)
    assert alone.choices[0].text == "def f(x)" and answer.choices[0].text.startswith("def f(x)")
    best = [max(top.values()) for top in only.top_logprobs[1:]]
    assert all(high >= p - 1e-6 for high, p in zip(best, only.token_logprobs[1:], strict=True))
    for text, at, following in zip(only.tokens, only.text_offset, [*only.text_offset[1:], None], strict=True):
        assert "def f(x)"[at:following] == text
    assert alone.usage.completion_tokens == 0 and alone.usage.prompt_tokens == count
    plain = await door.client.completions.create(model="tiny", prompt="def f(x)", echo=True, **GREEDY)
    assert (
        plain.choices[0].text
        == "def f(x)"
        + llm.generate("def f(x)", SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))[0].text
    )


async def test_a_conversation_is_written_by_the_models_template(door: Door, llm: LLM) -> None:
    messages: list[Any] = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]},
    ]
    prompt = "<system>be brief\n<user>hello\n<assistant>"
    ids = llm.tokenizer.encode(prompt, add_special_tokens=False).ids
    expected = llm.generate([ids], SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=2))[
        0
    ]
    answer = await door.client.chat.completions.create(
        model="tiny", messages=messages, logprobs=True, top_logprobs=2, **GREEDY
    )
    assert answer.choices[0].message.content == expected.text
    told = answer.choices[0].logprobs.content
    assert [one.logprob for one in told] == pytest.approx(expected.logprobs, abs=1e-4)
    assert all(len(one.top_logprobs) == 2 for one in told)
    assert [bytes(one.bytes).decode() for one in told if one.bytes is not None] == [
        one.token for one in told if one.bytes is not None
    ]
    stream = await door.client.chat.completions.create(model="tiny", messages=messages, stream=True, **GREEDY)
    deltas = [chunk.choices[0] async for chunk in stream]
    assert deltas[0].delta.role == "assistant" and all(d.delta.role is None for d in deltas[1:])
    assert "".join(d.delta.content for d in deltas) == expected.text
    assert deltas[-1].finish_reason == "length"


async def test_structured_output(door: Door) -> None:
    schema = {
        "type": "object",
        "properties": {"on": {"type": "boolean"}},
        "required": ["on"],
        "additionalProperties": False,
    }
    asked = {"type": "json_schema", "json_schema": {"name": "switch", "schema": schema, "strict": True}}
    answer = await door.client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "?"}],
        response_format=asked,
        max_tokens=200,
        seed=1,
    )
    if answer.choices[0].finish_reason == "stop":  # white space may go on for as long as it likes
        assert isinstance(json.loads(answer.choices[0].message.content)["on"], bool)
    for extra, pattern in (
        ({"guided_regex": "(yes|no)"}, "yes|no"),
        ({"guided_choice": ["a b", 'c"d', "é"]}, 'a b|c"d|é'),
        ({"guided_grammar": 'start: "x" /[0-9]/'}, "x[0-9]"),
        ({"guided_json": {"enum": [7]}}, "7"),
    ):
        one = await door.client.completions.create(model="tiny", prompt="a", max_tokens=50, extra_body=extra)
        assert re.fullmatch(pattern, one.choices[0].text)
        assert one.choices[0].finish_reason == "stop"


async def test_embeddings_have_unit_length_and_may_be_cut(door: Door) -> None:
    texts = ["def f", "x = 1"]
    whole = await door.client.embeddings.create(model="tiny", input=texts)  # this client asks for base64
    cut = await door.client.embeddings.create(
        model="tiny", input=texts, dimensions=7, encoding_format="float"
    )
    vectors, short = (np.array([one.embedding for one in made.data]) for made in (whole, cut))
    assert vectors.shape == (2, tiny.GLA["hidden_size"]) and short.shape == (2, 7)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx([1, 1], abs=1e-5)
    again = vectors[:, :7] / np.linalg.norm(vectors[:, :7], axis=1, keepdims=True)
    assert short == pytest.approx(again, abs=1e-5)
    last = await door.client.embeddings.create(model="tiny", input=texts[0], extra_body={"pooling": "last"})
    assert np.abs(np.array(last.data[0].embedding) - vectors[0]).max() > 1e-3
    assert whole.usage.prompt_tokens == whole.usage.total_tokens > 0
    raw = await door.raw.post("/v1/embeddings", json={"input": "def f", "encoding_format": "base64"})
    assert np.frombuffer(base64.b64decode(raw.json()["data"][0]["embedding"]), "<f4") == pytest.approx(
        vectors[0]
    )


async def test_models(door: Door) -> None:
    listed = [model async for model in await door.client.models.list()]
    assert [model.id for model in listed] == ["tiny"]
    one = await door.client.models.retrieve("tiny")
    assert one.model_extra["max_model_len"] == 4096 and one.model_extra["depth_policies"] == ["full", "chain"]
    with pytest.raises(openai.NotFoundError, match="model = 'other'"):
        await door.client.models.retrieve("other")


async def test_stop_strings_request_ids_and_the_only_model(door: Door) -> None:
    plain = (await door.raw.post("/v1/completions", json={"prompt": "def f", "temperature": 0})).json()
    text = plain["choices"][0]["text"]
    stop = text[5:7]
    cut = await door.raw.post(
        "/v1/completions",
        json={"prompt": "def f", "temperature": 0, "stop": stop, "n": None, "user": "me"},
        headers={"x-request-id": "mine-7"},
    )
    assert cut.json()["id"] == "cmpl-mine-7"
    choice = cut.json()["choices"][0]
    assert choice["text"] == text[: text.index(stop)] and choice["finish_reason"] == "stop"
    assert plain["model"] == "tiny" and plain["usage"]["completion_tokens"] == 16


HELLO = [{"role": "user", "content": "a"}]
BAD: list[tuple[str, dict[str, Any], int, str | None, str]] = [
    ("completions", {}, 400, "prompt", "is required"),
    ("completions", {"prompt": ""}, 400, "prompt", "at least one token"),
    ("completions", {"prompt": []}, 400, "prompt", "must be 1 to"),
    ("completions", {"prompt": [1, "a"]}, 400, "prompt", "a list of token ids"),
    ("completions", {"prompt": [[]]}, 400, "prompt", "at least one token"),
    ("completions", {"prompt": [999]}, 400, "prompt", "0 to 299"),
    ("completions", {"prompt": "a", "model": "gpt"}, 404, "model", "must be one of tiny"),
    ("completions", {"prompt": "a", "temprature": 1}, 400, "temprature", "no parameter"),
    ("completions", {"prompt": "a", "temperature": -1}, 400, "temperature", "-1"),
    ("completions", {"prompt": "a", "temperature": "hot"}, 400, "temperature", "'hot'"),
    ("completions", {"prompt": "a", "max_tokens": 0}, 400, "max_tokens", "from 1"),
    ("completions", {"prompt": "a", "max_tokens": 1.5}, 400, "max_tokens", "integer"),
    ("completions", {"prompt": "a", "max_tokens": True}, 400, "max_tokens", "integer"),
    ("completions", {"prompt": "a", "n": 100}, 400, "n", "4 slots"),
    ("completions", {"prompt": "a", "best_of": 3}, 400, "best_of", "n = 1"),
    ("completions", {"prompt": "a", "suffix": "b"}, 400, "suffix", "not supported"),
    ("completions", {"prompt": "a", "logit_bias": {"x": 1}}, 400, "logit_bias", "token id"),
    ("completions", {"prompt": "a", "logit_bias": {"300": 1}}, 400, "logit_bias", "below 300"),
    ("completions", {"prompt": "a", "logprobs": 65}, 400, "logprobs", "64"),
    ("completions", {"prompt": "a", "stop": 7}, 400, "stop", "a string"),
    ("completions", {"prompt": "a", "depth": "sideways"}, 400, "depth", "sideways"),
    ("completions", {"prompt": "a", "depth": "fixed(9)"}, 400, "depth.fixed", "9"),
    ("completions", {"prompt": "a", "timeout_s": -1}, 400, "timeout_s", "above 0"),
    ("completions", {"prompt": "a", "priority": 1000}, 400, "priority", "100"),
    ("completions", {"prompt": "a", "stream_options": {"include_usage": True}}, 400, "stream_options", "stream"),
    ("completions", {"prompt": "a", "stream": True, "stream_options": {"x": 1}}, 400, "stream_options.x", "no param"),
    ("completions", {"prompt": "a", "response_format": {"type": "xml"}}, 400, "response_format.type", "xml"),
    ("completions", {"prompt": "a", "guided_regex": "("}, 400, "grammar", "usable regex"),
    ("completions", {"prompt": "a", "guided_regex": "a", "guided_choice": ["b"]}, 400, "guided_choice", "together"),
    ("completions", {"prompt": "a", "stream": True, "guided_regex": "("}, 400, "grammar", "usable regex"),
    ("completions", {"prompt": "a" * 60_000}, 400, "prompt", "at most 4095 tokens"),
    ("chat/completions", {"messages": []}, 400, "messages", "must be 1 to"),
    ("chat/completions", {"messages": [{"content": "a"}]}, 400, "messages[0].role", "string"),
    ("chat/completions", {"messages": [{"role": "user"}]}, 400, "messages[0].content", "text parts"),
    ("chat/completions", {"messages": HELLO, "tools": [{}]}, 400, "tools", "not supported"),
    ("chat/completions", {"messages": HELLO, "top_logprobs": 2}, 400, "top_logprobs", "true"),
    ("chat/completions", {"messages": [{**HELLO[0], "content": [{"type": "image_url"}]}]}, 400,
     "messages[0].content[0]", "text"),
    ("embeddings", {"input": "a", "dimensions": 999}, 400, "dimensions", "24"),
    ("embeddings", {"input": "a", "dimensions": 0}, 400, "dimensions", "from 1"),
    ("embeddings", {"input": "a", "pooling": "max"}, 400, "pooling", "mean, last"),
    ("embeddings", {"input": "a", "encoding_format": "hex"}, 400, "encoding_format", "hex"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "words"), BAD, ids=[f"{b[0]}-{b[3]}" for b in BAD]
)
async def test_what_cannot_be_served_is_said(
    door: Door, path: str, body: dict[str, Any], status: int, param: str | None, words: str
) -> None:
    answer = await door.raw.post(f"/v1/{path}", json=body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["param"] == param and words in error["message"]


@pytest.mark.parametrize(
    ("content", "kind", "status", "words"),
    [
        (b'{"prompt": "a"}', "text/plain", 415, "application/json"),
        (b'{"prompt": "a"}', None, 415, "application/json"),
        (b'{"prompt": ', "application/json", 400, "not valid JSON"),
        (b'["prompt"]', "application/json", 400, "JSON object, not list"),
        (b'{"prompt": "\xff"}', "application/json", 400, "not valid JSON"),
        (b'{"prompt": "\\ud800"}', "application/json", 400, "not valid JSON"),
        (b'{"prompt": "a", "temperature": NaN}', "application/json", 400, "NaN"),
        (
            b'{"prompt": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
            "application/json; charset=utf-8",
            400,
            "too deeply",
        ),
        (b'{"prompt": "' + b"a" * 200_000 + b'"}', "application/json", 413, "more than 104857 bytes"),
        (b"", "application/json", 400, "not valid JSON"),
    ],
    ids=["media", "no-media", "cut", "list", "utf8", "surrogate", "nan", "deep", "long", "empty"],
)
async def test_bodies_that_are_none(
    door: Door, content: bytes, kind: str | None, status: int, words: str
) -> None:
    headers = {"content-type": kind} if kind else {}
    answer = await door.raw.post("/v1/completions", content=content, headers=headers)
    assert answer.status_code == status and words in answer.json()["error"]["message"], answer.text


async def test_a_body_without_an_announced_length_is_cut_off(door: Door) -> None:
    """It never ends, so only a server that counts while it reads can answer."""
    host, port = door.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        b"transfer-encoding: chunked\r\n\r\n" + b"8000\r\n%b\r\n" % (b"a" * 0x8000) * 4
    )
    assert b"413" in await asyncio.wait_for(reader.readline(), 10)
    writer.close()


async def test_paths_and_methods_that_are_not_there(door: Door) -> None:
    lost = await door.raw.get("/v2/nothing")
    assert lost.status_code == 404 and "no such path" in lost.json()["error"]["message"]
    wrong = await door.raw.get("/v1/completions")
    assert wrong.status_code == 405 and wrong.headers["allow"] == "POST"


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_hangs_up_frees_its_slots(door: Door, stream: bool) -> None:
    body = {"prompt": ["a", "b"], "max_tokens": 4000, "ignore_eos": True, "stream": stream}
    before = _cancelled((await door.raw.get("/metrics")).text)
    async with httpx.AsyncClient(base_url=door.url, timeout=60) as client:
        if stream:
            async with client.stream("POST", "/v1/completions", json=body) as answer:
                assert answer.status_code == 200
                await anext(answer.aiter_lines())
        else:
            asking = asyncio.create_task(client.post("/v1/completions", json=body))
            while not door.house.requests._open:
                await asyncio.sleep(0.005)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
    await door.house.idle()
    assert _cancelled((await door.raw.get("/metrics")).text) == before + 1


def _cancelled(metrics: str) -> int:
    found = re.search(r'method="completions",outcome="CANCELLED"} (\d+)', metrics)
    return int(found[1]) if found else 0


async def test_deadlines_before_and_within_a_stream(door: Door) -> None:
    body: dict[str, Any] = {"prompt": "a", "max_tokens": 4000, "ignore_eos": True, "timeout_s": 0.2}
    late = await door.raw.post("/v1/completions", json=body)
    assert late.status_code == 504 and late.headers["x-should-retry"] == "false"
    assert late.json()["error"]["code"] == "deadline_exceeded"
    stream = await door.client.completions.create(
        model="tiny",
        prompt="a",
        max_tokens=4000,
        stream=True,
        extra_body={"ignore_eos": True, "timeout_s": 0.2},
    )
    assert (await anext(stream)).choices[0].text is not None
    with pytest.raises(openai.APIError, match=r"timeout_s = 0\.2"):
        await _drained(stream)


async def _drained(stream: Any) -> None:
    async for _ in stream:
        pass


async def test_more_streams_than_a_gateway_carries(door: Door) -> None:
    body = {"prompt": ["a"] * 12, "max_tokens": 500, "ignore_eos": True}
    full = await door.raw.post("/v1/completions", json=body)
    assert full.status_code == 429 and full.headers["retry-after"] == "1"
    assert full.json()["error"]["type"] == "rate_limit_error"
    await door.house.idle()


async def test_a_continuation_is_resumed_and_a_session_goes_on(door: Door) -> None:
    body = {"prompt": "def f", "max_tokens": 12, "temperature": 0, "ignore_eos": True, "return_tokens": True}
    whole = (await door.raw.post("/v1/completions", json=body)).json()["choices"][0]
    ids = [token["id"] for token in whole["tokens"]]
    rest = (await door.raw.post("/v1/completions", json={**body, "resumed_token_ids": ids[:7]})).json()[
        "choices"
    ][0]
    assert [token["id"] for token in rest["tokens"]] == ids[7:]
    lost = await door.raw.post("/v1/completions", json={**body, "session_id": "nobody-knows-it"})
    assert lost.status_code == 404 and lost.json()["error"]["param"] == "session_id"


async def test_api_keys(folder: Path, tmp_path: Path) -> None:
    keys = [
        {"name": "one", "sha256": digest("first")},
        {"name": "two", "sha256": digest("second"), "models": ["other"]},
    ]
    file = tmp_path / "keys.yaml"
    file.write_text(json.dumps({"keys": keys}))
    spec = GatewaySpec(keys_file=str(file))
    async with (
        house(folder, gateway=spec) as h,
        http_port(make_app(h.requests, h.fleet, spec, h.metrics)) as url,
        httpx.AsyncClient(base_url=url, timeout=60) as raw,
    ):
        calls: list[tuple[str, str, dict[str, Any]]] = [
            ("POST", "/v1/completions", {"prompt": "a"}),
            ("POST", "/v1/chat/completions", {"messages": HELLO}),
            ("POST", "/v1/embeddings", {"input": "a"}),
            ("GET", "/v1/models/tiny", {}),
        ]
        for verb, path, body in [*calls, ("GET", "/v1/models", {}), ("GET", "/v1/fathom/stats", {})]:
            for headers in ({}, {"authorization": "Bearer wrong"}):
                refused = await raw.request(verb, path, json=body, headers=headers)
                assert refused.status_code == 401, path
                assert refused.json()["error"]["type"] == "authentication_error"
        for verb, path, body in calls:
            allowed = await raw.request(verb, path, json=body, headers={"authorization": "Bearer first"})
            denied = await raw.request(verb, path, json=body, headers={"authorization": "Bearer second"})
            assert (allowed.status_code, denied.status_code) == (200, 403), path
        seen = await raw.get("/v1/models", headers={"x-api-key": "second"})
        assert seen.json()["data"] == []
        assert (await raw.get("/")).status_code == (await raw.get("/healthz")).status_code == 200


async def test_a_model_that_is_not_there_yet_and_one_that_cannot_chat(tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "plain")
    async with (
        house(folder) as h,
        http_port(make_app(h.requests, h.fleet, GatewaySpec(), h.metrics)) as url,
        httpx.AsyncClient(base_url=url, timeout=60) as raw,
    ):
        body = {"messages": HELLO}
        chat = await raw.post("/v1/chat/completions", json=body)
        assert chat.status_code == 400 and "no chat template" in chat.json()["error"]["message"]
        h.fleet._expected = ("plain", "coming")
        loading = await raw.post("/v1/completions", json={"model": "coming", "prompt": "a"})
        assert loading.status_code == 503 and loading.headers["retry-after"] == "1"
        assert (await raw.get("/healthz")).status_code == 503
        listed = (await raw.get("/v1/models")).json()["data"]
        assert [model["id"] for model in listed] == ["plain"]
