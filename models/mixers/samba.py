"""Samba (arXiv 2406.07522): Mamba and sliding-window attention in turns, each followed by a gated MLP, in
flash-linear-attention's checkpoint format."""

from typing import Any, ClassVar

import pydantic

from models.config import Epsilon
from models.decoder import Decoder
from models.fla import FLAConfig, decoder
from models.mixers import mamba

__all__ = ["NAMES", "Config", "build"]

WINDOW = {"num_heads": 18, "num_kv_heads": 18, "qkv_bias": False, "window_size": 2048, "rope_theta": 10000.0}


class Config(FLAConfig):
    inert: ClassVar[frozenset[str]] = frozenset(
        {
            "hidden_act", "rescale_prenorm_residual", "residual_in_fp32", "time_step_floor",
            "time_step_init_scheme", "time_step_max", "time_step_min", "time_step_scale", "use_conv_bias",
        }
    )  # fmt: skip

    state_size: int = pydantic.Field(16, gt=0)
    expand: float = pydantic.Field(2, gt=0)
    conv_kernel: int = pydantic.Field(4, ge=1, le=16)
    time_step_rank: mamba.Rank = "auto"
    use_bias: bool = False
    norm_eps: Epsilon = 1e-5

    @pydantic.model_validator(mode="before")
    @classmethod
    def _alternate(cls, raw: Any) -> Any:
        """A configuration without `attn` has attention at every second layer."""
        if not isinstance(raw, dict) or "attn" in raw or not isinstance(raw.get("num_hidden_layers"), int):
            return raw
        return {**raw, "attn": {**WINDOW, "layers": tuple(range(1, raw["num_hidden_layers"], 2))}}

    @property
    def mlp_size(self) -> int:
        """`intermediate_size` is that of the Mamba layers in this format."""
        return -(-int(self.hidden_size * (self.hidden_ratio or 4) * 2 / 3) // 256) * 256

    def mamba(self) -> mamba.Config:
        names = "vocab_size hidden_size num_hidden_layers state_size expand intermediate_size conv_kernel"
        keys = (*names.split(), "time_step_rank", "use_bias")
        return mamba.Config(**{name: getattr(self, name) for name in keys})


def build(raw: dict[str, Any], file: object) -> tuple[Config, Decoder]:
    c = Config.read(raw, file)
    inner = c.mamba()
    return c, decoder(c, lambda i: mamba.Mamba(inner))


NAMES = ((r"^(embeddings|layers)\.", r"backbone.\1."), (r"^norm\.", "backbone.norm_f."))
