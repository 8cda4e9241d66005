"""Structured output: every text that the engine samples under a grammar is one of the grammar's."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving import LLM, SamplingParams
from serving.engine.params import Grammar
from serving.errors import FailedPreconditionError, InvalidArgumentError
from tests import tiny
from tests.engine.fake import assert_no_leak

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["red", "green"]}, "maxItems": 2},
    },
    "required": ["name", "count"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
ARITHMETIC = """
start: term ("+" term){1,3}
term: NUMBER | "(" start ")"
NUMBER: /[1-9][0-9]?/
"""


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    return LLM(tiny.checkpoint(tmp_path_factory.mktemp("models") / "tiny"), dtype="float32", slots=8)


def params(grammar: Grammar | None, **options: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 400, "temperature": 1.0, "grammar": grammar, **options})


@given(
    seed=st.integers(0, 2**32),
    pattern=st.sampled_from(["(yes|no)", r"\d{3}-[a-f]{2,4}", "a*b{1,9}", "[àé漢]{1,5}"]),
)
@settings(max_examples=12)
def test_texts_match_the_regex(llm: LLM, seed: int, pattern: str) -> None:
    done = llm.generate("def", params(Grammar("regex", pattern), seed=seed))[0]
    assert done.finish_reason == "length" or re.fullmatch(pattern, done.text), done.text
    assert_no_leak(llm.engine)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.5])
def test_texts_follow_the_schema(llm: LLM, temperature: float) -> None:
    chosen = params(Grammar("json_schema", json.dumps(SCHEMA)), n=4, seed=3, temperature=temperature)
    for done in llm.generate("def", chosen)[0].outputs:
        assert done.finish_reason == "stop"
        value = json.loads(done.text)
        assert (
            set(value) <= {"name", "count", "tags"} and len(value["name"]) <= 6 and 0 <= value["count"] <= 99
        )
        assert set(value.get("tags", [])) <= {"red", "green"}


def test_texts_follow_the_context_free_grammar(llm: LLM) -> None:
    done = llm.generate("1+1=", params(Grammar("lark", ARITHMETIC), n=6, seed=1))[0].outputs
    whole = [d.text for d in done if d.finish_reason == "stop"]
    assert whole and all(re.fullmatch(r"[0-9+()]+", text) and eval(text) > 0 for text in whole)


def test_what_runs_beside_a_grammar_is_as_without_it(llm: LLM) -> None:
    free = params(None, seed=9, max_tokens=20)
    alone = llm.generate("def f", free)[0]
    beside = llm.generate(["x", "def f"], [params(Grammar("regex", "[ab]{30}"), seed=1), free])
    assert beside[1].token_ids == alone.token_ids
    assert re.fullmatch("[ab]{30}", beside[0].text)


def test_bias_and_penalties_hold_within_a_grammar(llm: LLM) -> None:
    (b,) = llm.encode("b")
    chosen = params(Grammar("regex", "[ab]{8}"), temperature=0, logit_bias={b: 100.0})
    assert llm.generate("x", chosen)[0].text == "bbbbbbbb"


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        ("regex", "(", "not a usable regex"),
        ("json_schema", "{", "not valid JSON"),
        ("json_schema", "[]", "must be an object"),
        ("json_schema", '{"type": "objekt"}', "objekt"),
        ("lark", "start: missing", "missing"),
    ],
)
def test_a_grammar_with_a_fault_is_refused(llm: LLM, kind: str, text: str, words: str) -> None:
    with pytest.raises(InvalidArgumentError, match=words):
        llm.generate("x", params(Grammar(kind, text)))
    assert_no_leak(llm.engine)


def test_impossible_grammars_and_company() -> None:
    for bad, words in (
        (("yaml", "x"), "grammar.kind = 'yaml'"),
        (("regex", ""), "1 to 65536"),
        (("regex", "a" * 70_000), "70000"),
    ):
        with pytest.raises(InvalidArgumentError, match=words):
            Grammar(*bad)
    for name, value in (("min_tokens", 3), ("ignore_eos", True)):
        with pytest.raises(InvalidArgumentError, match=name):
            params(Grammar("regex", "a"), **{name: value})


def test_a_model_without_a_tokenizer_follows_none(tmp_path: Path) -> None:
    mute = LLM(tiny.checkpoint(tmp_path / "mute", text=False), dtype="float32", slots=2)
    with pytest.raises(FailedPreconditionError, match="no tokenizer"):
        mute.generate([[1, 2]], params(Grammar("regex", "a")))
