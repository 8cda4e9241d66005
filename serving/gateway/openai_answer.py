"""The JSON that OpenAI's protocol answers with, and what ours adds to it."""

import base64
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from serving.engine.depth import ExitReason
from serving.engine.description import Description
from serving.engine.news import FinishReason, Output, Usage
from serving.gateway.openai_body import Work
from serving.gateway.requests import Piece

FINISH = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}  # other ends are errors
REASONS = {int(reason): reason.name.lower() for reason in ExitReason}


class Words:
    """Tokens as text, each by itself."""

    def __init__(self, tokenizer: Tokenizer | None):
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def __call__(self, token: int) -> str:
        """A part of a character is the replacement character."""
        text = self._known.get(token)
        if text is None:
            text = (
                "" if self._tokenizer is None else self._tokenizer.decode([token], skip_special_tokens=False)
            )
            self._known[token] = text
        return text


@dataclass(slots=True)
class Part:
    """Text of one choice with its tokens: a piece, or all pieces together."""

    index: int
    text: str = ""
    news: Output = field(default_factory=lambda: Output("", 0))
    lengths: list[int] = field(default_factory=list)  # characters that came with each token
    at: int = 0  # characters of the choice before it

    @classmethod
    def of(cls, piece: Piece, index: int) -> "Part":
        return cls(index, piece.text, piece.news, piece.lengths)

    def extend(self, later: "Part") -> None:
        self.text += later.text
        self.lengths += later.lengths
        reason = self.news.finish_reason  # of a choice that has ended, while its request has not
        self.news.extend(later.news)
        self.news.finish_reason = reason or later.news.finish_reason


class Answers:
    """The parts of one response."""

    def __init__(self, work: Work, model: str, request_id: str, tokenizer: Tokenizer | None):
        self._work = work
        self._words = Words(tokenizer)
        self._started: set[int] = set()
        self._at: dict[int, int] = {}  # characters of each choice so far
        kind = "chat.completion" if work.chat else "text_completion"
        prefix = "chatcmpl" if work.chat else "cmpl"
        self._head = {
            "id": f"{prefix}-{request_id}",
            "object": kind,
            "created": int(time.time()),
            "model": model,
        }
        self._chunk_head = {**self._head, "object": kind + ".chunk" if work.chat else kind}

    def whole(self, parts: Iterable[Part], usage: dict[str, Any]) -> dict[str, Any]:
        choices = []
        for part in parts:
            choice = self._choice(part)
            if self._work.chat:
                choice["message"] = {"role": "assistant", "content": part.text, "refusal": None}
            else:
                choice["text"] = part.text
            choices.append(choice)
        return {**self._head, "choices": choices, "usage": usage}

    def chunk(self, part: Part) -> dict[str, Any]:
        """One event of a stream."""
        part.at = self._at.get(part.index, 0)
        self._at[part.index] = part.at + len(part.text)
        choice = self._choice(part)
        if not self._work.chat:
            choice["text"] = part.text
        elif part.index in self._started:
            choice["delta"] = {"content": part.text}
        else:
            self._started.add(part.index)
            choice["delta"] = {"role": "assistant", "content": part.text}
        body = {**self._chunk_head, "choices": [choice]}
        if self._work.body.usage_at_end:
            body["usage"] = None
        return body

    def last(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The event that tells the usage."""
        return {**self._chunk_head, "choices": [], "usage": usage}

    def _choice(self, part: Part) -> dict[str, Any]:
        reason = part.news.finish_reason
        choice: dict[str, Any] = {
            "index": part.index,
            "logprobs": self._logprobs(part) if self._work.logprobs else None,
            "finish_reason": FINISH.get(reason) if reason is not None else None,
        }
        if self._work.body.return_tokens:
            choice["tokens"] = list(_tokens(part))
        return choice

    def _logprobs(self, part: Part) -> dict[str, Any]:
        out = part.news
        tops = out.top_logprobs or [{}] * len(out.ids)
        if self._work.chat:
            listed = zip(out.ids, out.logprobs, tops, strict=True)
            content = [
                {
                    **self._scored(token, logprob),
                    "top_logprobs": [self._scored(*pair) for pair in top.items()],
                }
                for token, logprob, top in listed
            ]
            return {"content": content, "refusal": None}
        offsets, at = [], part.at
        for length in part.lengths:
            offsets.append(at)
            at += length
        return {
            "tokens": [self._words(token) for token in out.ids],
            "token_logprobs": [_number(logprob) for logprob in out.logprobs],
            "top_logprobs": [self._alternatives(top) for top in tops] if out.top_logprobs else None,
            "text_offset": offsets,
        }

    def _alternatives(self, top: dict[int, float]) -> dict[str, float] | None:
        """Of tokens that look alike, the likeliest; it comes first."""
        found: dict[str, float] = {}
        for token, logprob in top.items():
            found.setdefault(self._words(token), logprob)
        return found or None

    def _scored(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._words(token)
        whole = "\N{REPLACEMENT CHARACTER}" not in text
        return {"token": text, "logprob": _number(logprob), "bytes": list(text.encode()) if whole else None}


def _tokens(part: Part) -> Iterable[dict[str, Any]]:
    """What ours adds: every token with the text that came with it, and its depth."""
    out, at = part.news, 0
    for number, token in enumerate(out.ids):
        text = part.text[at : at + part.lengths[number]]
        at += part.lengths[number]
        told: dict[str, Any] = {"id": token, "text": text}
        if out.depths:
            told |= {"depth": out.depths[number], "exit_reason": REASONS.get(out.exit_reasons[number], "")}
        if out.logprobs:
            told["logprob"] = _number(out.logprobs[number])
        yield told


def _number(value: float) -> float | None:
    """A prompt's first token has no log-probability."""
    return None if math.isnan(value) else value


def usage_from(usages: Sequence[Usage]) -> dict[str, Any]:
    """Of all prompts of a request together: sums, means weighted by tokens, and the longest times."""
    prompt, made = sum(u.prompt_tokens for u in usages), sum(u.completion_tokens for u in usages)
    misses = [u.cache_miss_reason for u in usages if u.cache_miss_reason]

    def mean(name: str) -> float:
        """Over the tokens generated; where there are none, over those that were read."""
        weights = [u.completion_tokens if made else u.prompt_tokens for u in usages]
        total = sum(weights)
        return (
            sum(getattr(u, name) * w for u, w in zip(usages, weights, strict=True)) / total if total else 0.0
        )

    return {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
        "prompt_tokens_details": {"cached_tokens": sum(u.cached_tokens for u in usages)},
        "cache_miss_reason": misses[0] if misses else None,
        "mean_depth": mean("mean_depth"),
        "flops_saved": mean("flops_saved"),
        **{
            name: max((getattr(u, name) for u in usages), default=0.0)
            for name in ("queue_s", "prefill_s", "decode_s")
        },
    }


def embedding_of(vector: Sequence[float], dimensions: int | None, encoding: str) -> list[float] | str:
    """Its first `dimensions` entries (Matryoshka), of unit length; as base64 it is little-endian float32."""
    cut = np.asarray(vector[:dimensions], np.float64)
    unit = cut / max(float(np.linalg.norm(cut)), 1e-12)
    return base64.b64encode(unit.astype("<f4").tobytes()).decode() if encoding == "base64" else unit.tolist()


def model_from(description: Description, created: int, replicas: int, slots: int) -> dict[str, Any]:
    told = (
        "family", "parameters", "dtype", "vocab_size", "layers", "max_depth", "depths", "depth_policies",
        "state_bytes_per_sequence", "state_bytes_per_token",
    )  # fmt: skip
    return {
        "id": description.name,
        "object": "model",
        "created": created,
        "owned_by": "fathom",
        "max_model_len": description.max_tokens,
        "replicas": replicas,
        "slots": slots,
        **{name: getattr(description, name) for name in told},
    }
