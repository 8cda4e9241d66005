"""What to serve: one YAML file, validated once, frozen."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from serving.errors import ServeConfigError

Port = Annotated[int, Field(ge=1, le=65535)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]


Kind = TypeVar("Kind", bound=BaseModel)


class Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Autoscaling(Strict):
    """How many replicas, by how full their slots are."""

    min_replicas: int = Field(
        1, ge=1, le=1024
    )  # not 0: nobody would see the request that should start the first
    max_replicas: int = Field(ge=1, le=1024)
    target_load: float = Field(0.8, gt=0, le=1)  # (running + waiting) / slots to aim at, over all replicas
    look_back_s: float = Field(30, ge=1, le=3600)  # that the load is averaged over
    upscale_delay_s: float = Field(10, ge=0, le=3600)  # too few replicas for so long before any are added
    downscale_delay_s: float = Field(300, ge=0, le=86400)  # too many for so long before any are taken away

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas = {self.min_replicas} is above max_replicas = {self.max_replicas}"
            )
        return self


class ModelSpec(Strict):
    """One model, and the replicas that serve it."""

    path: str  # checkpoint folder, zoo/NAME, or Hub id
    name: Name = ""  # on the wire; the last part of the path where not given
    replicas: int = Field(1, ge=1, le=1024)
    autoscaling: Autoscaling | None = None  # instead of a fixed number of replicas
    slots: int | None = Field(None, ge=1, le=1_000_000)  # sequences of one replica that run at a time
    state_memory_mb: float | None = Field(None, gt=0)  # or as many as this holds
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    weights: Literal["auto", "int8"] = "auto"  # int8: projections rounded to eight bits, on a CPU
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    prefill_tokens: int = Field(256, ge=1, le=1 << 20)  # prompt tokens of one tick
    max_tokens: int | None = Field(None, ge=2)  # of prompt and continuation together
    kv_tokens: int | None = Field(
        None, ge=16
    )  # of all sequences of a replica, where attention keeps every token
    prefix_cache_mb: float = Field(128, ge=0)  # states of prompts that may come again; 0: none are kept
    snapshot_tokens: int | None = Field(None, ge=0)
    """Tokens after which a sequence's state goes to its gateway, so that it goes on from there if this replica is lost;
    0: never, and all its tokens are computed again; null: 32 to 256, the smaller the state the sooner."""
    shed_wait_s: float | None = Field(0.5, gt=0)  # a request waits so long before depth is shed; null: never
    min_depth: int | None = Field(None, ge=1)  # down to here, for requests that say nothing; null: not theirs
    max_waiting: int = Field(256, ge=0)  # requests that one replica queues
    queue_target_s: float | None = Field(1, gt=0)
    """Where a request waits longer than this and the queue grows, the newest goes first; once it has been full for five
    times as long, it has twice as many places as there are slots. null: only a full queue changes its order."""
    batch_invariant: bool = True  # the same numbers in any batch, to the bit; slower prompts
    threads: int | None = Field(
        None, ge=1, le=1024
    )  # processor threads of one replica; all but one where not given
    cpus: float = Field(0.5, ge=0)  # that Ray sets aside for one replica
    gpus: float | None = Field(None, ge=0)  # likewise; one where the model runs on a GPU

    @model_validator(mode="before")
    @classmethod
    def _named(cls, raw: Any) -> Any:
        if isinstance(raw, str):
            raw = {"path": raw}
        if isinstance(raw, dict) and not raw.get("name") and isinstance(raw.get("path"), str):
            raw = {**raw, "name": Path(raw["path"].rstrip("/")).name}
        return raw

    @model_validator(mode="after")
    def _one_capacity(self) -> Self:
        if self.slots is not None and self.state_memory_mb is not None:
            raise ValueError("slots and state_memory_mb say the same thing: give one")
        return self


class TracingSpec(Strict):
    """OpenTelemetry's traces."""

    endpoint: str = Field(pattern=r"^https?://")  # of a collector that takes OTLP over gRPC
    sample: float = Field(1.0, ge=0, le=1)  # share of the requests, where their callers have not decided
    service_name: str = "fathom"


class LogSpec(Strict):
    """Structured logs of the gateways: one JSON object on a line."""

    file: str | None = None  # that may be rotated meanwhile; standard error where not given
    level: Literal["debug", "info", "warning", "error"] = "info"  # each request is told at "info"


class GatewaySpec(Strict):
    """The front door: translates between the wire and the engines."""

    replicas: int = Field(1, ge=1, le=1024)
    cpus: float = Field(0.25, ge=0)
    max_streams: int = Field(4096, ge=1)  # that one gateway carries at a time
    max_queued: int | None = Field(
        None, ge=1
    )  # that wait for one of those places; as many again where not given
    max_message_mb: float = Field(4, gt=0, le=1024)
    reader_patience_s: float = Field(30, gt=0)  # that a client may take to read one message
    default_timeout_s: float = Field(600, gt=0)
    max_timeout_s: float = Field(3600, gt=0)
    on_replica_loss: Literal["resume", "fail"] = (
        "resume"  # on another replica, with the same tokens; "fail": no request is ever run twice
    )
    keys_file: str | None = None  # who may use the server (see docs/operations.md); everybody where not given
    state_store: str = "~/.local/state/fathom"  # of sessions: a folder, or any fsspec URL
    session_ttl_s: float = Field(86400, gt=0)  # without use, by default
    max_sessions: int = Field(1000, ge=0)  # sessions and snapshots of one key
    resume_timeout_s: float = Field(30, ge=0)  # that a lost request waits for another replica
    tracing: TracingSpec | None = None
    logs: LogSpec | None = None


class ServeConfig(Strict):
    """The serving file."""

    models: tuple[ModelSpec, ...] = Field((ModelSpec(path="zoo/gla", name="gla"),), min_length=1)
    gateway: GatewaySpec = GatewaySpec()
    grpc_port: Port = 9000
    http_port: Port = 8000
    ingress: Literal["direct", "proxy", "haproxy"] = "direct"
    """The gateways' own ports; Ray Serve's proxies on every node, the default where there is a `ray_address`; or Ray
    Serve's HAProxy in front of the gateways."""
    ray_address: str | None = None  # of a running cluster; a local one is started where not given
    startup_timeout_s: float = Field(300, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _behind_proxies(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and raw.get("ray_address") is not None:
            return {"ingress": "proxy", **raw}  # nobody knows on which nodes the gateways will be
        return raw

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        names = [m.name for m in self.models]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise ValueError(f"models: the name {twice[0]!r} occurs twice")
        if self.grpc_port == self.http_port:
            raise ValueError(f"grpc_port and http_port are both {self.grpc_port}")
        return self

    @classmethod
    def read(cls, file: Path) -> Self:
        """Raises ServeConfigError naming the file, the key, its value and what it may be."""
        try:
            raw = yaml.safe_load(file.read_text("utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ServeConfigError(f"{file}: {error}") from None
        if raw is not None and not isinstance(raw, dict):
            raise ServeConfigError(f"{file}: must be a mapping of keys to values, got {type(raw).__name__}")
        return cls.parse(raw or {}, str(file))

    @classmethod
    def parse(cls, raw: dict[str, Any], source: str) -> Self:
        """As `read`, of values already at hand."""
        return validated(cls, raw, source)


def validated(kind: type[Kind], raw: Any, source: str) -> Kind:
    """Raises ServeConfigError naming the source, the key, its value and what it may be."""
    try:
        return kind.model_validate(raw)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "file"
        if first["type"] == "extra_forbidden":
            raise ServeConfigError(f"{source}: {key}: unknown key") from None
        value = "" if first["type"] == "missing" else f" = {first['input']!r}"
        raise ServeConfigError(f"{source}: {key}{value}: {first['msg']}") from None
