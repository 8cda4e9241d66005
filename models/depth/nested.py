"""Nested models: the first n layers, then the shared norm and head, are a model of their own; so are the first heads
and the first hidden units of every layer.

SortedNet (arXiv 2309.00255), Sorted LLaMA (arXiv 2309.08968), LayerSkip (arXiv 2404.16710).
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.invariance import by_row
from kernels.linear import linear
from models.batch import Batch
from models.decoder import Block, Decoder, Stage
from models.layers import GatedMLP, Linear, Packed
from models.mixers.attention import Attention
from models.paths import Node, Path
from models.state import LayerState, Layout


class NestedDecoder(Decoder):
    """A stack that is cut at its exits: one stage for the layers between two of them, and one for the head alone, so
    that tokens which leave at different exits meet there. The depth of a token is the number of its layers.

    `fills`: a token that leaves early gives the layers that it skips its hidden vector, for later tokens to see
    (state propagation, arXiv 2207.07061); otherwise it is absent there. `widths`: the shares of the heads and hidden
    units that sub-models have, rising to 1; their layers have to be NestedBlocks.
    """

    def __init__(
        self,
        embeddings: nn.Embedding,
        layers: Sequence[nn.Module],
        norm: nn.Module,
        lm_head: Linear | None,
        *,
        exits: Sequence[int],
        fills: bool = True,
        widths: Sequence[float] = (),
        **options: Any,
    ):
        super().__init__(embeddings, layers, norm, lm_head, **options)
        bounds = [0, *(e for e in exits if e < len(layers)), len(layers)]
        self.exits = tuple(bounds[1:])
        segments = (Stage(f"layers to {b}", range(a, b)) for a, b in pairwise(bounds))
        self.stages = (*segments, Stage("head", range(0), head=True))
        self.chains = False
        self.fills = fills
        self.widths = tuple(widths) or (1.0,)

    def path(self) -> Path:
        head = len(self.exits)
        nodes = [Node(i, units=layers, exit_to=head) for i, layers in enumerate(self.exits)]
        return Path((*nodes, Node(head)))

    def layout(self) -> Layout:
        """Where tokens that left are absent, the layers behind an exit have seen fewer of them than those before it."""
        layout = super().layout()
        if self.fills:
            return layout
        of = {i: group for group, stage in enumerate(self.stages) for i in stage.layers}
        return Layout(tuple(replace(layer, group=of[i]) for i, layer in enumerate(layout.layers)))

    def flops(
        self, path: Path | None = None, units: float | None = None, reach: float | None = None
    ) -> float:
        """As every decoder; the layers of a sub-model cost its share of theirs."""
        everything, head = super().flops(path, units, reach), self._stage_flops(len(self.exits))
        return head + (1.0 if path is None else path.width) * (everything - head)


class NestedBlock(Block):
    """A layer whose tokens may each use the first heads and the first hidden units only.

    It multiplies by the first rows and columns of the weights, as they lie there; where widths meet in a batch, for the
    tokens of each by themselves, so that a token's numbers are what they are without the others.
    """

    mixer: Attention
    mlp: GatedMLP

    @property
    def in_halves(self) -> bool:
        return self._has_both

    def forward(self, x: Tensor, batch: Batch, state: LayerState | None) -> Tensor:
        if isinstance(batch.width, Tensor):
            return self._by_width(x, batch, batch.width, state)
        if batch.width == 1.0:
            return super().forward(x, batch, state)
        assert self.mlp_norm is not None
        x = x + self._narrow_attention(self.mixer_norm(x), batch.width, batch, state)
        return x + self._narrow_mlp(self.mlp_norm(x), batch.width)

    def _by_width(self, x: Tensor, batch: Batch, widths: Tensor, state: LayerState | None) -> Tensor:
        of_segments, out = widths[batch.offsets[:-1]], torch.empty_like(x)
        for width in of_segments.unique().tolist():
            part, tokens = batch.select(of_segments == width)
            out[tokens] = self(x[tokens], replace(part, width=width), state)
        return out

    def _narrow_attention(self, x: Tensor, width: float, batch: Batch, state: LayerState | None) -> Tensor:
        a = self.mixer
        heads, kv_heads = round(width * a.heads), round(width * a.kv_heads)
        sizes = [heads * a.head_dim, kv_heads * a.head_dim, kv_heads * a.head_dim]
        q, k, v = a.by_head(torch.cat(_narrow(a.qkv, x, sizes), 1), batch.positions, heads, kv_heads)
        # Entries have all heads: the kernel reads whole ones.
        q = F.pad(q, (0, 0, 0, a.heads - heads))
        k, v = (F.pad(y, (0, 0, 0, a.kv_heads - kv_heads)) for y in (k, v))
        o = a.attend(q, k, v, batch, state)[:, :heads].flatten(-2)
        return linear(o, a.o_proj.weight[:, : o.shape[1]], a.o_proj.bias)

    def _narrow_mlp(self, x: Tensor, width: float) -> Tensor:
        mlp = self.mlp
        inner = round(width * mlp.sizes[0])
        gate, up = _narrow(mlp.gate_up, x, [inner, inner])
        return linear(by_row(mlp.activation, gate) * up, mlp.down_proj.weight[:, :inner], mlp.down_proj.bias)


def _narrow(packed: Packed, x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """The first outputs of each of the projections."""
    out, at = [], 0
    for whole, size in zip(packed.sizes, sizes, strict=True):
        bias = None if packed.bias is None else packed.bias[at : at + size]
        out.append(linear(x, packed.weight[at : at + size], bias))
        at += whole
    return out
