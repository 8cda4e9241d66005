"""What a run found, as it is written to JSON. docs/loadtest.md describes every field."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from loadtest.errors import LoadTestError
from loadtest.histogram import Distribution

SCHEMA: Literal["fathom.loadtest/1"] = "fathom.loadtest/1"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, protected_namespaces=())


class Requests(_Part):
    sent: int
    warmup: int  # of them, left out of every figure
    ok: int
    failed: int
    unfinished: int  # given up by the harness: interrupted, or --drain was over


class Steady(_Part):
    """When the load was fully on: from the end of warm-up and ramp-up (open loop: from the first request to
    end after them) until the last request was sent."""

    start_s: float
    end_s: float
    requests_per_s: float  # ended well in it
    output_tokens_per_s: float  # arrived in it


class Goodput(_Part):
    slos_ms: dict[str, float]
    met: dict[str, float]  # share of the requests that meets each
    share: float  # of the requests that meets all; failures meet none
    requests_per_s: float


class Group(_Part):
    """Some of the requests: those of one depth policy, or one turn of their sessions."""

    requests: int
    failed: int
    ttft_ms: Distribution
    tpot_ms: Distribution
    e2e_ms: Distribution
    mean_depth: float | None
    flops_saved: float | None
    cached_share: float | None  # of the prompts' tokens


class Lengths(_Part):
    input_mean: float | None
    input_max: int
    output_mean: float | None
    output_max: int
    short: int  # requests that ended well with fewer tokens than asked
    scale: float  # factor on a trace's lengths
    clipped: int  # requests cut to fit the model, beyond that factor


class Harness(_Part):
    """Whether the harness itself was the limit."""

    cpu_share: float  # of one core
    starved_share: float | None  # of the time: ready to run, but without a core
    loop_lag_ms: Distribution  # from when the event loop should have run to when it did
    send_delay_ms: Distribution  # from when a request should have been sent to when it was
    event_loop: str
    bottleneck: bool
    reasons: list[str]


class Timeline(_Part):
    """One value for each bucket, from the start of the run."""

    bucket_s: float
    offered: list[int]  # requests that should have been sent
    sent: list[int]
    ok: list[int]
    failed: list[int]
    output_tokens: list[int]
    in_flight: list[int]  # at the bucket's end
    ttft_p50_ms: list[float | None]  # of the requests sent in it
    ttft_p99_ms: list[float | None]


class Result(_Part):
    schema_: Literal["fathom.loadtest/1"] = Field(
        default=SCHEMA, validation_alias=AliasChoices("schema", "schema_"), serialization_alias="schema"
    )
    started_at: str  # ISO 8601, UTC
    interrupted: bool
    loop: Literal["open", "closed"]
    config: dict[str, dict[str, Any]]  # the flags, but for credentials
    model: dict[str, Any]
    duration_s: float
    requests: Requests
    failures: dict[str, int]  # by status
    failure_details: dict[str, str]  # of the first with each status
    offered_rate: float | None
    sent_rate: float | None
    achieved_rate: float | None
    output_tokens: int
    output_tokens_per_s: float | None
    input_tokens: int
    input_tokens_per_s: float | None
    ttft_ms: Distribution
    tpot_ms: Distribution
    itl_ms: Distribution
    message_gap_ms: Distribution
    e2e_ms: Distribution
    ttft_from_schedule_ms: Distribution | None
    e2e_from_schedule_ms: Distribution | None
    goodput: Goodput | None
    steady: Steady | None
    lengths: Lengths
    mean_depth: float | None
    flops_saved: float | None
    cached_share: float | None
    policies: dict[str, Group]
    turns: dict[str, Group]
    harness: Harness
    timeline: Timeline

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    def write(self, path: Path) -> None:
        path.write_text(self.model_dump_json(by_alias=True, indent=2) + "\n")

    @classmethod
    def read(cls, path: Path) -> Result:
        """Raises LoadTestError where the file is missing or is no result."""
        try:
            return cls.model_validate_json(path.read_text())
        except (OSError, UnicodeDecodeError) as error:
            raise LoadTestError(f"{path}: cannot be read: {error}") from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the file"
            raise LoadTestError(f"{path}: is no result of this harness: {where}: {first['msg']}") from None
