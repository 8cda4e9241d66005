"""A decoder-only language model as the engine sees it: stages, rows, states, logits.

A *stage* is a run of layers with one set of weights for every token passing through. A *row* is the vector
that a token carries between stages, [row_width]: its hidden vector, and whatever else the next stage needs of
it. A plain stack is one stage; looped, nested and chained models have several (models.depth).
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from kernels.depth import confidence, confidence_of
from kernels.linear import Blocked, few_rows, linear
from kernels.pool import Floats, array_of, as_float32, inference, tensor_of
from models.batch import Batch
from models.layers import GatedMLP, Linear, Parted
from models.paths import Node, Path
from models.state import LayerLeaves, LayerState, Layout

AT_ONCE = 1 << 21
"""Logits that are there at a time where only the confidence of their rows is wanted."""


Residual = Callable[[Floats, Batch, LayerState], Floats]
"""x [T, D] -> x + what a part of a layer makes of it, [T, D]; the state is advanced in place. On a CPU, and in arrays:
between weights that fill the caches, each of torch's operators costs a small layer some percent of its time."""


class Mixer(nn.Module):
    """What mixes tokens along a sequence: projections around one kernel."""

    def leaves(self) -> LayerLeaves:
        """The state that one sequence keeps."""
        raise NotImplementedError

    def forward(self, x: Tensor, batch: Batch, state: LayerState | None) -> Tensor:
        """Packed x [T, D] -> [T, D]; the state is advanced in place. Without one: from zero,
        differentiable."""
        raise NotImplementedError

    def write(self, x: Tensor, batch: Batch, state: LayerState | None) -> None:
        """Advance the state alone, as `forward` would."""
        self(x, batch, state)

    def with_norm(self, norm: nn.Module) -> "Residual | None":
        """x + mixer(norm(x)) on a CPU in one call, where the mixer has one for this norm and its weights are final."""
        return None

    def flops(self) -> int:
        """Floating-point operations of one token beside those of the projections."""
        raise NotImplementedError

    def write_flops(self) -> int:
        """All operations of `write`, of one token."""
        return 2 * _weights_of_a_token(self) + self.flops()


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)); the second half may be absent, or a mixer itself."""

    def __init__(
        self,
        mixer_norm: nn.Module,
        mixer: Mixer,
        mlp_norm: nn.Module | None = None,
        mlp: nn.Module | None = None,
        *,
        pre_norm: nn.Module | None = None,
    ):
        """`pre_norm` is applied to what comes in, residual included."""
        super().__init__()
        self.pre_norm = pre_norm
        self.mixer_norm = mixer_norm
        self.mixer = mixer
        self.mlp_norm = mlp_norm
        self.mlp = mlp
        self._mixed: Residual | None = None  # the halves, each in one call
        self._fed: Callable[[Floats], Floats] | None = None

    def prepare(self) -> None:
        self._mixed = self.mixer.with_norm(self.mixer_norm)
        if isinstance(self.mlp, GatedMLP):
            self._fed = self.mlp.with_norm(self.mlp_norm)

    @property
    def mixers(self) -> list[Mixer]:
        return [self.mixer, self.mlp] if isinstance(self.mlp, Mixer) else [self.mixer]

    def leaves(self) -> LayerLeaves:
        return {name: leaf for mixer in self.mixers for name, leaf in mixer.leaves().items()}

    def flops(self) -> int:
        return sum(mixer.flops() for mixer in self.mixers)

    def forward(self, x: Tensor, batch: Batch, state: LayerState | None) -> Tensor:
        if self.pre_norm is not None:
            x = self.pre_norm(x)
        few = few_rows(x)
        if self._mixed is not None and state is not None and few:
            x = tensor_of(self._mixed(as_float32(x), batch, state))
        else:
            x = x + self.mixer(self.mixer_norm(x), batch, state)
        if self._fed is not None and few:
            return tensor_of(self._fed(as_float32(x)))
        if self.mlp is not None and self.mlp_norm is not None:
            h = self.mlp_norm(x)
            x = x + (self.mlp(h, batch, state) if isinstance(self.mlp, Mixer) else self.mlp(h))
        return x

    @property
    def in_halves(self) -> bool:
        """Whether `forward` of the few rows of a CPU is `step`, in a batch that is `whole`."""
        return type(self).forward is Block.forward and self._has_both

    @property
    def _has_both(self) -> bool:
        both = self._mixed is not None and (self._fed is not None or self.mlp is None)
        return both and self.pre_norm is None and not self._forward_hooks

    def step(self, x: Floats, batch: Batch, state: LayerState) -> Floats:
        """x [T, D] -> [T, D], where it is `in_halves`."""
        assert self._mixed is not None
        x = self._mixed(x, batch, state)
        return x if self._fed is None else self._fed(x)

    def fill_flops(self) -> int:
        """Operations of `fill`, of one token."""
        if isinstance(self.mlp, Mixer):
            return 2 * _weights_of_a_token(self) + self.flops()
        updates = getattr(self, "loras", None)  # by depth, of the mixer's projections among others
        mixers = [] if updates is None else [m for name, m in updates.items() if name.startswith("mixer_")]
        return self.mixer.write_flops() + sum(2 * _weights_of_a_token(m) for m in mixers)

    def fill(self, x: Tensor, batch: Batch, state: LayerState | None) -> None:
        """Write the state of tokens that skip the layer and would have come to it as x [T, D]."""
        if isinstance(self.mlp, Mixer):
            self(x, batch, state)
            return
        if self.pre_norm is not None:
            x = self.pre_norm(x)
        if self._mixed is not None and state is not None and few_rows(x):
            self._mixed(as_float32(x), batch, state)
        else:
            self.mixer.write(self.mixer_norm(x), batch, state)


@dataclass(frozen=True, slots=True)
class Stage:
    name: str
    layers: range
    head: bool = False  # ends with the final norm and the head


class Decoder(nn.Module):
    """Embedding, a stack of layers in one stage, a final norm and a head."""

    def __init__(
        self,
        embeddings: nn.Embedding,
        layers: Sequence[nn.Module],
        norm: nn.Module,
        lm_head: Linear | None,
        *,
        embedding_scale: float = 1.0,
        logit_softcap: float | None = None,
        residual_in_fp32: bool = False,
    ):
        """Without an `lm_head` of its own the model is tied: the embedding serves as one. Embeddings are
        multiplied by their scale; logits x become c tanh(x / c) for a softcap c; with `residual_in_fp32`, a
        model in lower precision adds its blocks to float32, and rows are float32 between stages too."""
        super().__init__()
        self.embeddings = embeddings
        self.vocab_size, self.hidden_size = embeddings.num_embeddings, embeddings.embedding_dim
        self.layers = nn.ModuleList(layers)
        self.norm = norm
        self.lm_head = lm_head
        self.embedding_scale = embedding_scale
        self.logit_softcap = logit_softcap
        self.residual_in_fp32 = residual_in_fp32
        self.tied_head: Blocked | None = None  # the embeddings as a head
        single = (Stage(f"layer {i}", range(i, i + 1)) for i in range(len(layers)))
        self.stages: tuple[Stage, ...] = (
            Stage("stack", range(len(layers)), head=True),
            *single,  # for chains
            Stage("head", range(0), head=True),
        )
        self.chains = True  # a request may give the layers to run
        self.widths: tuple[float, ...] = (1.0,)  # shares of heads and hidden units that a request may use
        self.default_depth = "full"  # policy of a request that does not give one
        self.signals: dict[
            str, int
        ] = {}  # exit signals of its own (router, gate): the column of a row that holds them
        # The final stage, where intermediate predictions go through its layers: tokens must come to it one by one then.
        self.predicts_through: int | None = None
        self.draws = False  # at random, from the seed of the sequence
        self.fills = False  # tokens that leave early write what they skip (see Batch.ghosts)
        self._blocks: list[Block] = []  # `blocks`, once their weights are final
        self._flops: dict[int, float] = {}  # by stage
        self._growing: list[set[int]] = []  # by stage: groups of layers whose state grows

    def prepare(self) -> None:
        self._blocks = self.blocks

    def to_blocks(self) -> None:
        weight = self.embeddings.weight
        if (
            self.tied_head is None
            and self.lm_head is None
            and weight.is_cpu
            and weight.dtype is torch.float32
        ):
            self.tied_head = Blocked(weight)

    @property
    def row_width(self) -> int:
        return self.hidden_size

    @property
    def row_dtype(self) -> torch.dtype:
        return torch.float32 if self.residual_in_fp32 else self.dtype

    @property
    def device(self) -> torch.device:
        return self.embeddings.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embeddings.weight.dtype

    @property
    def blocks(self) -> list[Block]:
        return cast("list[Block]", list(self.layers))

    def layout(self) -> Layout:
        return Layout.of([block.leaves() for block in self.blocks])

    def appends(self, stage: int, depths: Tensor) -> dict[int, Tensor]:
        """For each group of layers of a stage whose state grows: the instance at which each segment, at these
        depths [N], appends its tokens; -1 where it only reads."""
        if not self._growing:
            layout = self.layout()
            self._growing = [
                {layout.layers[i].group for i in s.layers if layout.layers[i].paged} for s in self.stages
            ]
        return dict.fromkeys(self._growing[stage], depths)

    def path(self) -> Path:
        """The way of a token that goes the whole depth, with the exits that it passes."""
        return Path((Node(0, units=1),))

    def chain(self, layers: Sequence[int]) -> Path:
        """The way of a token through these layers, in this order; each repeat of a layer has a state of its own.

        (Chain-of-Layers, arXiv 2507.07996.) Its depth is the number of layers that it has passed.
        """
        passed: Counter[int] = Counter()
        nodes = []
        for units, layer in enumerate(layers, 1):
            nodes.append(Node(1 + layer, occurrence=passed[layer], units=units))
            passed[layer] += 1
        return Path((*nodes, Node(1 + len(self.layers))))

    def embed(self, ids: Tensor) -> Tensor:
        """ids [T] -> rows [T, row_width], of the row_dtype."""
        weight = self.embeddings.weight
        if inference(weight) and weight.is_contiguous():  # numpy does it in a third of the time
            rows = tensor_of(as_float32(weight.detach()).take(array_of(ids), 0))
        else:
            rows = self.embeddings(ids)
        # The factor in the model's own precision, as the published code has it.
        if self.embedding_scale != 1:
            rows = rows * rows.new_tensor(self.embedding_scale)
        return rows.to(self.row_dtype)

    def run(self, stage: int, rows: Tensor, batch: Batch, states: Sequence[LayerState] | None) -> Tensor:
        """Rows [T, row_width] through one stage; states are advanced in place."""
        layers = self.stages[stage].layers
        if states is not None and batch.whole and few_rows(rows) and self._in_halves(layers):
            given = as_float32(rows)
            for i in layers:
                given = self._blocks[i].step(given, batch, states[i])
            return tensor_of(given)
        x = rows
        for i in layers:
            y = self.layers[i](x, batch, None if states is None else states[i])
            x = y if batch.ghosts is None else torch.where(batch.ghosts[:, None], x, y)
        return x

    def _in_halves(self, layers: range) -> bool:
        return bool(self._blocks and layers) and all(self._blocks[i].in_halves for i in layers)

    def fill(self, stage: int, rows: Tensor, batch: Batch, states: Sequence[LayerState]) -> None:
        """Write the state of tokens that skip a stage, one of each segment, which left with these rows."""
        for i in self.stages[stage].layers:
            self.blocks[i].fill(rows, batch, states[i])

    def signal(self, name: str, rows: Tensor, index: Tensor | None = None) -> Tensor:
        """One of its own exit signals, of some [R] of the rows [T, row_width] that are on their way, or of all: [R],
        float32."""
        column = self.signals[name]
        if index is not None and inference(rows):
            return tensor_of(array_of(rows)[:, column].take(array_of(index)))
        return rows[:, column].float() if index is None else rows[index, column].float()

    def intermediate(
        self, rows: Tensor, index: Tensor, batch: Batch, states: Sequence[LayerState] | None
    ) -> Tensor:
        """What the head would see of some [R] of the rows [T, row_width] that are on their way if they left now:
        [R, hidden_size], normed. Changes no state."""
        return self.normed(rows.index_select(0, index)[:, : self.hidden_size])

    def intermediate_logits(
        self, rows: Tensor, index: Tensor, batch: Batch, states: Sequence[LayerState] | None
    ) -> Tensor:
        """What they would predict: [R, vocab_size], float32."""
        return self.head(self.intermediate(rows, index, batch, states))

    def confidence(self, x: Tensor) -> Tensor:
        """How sure the head is of normed hidden vectors [R, D]: [R, 4] (see kernels.depth)."""
        if not x.is_cuda:
            return torch.cat(
                [confidence_of(self.head(rows)) for rows in x.split(max(1, AT_ONCE // self.vocab_size))]
            )
        head = self.embeddings if self.lm_head is None else self.lm_head
        bias = None if self.lm_head is None else self.lm_head.bias
        return cast("Tensor", confidence(x, head.weight, bias, self.logit_softcap))

    def logits(self, rows: Tensor) -> Tensor:
        """Rows [R, row_width] that have passed the last stage -> [R, vocab_size], float32."""
        return self.head(self.normed(rows))

    def normed(self, rows: Tensor) -> Tensor:
        """Rows [R, row_width] that have passed the last stage -> what the head sees of them, [R,
        hidden_size]."""
        return self.norm(rows)

    def head(self, x: Tensor) -> Tensor:
        """Normed hidden vectors [R, D] -> logits [R, vocab_size], float32."""
        if self.lm_head is None and self.tied_head is not None and self.tied_head.takes(x):
            logits = self.tied_head(x).float()
        elif self.lm_head is None:
            logits = linear(x, self.embeddings.weight, None).float()
        else:
            logits = self.lm_head(x).float()
        if self.logit_softcap is not None:
            logits = self.logit_softcap * torch.tanh(logits / self.logit_softcap)
        return logits

    def forward(self, ids: Tensor, batch: Batch) -> Tensor:
        """The whole depth, from an empty state: packed ids [T] -> logits [T, vocab_size]. For training."""
        rows = self.embed(ids)
        for node in self.path().nodes:
            rows = self.run(node.stage, rows, batch, None)
        return self.logits(rows)

    def parameter_count(self) -> int:
        """As a checkpoint has them: without the zeros in what is put together from several tensors."""
        everything = sum(p.numel() for p in self.parameters())
        joint = [m for m in self.modules() if isinstance(m, Parted)]
        owned = sum(p.numel() for m in joint for p in m.parameters(recurse=False))
        return everything - owned + sum(part.numel() for m in joint for _, part in m.parts())

    def flops(
        self, path: Path | None = None, units: float | None = None, reach: float | None = None
    ) -> float:
        """Floating-point operations of a token on a path (the model's own), as far as it goes, or to a depth between
        its ends. Multiply-adds count as two; the embedding lookup is free. Where tokens that leave early write what
        they skip, it does so down to the depth `reach`, if that is given."""
        path = path or self.path()
        at = path.full_depth if units is None else units
        outside, depths, spent = _spent(path, self._stage_flops)
        total = outside + float(np.interp(at, depths, spent))
        if self.fills and reach is not None and reach > at:
            _, depths, written = _spent(path, self._fill_flops)
            total += float(np.interp(reach, depths, written) - np.interp(at, depths, written))
        return total

    def _fill_flops(self, stage: int) -> float:
        return sum(self.blocks[i].fill_flops() for i in self.stages[stage].layers)

    def _stage_flops(self, stage: int) -> float:
        if stage not in self._flops:
            part = self.stages[stage]
            blocks = [self.blocks[i] for i in part.layers]
            layers = sum(2 * _weights_of_a_token(b) + b.flops() for b in blocks)
            self._flops[stage] = layers + (2 * self.vocab_size * self.hidden_size if part.head else 0)
        return self._flops[stage]


def _spent(path: Path, cost: Callable[[int], float]) -> tuple[float, list[float], list[float]]:
    """Of a path whose stages cost so much: what every token spends outside of its depths, the depths from 0 on, and
    what a token that leaves at each has spent on them."""
    outside, between, depths, spent = 0.0, 0.0, [0.0], [0.0]
    for node in path.nodes:
        here = cost(node.stage)
        if node.units:
            depths.append(float(node.units))
            spent.append(spent[-1] + between + here)
            between = 0.0
        elif len(depths) == 1:  # every token comes through here
            outside += here
        else:  # a part of the next depth; or, after the last one, of every token's way
            between += here
    return outside + between, depths, spent


def _weights_of_a_token(module: nn.Module) -> int:
    """Parameters that one token meets on its way through a module; of those that differ by depth, one depth's."""
    if hasattr(module, "parameters_of_one_depth"):
        return cast("int", module.parameters_of_one_depth)
    own = sum(p.numel() for p in module.parameters(recurse=False))
    return own + sum(_weights_of_a_token(child) for child in module.children())
