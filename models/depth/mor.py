"""Mixture-of-Recursions (arXiv 2507.10524), in the format of the released code: config.json of a Llama, the
training YAML beside it as config.yaml, and every recursion's copy of the weights in the file. The same over any
other layers: models.depth.routed.

Expert choice: at each recursion a router picks the tokens that go on, from those that were picked before. In training
it takes the best of the whole sequence; decoding cannot look ahead, and goes by what the router was trained to say
with its auxiliary loss (or what an auxiliary router says): a token goes on if its logit is at least 0.
Token choice: one router, at the first recursion, says how many of them a token takes.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Any, Literal

import numpy as np
import pydantic
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from kernels.depth.rows_numba import (
    ALONE,
    AS_IT_IS,
    PLAIN,
    RESIDUAL,
    SIGMOID,
    TANH,
    WEIGHTED,
    routed_rows_numba,
)
from kernels.depth.step_numba import Ints
from kernels.pool import array_of, as_float32, inference, tensor_of
from models.batch import Batch
from models.decoder import Block, Decoder
from models.depth.base import checked
from models.depth.looped import Loop, LoopedDecoder, Skipped
from models.depth.lora import TokenDepths
from models.depth.per_depth import MixerPerDepth, PerDepth
from models.errors import ConfigError
from models.layers import Linear, Parted, RMSNorm
from models.mixers import llama


class Part(BaseModel):
    """A section of config.yaml. Keys that only matter to training are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Recursive(Part):
    num_recursion: int = Field(gt=0, le=64)
    sharing: Literal["cycle", "middle_cycle"]


class KvSharing(Part):
    enable: bool = False
    update_cache: bool = False
    num_recursion: int | None = None
    sharing: str | None = None


class Relaxation(Part):
    enable: Literal[False] = False


class Expert(Part):
    router_func: Annotated[
        Literal["sigmoid", "tanh"] | None, pydantic.BeforeValidator(lambda f: None if f == "none" else f)
    ] = "sigmoid"
    alpha: float = 0.1
    sampling: Literal["aux_loss", "aux_router"]
    gating: str | None = "weighted"  # `residual`, of our own: the weight is of what a recursion changes


class Token(Part):
    router_func: Literal["softmax", "sigmoid"] = "softmax"
    alpha: float | None = None
    balancing: Literal["loss", "loss_free"] | None = None
    gating: str | None = "weighted"

    @property
    def scale(self) -> float:
        return (1.0 if self.router_func == "softmax" else 0.1) if self.alpha is None else self.alpha


class Mor(Part):
    enable: Literal[True] = True
    type: Literal["expert", "token"]
    capacity: str | None = None
    router_type: Literal["linear", "mlp", "wide_mlp"] = "linear"
    temp: float = Field(1.0, gt=0)
    rand_router: Literal[False] = False
    expert: Expert | None = None
    token: Token | None = None

    @pydantic.model_validator(mode="after")
    def _described(self) -> "Mor":
        if getattr(self, self.type) is None:
            raise ValueError(f"type is {self.type}, but there is no section {self.type}")
        return self

    def capacities(self, recursions: int, skipped: Skipped) -> list[float]:
        """Share of the tokens that each recursion takes. Raises ValueError."""
        if self.capacity is None:
            return [(recursions - r) / recursions for r in range(recursions)]
        shares = [float(share) for share in self.capacity.split(",")]
        if len(shares) != recursions or not all(0 < share <= 1 for share in shares):
            raise ValueError(f"must be {recursions} shares above 0, at most 1")
        if self.type == "expert" and skipped != "absent" and shares[0] < 1:
            raise ValueError(f"must begin with 1 where skipped recursions are {skipped}, not absent")
        return shares

    def check(self, recursions: int, skipped: Skipped, file: object) -> None:
        """Raises ConfigError."""
        try:
            self.capacities(recursions, skipped)
        except ValueError as error:
            raise ConfigError(file, "mor.capacity", self.capacity, str(error)) from None


class Yaml(Part):
    recursive: Recursive
    kv_sharing: KvSharing = KvSharing()
    relaxation: Relaxation = Relaxation()
    mor: Mor

    @property
    def skipped(self) -> Skipped:
        if not self.kv_sharing.enable:
            return "absent"
        return "last_exited" if self.kv_sharing.update_cache else "shared"


class Routers(Parted):
    """A router with one logit for each recursion, or (`outputs` > 1) one with a logit for each of them."""

    def __init__(self, name: str, count: int, hidden: int, outputs: int, mlp: bool):
        super().__init__()
        self.name = name
        inner = 2 * hidden if mlp else hidden
        self.first = nn.Parameter(torch.empty(count, inner, hidden)) if mlp else None
        self.last = nn.Parameter(torch.empty(count, outputs, inner))

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        for i, last in enumerate(self.last):
            if self.first is None:
                yield f"{self.name}.{i}.weight", last
            else:
                yield f"{self.name}.{i}.0.weight", self.first[i]
                yield f"{self.name}.{i}.2.weight", last

    def forward(self, x: Tensor, which: Tensor) -> Tensor:
        """x [T, D], the router of each token [T] -> logits [T, outputs]."""
        if self.first is None:
            return torch.einsum("td,tod->to", x, self.last[which])
        out = x.new_empty(len(x), self.last.shape[1])
        for router in which.unique().tolist():
            at = which == router
            out[at] = torch.nn.functional.gelu(x[at] @ self.first[router].T) @ self.last[router].T
        return out


GATINGS = {"residual": RESIDUAL, "weighted": WEIGHTED}
FUNCTIONS = {"sigmoid": SIGMOID, "tanh": TANH, None: AS_IT_IS}
NO_DEPTHS = np.zeros(0, np.int64)


class MixtureOfRecursions(LoopedDecoder):
    """What both kinds have in common."""

    def __init__(self, base: dict[str, Any], loop: Loop, mor: Mor):
        """`base`: what a decoder of the unique layers is built with."""
        super().__init__(**base, loop=loop)
        self.mor = mor
        self.default_depth = "router"


class ExpertChoice(MixtureOfRecursions):
    """A row carries the logit of the router that picked it for its next recursion, and whether it was not picked."""

    def __init__(self, base: dict[str, Any], loop: Loop, mor: Mor):
        self.shares = mor.capacities(loop.depths, loop.skipped)
        # With less than all at the first, a token may do without any recursion, which is decided before it.
        super().__init__(base, replace(loop, entry=self.shares[0] < 1), mor)
        assert mor.expert is not None
        self.expert = mor.expert
        router = loop.depths, self.hidden_size, 1, mor.router_type != "linear"
        self.routers = Routers("routers", *router)
        self.aux_routers = Routers("aux_routers", *router) if self.expert.sampling == "aux_router" else None
        self.signals = {"router": self.hidden_size + 1}
        self._everybody = np.array([share >= 1 for share in self.shares], np.int64)
        self._routing: tuple[Any, ...] | None = None  # by linear routers: for decoding on a CPU

    @property
    def rest(self) -> int:
        return 2

    def begin(self, x: Tensor, batch: Batch | None) -> tuple[Tensor, Tensor]:
        return x, self._route(x, torch.zeros(len(x), dtype=torch.int64, device=x.device))

    def leave(self, before: Tensor, x: Tensor, rest: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        logit = rest[:, :1]
        weight = {"sigmoid": torch.sigmoid, "tanh": torch.tanh}.get(
            self.expert.router_func or "", lambda s: s
        )(logit)
        if self.expert.router_func is not None:
            weight = weight * self.expert.alpha
        if self.expert.gating == "residual":
            x = before + weight * (x - before)
        else:
            x = before + (weight * x if self.expert.gating == "weighted" else x)
        following = (batch.token_depths + 1).clamp_max(self.loop.depths - 1)
        return x, self._route(x, following)

    def prepare(self) -> None:
        super().prepare()
        last = self.routers.last
        linear = self.aux_routers is None and self.routers.first is None
        if linear and last.is_cpu and last.dtype is torch.float32:
            gating = GATINGS.get(self.expert.gating or "", PLAIN)
            function, alpha = FUNCTIONS[self.expert.router_func], np.float32(self.expert.alpha)
            routers = as_float32(last.detach()[:, 0])
            self._routing = function, alpha, gating, np.float32(self.mor.temp), routers, self._everybody

    def first_rows(self, x: Tensor, batch: Batch | None) -> Tensor:
        if self._routing is None or not inference(x) or self.row_width > self.hidden_size + self.rest:
            return super().first_rows(x, batch)
        function, alpha, _, *others = self._routing
        return self._rows(x, x, NO_DEPTHS, function, alpha, ALONE, *others)

    def next_rows(self, rows: Tensor, x: Tensor, batch: Batch, *kept: Tensor) -> Tensor:
        if self._routing is None or not inference(x) or kept:
            return super().next_rows(rows, x, batch, *kept)
        return self._rows(rows, x, array_of(batch.token_depths), *self._routing)

    def _rows(self, before: Tensor, x: Tensor, depths: Ints, *routing: Any) -> Tensor:
        """`leave`, or for ALONE `begin`, on a CPU in one call."""
        out = np.empty((len(x), self.hidden_size + self.rest), np.float32)
        routed_rows_numba(as_float32(before), as_float32(x), depths, *routing, out)
        return tensor_of(out)

    def _route(self, x: Tensor, recursion: Tensor) -> Tensor:
        """[T, 2]: the logit for the recursion that a token stands before, and 1 where it is not to enter it."""
        logit = self.routers(x / self.mor.temp, recursion)
        judge = logit if self.aux_routers is None else self.aux_routers(x, recursion)
        enters = (judge >= 0) | torch.tensor([s >= 1 for s in self.shares], device=x.device)[recursion][
            :, None
        ]
        return torch.cat([logit, (~enters).to(x.dtype)], -1)


class TokenChoice(MixtureOfRecursions):
    """A row carries H1 as the first recursion was given it, the router's probabilities, how many recursions it has
    taken, and whether these are all that it is to take."""

    def __init__(self, base: dict[str, Any], loop: Loop, mor: Mor):
        super().__init__(base, loop, mor)
        assert mor.token is not None
        self.token = mor.token
        count = loop.depths
        self.router = Routers("router", 1, self.hidden_size, count, mor.router_type != "linear")
        self.router_bias = nn.Parameter(torch.zeros(count)) if self.token.balancing == "loss_free" else None
        self.signals = {"router": self.hidden_size + self.rest - 1}

    @property
    def rest(self) -> int:
        return self.hidden_size + self.loop.depths + 3

    def begin(self, x: Tensor, batch: Batch | None) -> tuple[Tensor, Tensor]:
        logits = self.router(x / self.mor.temp, torch.zeros(len(x), dtype=torch.int64, device=x.device))
        chance = torch.sigmoid(logits) if self.token.router_func == "sigmoid" else logits.softmax(-1)
        chance = chance * self.token.scale
        biased = chance if self.router_bias is None else chance + self.router_bias
        chosen = biased.argmax(-1, keepdim=True).to(x.dtype) + 1
        taken = torch.zeros_like(chosen)
        return x, torch.cat([x, chance, chosen, taken, taken], -1)

    def leave(self, before: Tensor, x: Tensor, rest: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        chosen, taken = rest[:, -3:-2], rest[:, -2:-1] + 1
        return x, torch.cat([rest[:, :-2], taken, (taken >= chosen).to(x.dtype)], -1)

    def end(self, rows: Tensor) -> Tensor:
        x, rest = self.hidden(rows), self.beside(rows)
        start, chance, taken = rest[:, : self.hidden_size], rest[:, self.hidden_size : -3], rest[:, -2:-1]
        if self.token.gating != "weighted":
            return start + x
        return start + x * chance.gather(1, (taken.long() - 1).clamp_min(0))


KINDS: dict[str, type[ExpertChoice] | type[TokenChoice]] = {"expert": ExpertChoice, "token": TokenChoice}


def build(raw: dict[str, Any], file: object) -> tuple[llama.Config, Decoder]:
    c, y = read(raw, file)
    count, plain = y.recursive.num_recursion, 1 if y.recursive.sharing == "middle_cycle" else 0
    unique = 2 * plain + (c.num_hidden_layers - 2 * plain) // count
    base = {
        "embeddings": nn.Embedding(c.vocab_size, c.hidden_size),
        "layers": [llama.block(c) for _ in range(unique)],
        "norm": RMSNorm(c.hidden_size, c.rms_norm_eps),
        "lm_head": None if c.tie_word_embeddings else Linear(c.hidden_size, c.vocab_size, bias=False),
    }
    model = KINDS[y.mor.type](base, Loop(count, prelude=plain, coda=plain, skipped=y.skipped), y.mor)
    for i in model.stages[model.cores[0]].layers:
        model.layers[i] = _untied(c, count, model.token_depths)
    model.share_entries()
    return c, model


def _untied(c: llama.Config, count: int, token_depths: TokenDepths) -> Block:
    """A layer of the core, with a copy for each recursion."""
    copies = [llama.block(c) for _ in range(count)]
    mixer = MixerPerDepth([b.mixer for b in copies], token_depths)
    norms = (PerDepth([getattr(b, n) for b in copies], token_depths) for n in ("mixer_norm", "mlp_norm"))
    mixer_norm, mlp_norm = norms
    mlps = [b.mlp for b in copies if b.mlp is not None]
    return Block(mixer_norm, mixer, mlp_norm, PerDepth(mlps, token_depths))


def read(raw: dict[str, Any], file: object) -> tuple[llama.Config, Yaml]:
    """Both configurations, consistent with each other. Raises ConfigError."""
    c = llama.Config.read(raw, file)
    where = f"{file} (config.yaml beside it)"
    if not isinstance(raw.get("yaml"), dict):
        raise ConfigError(
            where, "config.yaml", None, "a Mixture-of-Recursions checkpoint needs its training configuration"
        )
    y = checked(Yaml, raw["yaml"], where)
    y.mor.check(y.recursive.num_recursion, y.skipped, where)
    n, plain = y.recursive.num_recursion, 2 if y.recursive.sharing == "middle_cycle" else 0
    if (c.num_hidden_layers - plain) % n or c.num_hidden_layers <= plain:
        limit = f"less {plain} plain layers, must be a multiple of recursive.num_recursion = {n}"
        raise ConfigError(file, "num_hidden_layers", c.num_hidden_layers, limit)
    for key in ("num_recursion", "sharing") if y.kv_sharing.enable else ():
        shared, own = getattr(y.kv_sharing, key), getattr(y.recursive, key)
        if shared not in (None, own):
            raise ConfigError(where, f"kv_sharing.{key}", shared, f"must be recursive.{key} = {own}")
    return c, y


def names(raw: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """Those of the layers by recursion, then those of a Llama."""
    c, y = read(raw, "config.json")
    n, expert = y.recursive.num_recursion, y.mor.type == "expert"
    plain = 1 if y.recursive.sharing == "middle_cycle" else 0
    base = (c.num_hidden_layers - 2 * plain) // n
    mapped = []
    for r in range(n):
        at = f"model.layers.{plain + r}.block." if expert else f"model.layers.{plain}.block_list.{r}."
        mapped += [(rf"^layers\.{plain + j}\.(\w+)\.copies\.{r}\.", rf"{at}{j}.\1.") for j in range(base)]
        mapped.append((rf"^routers\.{r}\.(\d\.)?", rf"model.layers.{plain + r}.mor_router.router.\1"))
        mapped.append((rf"^aux_routers\.{r}\.(\d\.)?", rf"model.layers.{plain + r}.mlp_router.router.\1"))
    if plain:
        last = plain + (n if expert else 1)
        mapped.append((rf"^layers\.{plain + base}\.", f"model.layers.{last}."))
    mapped.append((r"^router\.0\.(\d\.)?", rf"model.layers.{plain}.mor_router.router.\1"))
    mapped.append((r"^router_bias$", f"model.layers.{plain}.router_bias"))
    return (*mapped, *llama.NAMES)


NAMES = llama.NAMES
