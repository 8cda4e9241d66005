"""Softmax attention: grouped heads, rotary positions, full or over a sliding window. The mixer of
Llama-shaped transformers, and of the attention layers of hybrids."""

import torch
from torch import Tensor, nn

from kernels.attention import attention_paged, attention_ring
from kernels.attention.cache import append_each
from kernels.linear import Blocked, linear
from kernels.pool import inference
from models.batch import Batch
from models.decoder import Mixer
from models.layers import Linear, Packed, Rotary
from models.state import LayerLeaves, LayerState, Leaf, PagedLeaf, pool_of


class Attention(Mixer):
    """o = softmax(q k^T scale) v over all tokens so far, or over the last `window` of them.

    Full attention keeps an entry of keys and values for every token, in pages; a window keeps a ring of
    constant size.
    """

    def __init__(
        self,
        hidden: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        rotary: Rotary | None = None,
        window: int | None = None,
        qkv_bias: bool = False,
        out_bias: bool = False,
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
        norm_heads: bool = True,
        softcap: float | None = None,
        scale: float | None = None,
    ):
        """The norms are applied before the rotation: to each head, or (`norm_heads` False) to all of them as
        one."""
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.rotary, self.window, self.softcap = rotary, window, softcap
        self.scale = head_dim**-0.5 if scale is None else scale
        parts = {"q_proj": heads * head_dim, "k_proj": kv_heads * head_dim, "v_proj": kv_heads * head_dim}
        self.qkv = Packed(hidden, parts, bias=qkv_bias)
        self.o_proj = Linear(heads * head_dim, hidden, bias=out_bias)
        self.q_norm, self.k_norm, self.norm_heads = q_norm, k_norm, norm_heads
        self._bare = q_norm is None and k_norm is None and type(self).prepared is Attention.prepared
        self._kv_blocked: Blocked | None = None  # the last two parts of `qkv`, once they are wanted alone
        # All depths of a looped model read what the first one wrote (recursive KV sharing): up to a token's position,
        # or (`newest`), where tokens may never have come to the layer, up to what its pass before this one wrote.
        self.shared = self.newest = False

    def leaves(self) -> LayerLeaves:
        entry = (self.kv_heads, self.head_dim)
        if self.window is None:
            return {"k": PagedLeaf(entry), "v": PagedLeaf(entry), "count": Leaf((1,))}
        return {"k": Leaf((self.window, *entry)), "v": Leaf((self.window, *entry)), "count": Leaf((1,))}

    def forward(self, x: Tensor, batch: Batch, state: LayerState | None) -> Tensor:
        q, k, v = self.project(x, batch.positions)
        if not self.shared or not batch.depths.any():
            o = self.attend(q, k, v, batch, state)
        elif state is None:
            raise NotImplementedError("keys and values that depths share cannot be trained here")
        else:
            o = torch.empty_like(q)
            writers, at = batch.select(batch.depths == 0)
            o[at] = self.attend(q[at], k[at], v[at], writers, state)
            readers, at = batch.select(batch.depths > 0)
            o[at] = self.attend(q[at], None, None, readers, state)
        return self.o_proj(o.flatten(-2))

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, hidden] -> q [T, heads, head_dim], k and v [T, kv_heads, head_dim], normed and rotated."""
        (made,) = self.qkv(x, (sum(self.qkv.sizes),))
        queries = self.qkv.sizes[0] // self.head_dim  # and what lies beside them
        return self.by_head(made, positions, queries, self.kv_heads)

    def by_head(
        self, made: Tensor, positions: Tensor, heads: int, kv_heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v side by side, [T, (heads + 2 kv_heads) head_dim], which are overwritten -> as `project`."""
        rotary = self.rotary if self._bare and inference(made) else None
        if rotary is not None:
            rotary.rotate_(made, positions, heads + kv_heads, self.head_dim)
        q, k, v = made.unflatten(-1, (-1, self.head_dim)).split((heads, kv_heads, kv_heads), 1)
        return self.prepared(q, k, v, positions) if rotary is None else (q, k, v)

    def prepared(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v by head -> the same, normed and rotated."""
        q, k = self._normed(self.q_norm, q), self._normed(self.k_norm, k)
        if self.rotary is not None:
            q, k = self.rotary.both(q, k, positions)
        return q, k, v

    def attend(
        self, q: Tensor, k: Tensor | None, v: Tensor | None, batch: Batch, state: LayerState | None
    ) -> Tensor:
        """Append k and v, and read. Without them: read what is stored, up to each token's own position."""
        leaves, count = (pool_of(state, "k"), pool_of(state, "v")), pool_of(state, "count")
        entries = None if k is not None else self._readable(batch, count)
        scale, softcap = self.scale, self.softcap
        if self.window is not None:
            return attention_ring(
                q, k, v, *leaves, count, *batch.index,
                scale=scale, softcap=softcap, window=self.window, entries=entries,
            )  # fmt: skip
        return attention_paged(
            q, k, v, *leaves, pool_of(state, "tables"), count, *batch.index,
            scale=scale, softcap=softcap, entries=entries,
        )  # fmt: skip

    def _readable(self, batch: Batch, count: Tensor | None) -> Tensor:
        """The last stored entry that each token sees."""
        if not self.newest:
            return batch.positions
        assert count is not None
        tokens, lengths = len(batch.positions), batch.offsets.diff()
        ends = count[batch.slots, batch.depths, 0].long() - batch.offsets[1:]
        each = ends.repeat_interleave(lengths, output_size=tokens)
        return (each + torch.arange(tokens, device=each.device)).clamp_min(0)

    def _normed(self, norm: nn.Module | None, x: Tensor) -> Tensor:
        if norm is None:
            return x
        return norm(x) if self.norm_heads else norm(x.flatten(-2)).view(x.shape)

    def write(self, x: Tensor, batch: Batch, state: LayerState | None) -> None:
        if state is None or self.window is not None or batch.segments != len(x):
            self(x, batch, state)
            return
        k, v = self._entries(x, batch.positions)
        append_each(k, v, state["k"], state["v"], state["tables"], state["count"], batch.slots, batch.depths)

    def write_flops(self) -> int:
        weight = self.qkv.weight
        if self.window is not None:
            return super().write_flops()
        return 2 * (weight.shape[0] - (0 if self._whole else self.qkv.sizes[0])) * weight.shape[1]

    @property
    def _whole(self) -> bool:
        """Whether entries come from all of `project`: with a way of its own, or weights that are not there in parts."""
        own = type(self).project is not Attention.project or type(self).prepared is not Attention.prepared
        eight = self.qkv.blocked is not None and self.qkv.blocked.eight
        return own or eight or bool(self.qkv._forward_hooks)

    def _kv(self, x: Tensor) -> Tensor:
        """The last two parts of `qkv`, side by side."""
        first = self.qkv.sizes[0]  # of queries, and of what lies beside them
        weight, bias = self.qkv.weight[first:], None if self.qkv.bias is None else self.qkv.bias[first:]
        if self.qkv.blocked is None or not self.qkv.blocked.takes(x):
            return linear(x, weight, bias)
        if self._kv_blocked is None:
            self._kv_blocked = Blocked(weight, None, bias)
        return self._kv_blocked(x)

    def _entries(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """k and v of `project`, without q where no kind of attention has a way of its own."""
        if self._whole:
            return self.project(x, positions)[1:]
        y = self._kv(x).unflatten(-1, (-1, self.head_dim))
        k, v = y.chunk(2, -2)
        if self.rotary is not None and self._bare and inference(x):
            self.rotary.rotate_(y.flatten(1), positions, self.kv_heads, self.head_dim)
            return k, v
        k = self._normed(self.k_norm, k)
        return (k if self.rotary is None else self.rotary(k, positions)), v

    def flops(self) -> int:
        """Reading one entry; how many there are is not known here."""
        return 4 * self.heads * self.head_dim
