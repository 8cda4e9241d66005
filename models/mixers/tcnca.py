"""TCNCA (arXiv 2312.05605): a dilated temporal convolution network and attention within chunks, gated as in
Mega (arXiv 2209.10655)."""

from typing import Any

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.attention import attention_ring
from models.batch import Batch
from models.decoder import Decoder, Mixer
from models.generic import NAMES, GenericConfig, decoder
from models.layers import Linear, Packed, Rotary
from models.mixers.dilated import DilatedConv
from models.state import LayerLeaves, LayerState, Leaf, PagedLeaf, pool_of

__all__ = ["NAMES", "TCNCA", "Config", "build"]


class Config(GenericConfig):
    chunk_size: int = pydantic.Field(128, ge=2)
    kernel_size: int = pydantic.Field(3, ge=2, le=64)
    tcn_layers: int = pydantic.Field(4, ge=1, le=16)
    dilation: int = pydantic.Field(2, ge=1, le=16)  # layer i is dilated by its i-th power
    z_dim: int = pydantic.Field(64, gt=0)  # of queries and keys
    v_dim: int | None = pydantic.Field(None, gt=0)  # default 2 * hidden_size
    rope_theta: float = pydantic.Field(10000.0, gt=0)

    @pydantic.field_validator("z_dim")
    @classmethod
    def _even(cls, size: int) -> int:
        if size % 2:
            raise ValueError("must be even, for rotary positions")
        return size


class TCNCA(Mixer):
    """m = TCN(x); z = silu(W_z m); q, k = gamma z + beta; o = attention(q, k, silu(W_v x)) within the token's
    chunk; sigmoid(W_u m) * silu(W_h m + U (silu(W_r m) * o))."""

    def __init__(self, c: Config):
        super().__init__()
        D, self.z_dim, self.v_dim = c.hidden_size, c.z_dim, c.v_dim or 2 * c.hidden_size
        self.chunk = c.chunk_size
        dilations = [c.dilation**i for i in range(c.tcn_layers)]
        self.tcn_flops = 2 * c.tcn_layers * c.kernel_size * D
        self.tcn = nn.ModuleList(DilatedConv(D, c.kernel_size, d, silu=True) for d in dilations)
        self.v_proj = Linear(D, self.v_dim)
        parts = {"u_proj": D, "z_proj": c.z_dim, "r_proj": self.v_dim, "h_proj": D}
        self.m_proj = Packed(D, parts, bias=True)
        self.gamma, self.beta = (nn.Parameter(torch.empty(2, c.z_dim)) for _ in range(2))
        self.out_proj = Linear(self.v_dim, D, bias=False)
        self.rotary = Rotary(c.z_dim, c.rope_theta)

    def leaves(self) -> LayerLeaves:
        k, v = Leaf((self.chunk, 1, self.z_dim)), Leaf((self.chunk, 1, self.v_dim))
        leaves: dict[str, Leaf | PagedLeaf] = {"k": k, "v": v, "count": Leaf((1,))}
        for i, conv in enumerate(self.tcn):
            assert isinstance(conv, DilatedConv)
            leaves |= conv.leaves(f"tcn{i}")
        return leaves

    def forward(self, x: Tensor, batch: Batch, state: LayerState | None) -> Tensor:
        m = x
        for i, conv in enumerate(self.tcn):
            m = conv(m, batch, state, f"tcn{i}")
        u, z, r, h = self.m_proj(m)
        qk = torch.addcmul(self.beta, F.silu(z).unsqueeze(1), self.gamma)  # [T, 2, z_dim]
        q, k = self.rotary(qk, batch.positions).split(1, 1)
        o = self._attend(q, k, F.silu(self.v_proj(x)).unsqueeze(1), batch, state).squeeze(1)
        return torch.sigmoid(u) * F.silu(h + self.out_proj(F.silu(r) * o))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, batch: Batch, state: LayerState | None) -> Tensor:
        """Each token sees its chunk so far: positions from the last multiple of the chunk's size on.

        What ends the chunk that a segment goes on with reads its ring; then whole chunks need none, and what
        is left begins the ring anew.
        """
        starts, lengths = batch.positions[batch.offsets[:-1]], batch.offsets.diff()
        first = torch.minimum(lengths, self.chunk - starts % self.chunk)
        one_token = q.shape[0] == batch.segments
        if state is not None:
            self._begin(state, batch, starts % self.chunk == 0)
            if one_token or bool((first == lengths).all()):
                return self._read(q, k, v, batch, batch.offsets, state)
        last = torch.where(first < lengths, (starts + lengths - 1) % self.chunk + 1, 0)
        within = torch.arange(q.shape[0], device=q.device) - batch.offsets[:-1].repeat_interleave(lengths)
        is_first = within < first.repeat_interleave(lengths)
        is_last = within >= (lengths - last).repeat_interleave(lengths)
        o = v.new_empty(v.shape)
        for chosen, sizes in ((is_first, first), (is_last, last)):
            kept = sizes > 0
            if bool(kept.any()):
                at = chosen.nonzero().squeeze(1)
                piece = Batch(
                    batch.slots[kept], batch.depths[kept], _bounds(sizes[kept]), batch.positions[at]
                )
                if state is not None and sizes is last:
                    self._begin(state, piece, torch.ones_like(piece.slots, dtype=torch.bool))
                o[at] = self._read(q[at], k[at], v[at], piece, piece.offsets, state)
        middle = (~is_first & ~is_last).nonzero().squeeze(1)
        if len(middle):
            whole = torch.arange(0, len(middle) + 1, self.chunk, device=q.device)
            o[middle] = self._read(q[middle], k[middle], v[middle], batch, whole, None)
        return o

    def _begin(self, state: LayerState, batch: Batch, fresh: Tensor) -> None:
        """Forget the ring of the segments that begin a chunk."""
        count = state["count"]
        count[batch.slots, batch.depths] = count[batch.slots, batch.depths].masked_fill(fresh[:, None], 0.0)

    def _read(
        self, q: Tensor, k: Tensor, v: Tensor, batch: Batch, offsets: Tensor, state: LayerState | None
    ) -> Tensor:
        pools = pool_of(state, "k"), pool_of(state, "v"), pool_of(state, "count")
        return attention_ring(q, k, v, *pools, batch.slots, batch.depths, offsets, scale=self.z_dim**-0.5)

    def flops(self) -> int:
        """With the chunk half full, as it is on average."""
        return self.tcn_flops + self.chunk * (self.z_dim + self.v_dim)


def _bounds(sizes: Tensor) -> Tensor:
    return F.pad(sizes.cumsum(0), (1, 0))


def build(raw: dict[str, Any], file: object) -> tuple[Config, Decoder]:
    c = Config.read(raw, file)
    return c, decoder(c, lambda: TCNCA(c))
