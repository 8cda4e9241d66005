"""What a run is made of, validated once. Every field is a flag of the command line: `max_tokens` is
--max-tokens."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from loadtest.errors import FlagError
from loadtest.slo import Slo, parse_slo

TransportName = Literal["fathom", "oip", "oip-unary", "openai"]
SyntheticName = Literal["azure-conv", "azure-code", "mooncake-conv"]


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


class Flags(BaseModel):
    """A group of flags."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    panel: ClassVar[str] = ""  # its heading in --help

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Self:
        """Validate. Raises FlagError naming the flag, its value and what it may be."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            limit = first["msg"].removeprefix("Input ").removeprefix("Value error, ")
            raise FlagError(flag(str(first["loc"][0])), first["input"], limit) from None

    def given(self) -> dict[str, Any]:
        """As written into the results: JSON types, without what was left at None."""
        return self.model_dump(mode="json", exclude_none=True)


class Server(Flags):
    panel: ClassVar[str] = "Server"

    target: str = Field("", description="HOST:PORT of the server. [required]")
    transport: TransportName = Field(
        "fathom",
        description="How to speak to it: fathom (fathom.v1), oip (Open Inference Protocol, streamed), "
        "oip-unary (its ModelInfer), openai (HTTP, /v1/completions).",
    )
    model: str = Field("", description="Which model. May be left out where one is served.")
    tls: bool = Field(False, description="Encrypt, and check the server's certificate.")
    ca_file: Path | None = Field(None, description="Certificates to trust instead of the system's.")
    cert_file: Path | None = Field(
        None, description="This client's certificate, where the server asks for one."
    )
    key_file: Path | None = Field(None, description="Its key.")
    api_key: str | None = Field(None, description="Sent as `authorization: Bearer KEY`.", exclude=True)
    header: tuple[str, ...] = Field(
        (), description="NAME=VALUE, sent with every request. Repeat.", exclude=True
    )
    connections: int = Field(4, ge=1, le=1024, description="To spread the streams over (gRPC).")
    timeout: float = Field(600.0, gt=0, description="Seconds until a request is given up.")
    wait: float = Field(0.0, ge=0, description="Seconds to wait for a server that is not up yet.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        host, colon, port = (
            self.target.removeprefix("http://").removeprefix("https://").rstrip("/").rpartition(":")
        )
        if not self.target:
            raise FlagError("--target", None, "is required: HOST:PORT")
        if not (colon and host and port.isdigit() and 0 < int(port) < 65536):
            raise FlagError("--target", self.target, "must be HOST:PORT, with a port from 1 to 65535")
        for name in self.header:
            if not name.partition("=")[1]:
                raise FlagError("--header", name, "must be NAME=VALUE")
        if (self.cert_file is None) != (self.key_file is None):
            raise FlagError("--cert-file", self.cert_file, "goes together with --key-file")
        for name in ("ca_file", "cert_file", "key_file"):
            file = getattr(self, name)
            if file and not self.secure:
                raise FlagError(flag(name), file, "needs --tls")
            if file and not file.is_file():
                raise FlagError(flag(name), file, "no such file")
        return self

    @property
    def secure(self) -> bool:
        return self.tls or self.target.startswith("https://")

    @property
    def host(self) -> str:
        return self._address().rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        return int(self._address().rpartition(":")[2])

    def _address(self) -> str:
        return self.target.removeprefix("http://").removeprefix("https://").rstrip("/")

    @property
    def metadata(self) -> list[tuple[str, str]]:
        pairs = [tuple(item.split("=", 1)) for item in self.header]
        if self.api_key:
            pairs.append(("authorization", f"Bearer {self.api_key}"))
        return [(name.strip().lower(), value.strip()) for name, value in pairs]


class Load(Flags):
    panel: ClassVar[str] = "Load"

    concurrency: int | None = Field(
        None, ge=1, description="Closed loop: users who each wait for their answer."
    )
    rate: float | None = Field(
        None, gt=0, description="Open loop: requests per second, whatever the server does."
    )
    requests: int | None = Field(None, ge=1, description="Stop after this many.")
    duration: float | None = Field(None, gt=0, description="Stop sending after this many seconds.")
    arrival: Literal["poisson", "gamma", "constant"] | None = Field(
        None, description="Gaps of the open loop: poisson (default), gamma (with --burstiness), constant."
    )
    burstiness: float | None = Field(
        None,
        gt=0,
        description="Shape of Gamma gaps: 1 is Poisson, less is burstier; CV = 1/sqrt(burstiness).",
    )
    ramp_from: float | None = Field(
        None, ge=0, description="Climb from this rate to --rate within --duration."
    )
    ramp_steps: int | None = Field(None, ge=1, description="In so many stairs, not as a line.")
    ramp_up: float = Field(0.0, ge=0, description="Seconds over which the users of a closed loop start.")
    warmup: float = Field(0.0, ge=0, description="Seconds at the start that no figure counts.")
    drain: float | None = Field(
        None, ge=0, description="Seconds to wait for answers after the last request was sent."
    )
    trace_speed: float | None = Field(None, gt=0, description="Replay a trace this many times as fast.")
    seed: int = Field(
        0, ge=0, description="The same seed draws the same times, lengths, prompts and policies."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.rate is not None and self.concurrency is not None:
            raise FlagError("--rate", self.rate, "cannot go with --concurrency: a loop is open or closed")
        for name in ("arrival", "burstiness", "ramp_from", "ramp_steps"):
            if getattr(self, name) is not None and self.concurrency is not None:
                raise FlagError(flag(name), getattr(self, name), "is for an open loop, not for --concurrency")
        if self.burstiness is not None and self.arrival not in (None, "gamma"):
            raise FlagError("--burstiness", self.burstiness, f"is for --arrival gamma, not {self.arrival}")
        if self.ramp_from is not None and (self.rate is None or self.duration is None):
            raise FlagError("--ramp-from", self.ramp_from, "needs --rate, where it ends, and --duration")
        if self.ramp_steps is not None and self.ramp_from is None:
            raise FlagError("--ramp-steps", self.ramp_steps, "needs --ramp-from")
        if self.ramp_from == 0 and self.ramp_steps == 1:
            raise FlagError("--ramp-steps", 1, "must be at least 2 to leave rate 0")
        if self.duration is not None and self.warmup >= self.duration:
            raise FlagError("--warmup", self.warmup, f"must be less than --duration {self.duration:g}")
        return self


class Work(Flags):
    panel: ClassVar[str] = "Requests"

    prompt: tuple[str, ...] = Field((), description="Prompt to send. Repeat for several, taken in turn.")
    prompt_file: Path | None = Field(None, description="Prompts, one a line (JSON strings or plain text).")
    input_tokens: int | None = Field(None, ge=1, description="Prompts of this many random tokens instead.")
    max_tokens: int | None = Field(
        None, ge=1, description="Tokens to generate. [default: 64, or as the trace has it]"
    )
    trace: Path | None = Field(None, description="Replay an Azure .csv or Mooncake .jsonl trace.")
    synthetic: SyntheticName | None = Field(
        None,
        description="Lengths and gaps drawn like a published trace's: azure-conv, azure-code, mooncake-conv.",
    )
    length_scale: str = Field(
        "auto", description="Factor on a trace's lengths; auto: so that they fit the model."
    )
    vocab_size: int | None = Field(None, ge=2, description="Of the model, where the server does not say.")
    shared_prefix: int = Field(0, ge=0, description="Tokens that all prompts of --input-tokens begin with.")
    turns: int = Field(1, ge=1, description="Requests of a session, each after the answer to the last.")
    think_time: float = Field(0.0, ge=0, description="Seconds between an answer and the next turn.")
    history: Literal["resend", "session"] = Field(
        "resend", description="Later turns resend what came before, or name the server's session (fathom)."
    )
    depth: tuple[str, ...] = Field(
        (), description="Depth policy POLICY[:WEIGHT], such as full:0.5. Repeat to mix."
    )
    min_depth: int | None = Field(None, ge=1, description="Floor of the depth under any policy.")
    max_depth: int | None = Field(None, ge=1, description="Ceiling of the depth under any policy.")
    ignore_eos: bool = Field(True, description="Generate --max-tokens, whatever the model says.")
    temperature: float | None = Field(None, ge=0, description="Of sampling. [default: the server's]")
    top_p: float | None = Field(None, gt=0, le=1, description="Of sampling.")
    top_k: int | None = Field(None, ge=0, description="Of sampling.")
    priority: int = Field(0, ge=-100, le=100, description="Larger goes first (fathom).")

    @model_validator(mode="after")
    def _check(self) -> Self:
        sources = [
            n for n in ("prompt", "prompt_file", "input_tokens", "trace", "synthetic") if getattr(self, n)
        ]
        if len(sources) > 1:
            raise FlagError(flag(sources[1]), getattr(self, sources[1]), f"cannot go with {flag(sources[0])}")
        if self.length_scale != "auto":
            try:
                valid = 0 < float(self.length_scale) < float("inf")
            except ValueError:
                valid = False
            if not valid:
                raise FlagError("--length-scale", self.length_scale, "must be auto or a number > 0")
        if self.shared_prefix and self.input_tokens is None:
            raise FlagError("--shared-prefix", self.shared_prefix, "needs --input-tokens")
        if self.shared_prefix and self.shared_prefix >= (self.input_tokens or 0):
            raise FlagError(
                "--shared-prefix", self.shared_prefix, f"must be less than --input-tokens {self.input_tokens}"
            )
        if self.min_depth and self.max_depth and self.min_depth > self.max_depth:
            raise FlagError("--min-depth", self.min_depth, f"must be at most --max-depth {self.max_depth}")
        return self


class Goals(Flags):
    panel: ClassVar[str] = "Objectives"

    slo: tuple[str, ...] = Field(
        (),
        description="METRIC=TIME that goodput must meet: ttft=200ms, tpot=20ms, e2e=2s. Repeat.",
    )

    @property
    def slos(self) -> tuple[Slo, ...]:
        return tuple(parse_slo(text) for text in self.slo)

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [slo.metric for slo in self.slos]
        for text, name in zip(self.slo, names, strict=True):
            if names.count(name) > 1:
                raise FlagError("--slo", text, f"{name} is given twice")
        return self


class Run(BaseModel):
    """One run, complete. Raises FlagError where the groups contradict each other."""

    model_config = ConfigDict(frozen=True)

    server: Server
    load: Load
    work: Work
    goals: Goals

    @model_validator(mode="after")
    def _check(self) -> Self:
        server, load, work = self.server, self.load, self.work
        if work.depth and server.transport != "fathom":
            raise FlagError("--depth", work.depth[0], f"needs --transport fathom, not {server.transport}")
        if work.history == "session" and server.transport != "fathom":
            raise FlagError("--history", work.history, f"needs --transport fathom, not {server.transport}")
        if load.trace_speed is not None and (
            work.trace is None or load.rate is not None or load.concurrency is not None
        ):
            raise FlagError(
                "--trace-speed", load.trace_speed, "needs --trace, and neither --rate nor --concurrency"
            )
        if work.trace is not None:
            for name in ("arrival", "burstiness", "ramp_from"):
                if getattr(load, name) is not None:
                    raise FlagError(
                        flag(name), getattr(load, name), "cannot go with --trace, which has its own times"
                    )
        if work.prompt_file and not work.prompt_file.is_file():
            raise FlagError("--prompt-file", work.prompt_file, "no such file")
        return self

    @property
    def open(self) -> bool:
        """Whether requests are sent by the clock rather than by their users."""
        return self.load.rate is not None or (self.work.trace is not None and self.load.concurrency is None)
