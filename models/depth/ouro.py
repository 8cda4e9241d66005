"""Ouro (arXiv 2510.25741), in the published checkpoint format: the whole stack is looped, with the final norm after
every loop and an exit gate that looks at what the norm gives."""

from typing import Any, Literal

import pydantic
from torch import Tensor, nn

from models.batch import Batch
from models.decoder import Block, Decoder
from models.depth.looped import Loop, LoopedDecoder, Skipped
from models.layers import Linear, RMSNorm
from models.mixers import llama
from models.state import LayerState


class Config(llama.Config):
    total_ut_steps: int = pydantic.Field(4, gt=0, le=256)
    early_exit_threshold: float = pydantic.Field(1.0, ge=0, le=1)
    early_exit_step: int | None = pydantic.Field(
        None, ge=0
    )  # counted from 0: the loop after which every token leaves
    use_sliding_window: Literal[False] = False
    skipped: Skipped = "last_exited"  # type: ignore[assignment]  # ours: the published code runs all loops always
    exits: tuple[()] = ()
    widths: tuple[()] = ()

    @pydantic.model_validator(mode="after")
    def _reachable(self) -> "Config":
        if self.early_exit_step is not None and self.early_exit_step >= self.total_ut_steps:
            raise ValueError(
                f"early_exit_step = {self.early_exit_step}: total_ut_steps is {self.total_ut_steps}"
            )
        return self

    @property
    def default_depth(self) -> str:
        if self.early_exit_step is not None:
            return f"fixed({self.early_exit_step + 1})"
        return "full" if self.early_exit_threshold == 1 else f"gate({self.early_exit_threshold})"


class SandwichBlock(Block):
    """A layer whose halves are normed before and after: x + norm2(mixer(norm(x))), then x + norm2(mlp(norm(x)))."""

    def __init__(self, block: Block, mixer_norm_2: nn.Module, mlp_norm_2: nn.Module):
        super().__init__(block.mixer_norm, block.mixer, block.mlp_norm, block.mlp)
        self.mixer_norm_2 = mixer_norm_2
        self.mlp_norm_2 = mlp_norm_2

    def forward(self, x: Tensor, batch: Batch, state: LayerState | None) -> Tensor:
        assert self.mlp is not None and self.mlp_norm is not None
        x = x + self.mixer_norm_2(self.mixer(self.mixer_norm(x), batch, state))
        return x + self.mlp_norm_2(self.mlp(self.mlp_norm(x)))


def build(raw: dict[str, Any], file: object) -> tuple[Config, Decoder]:
    c = Config.read(raw, file)

    def norm() -> RMSNorm:
        return RMSNorm(c.hidden_size, c.rms_norm_eps)

    model = LoopedDecoder(
        nn.Embedding(c.vocab_size, c.hidden_size),
        [SandwichBlock(llama.block(c), norm(), norm()) for _ in range(c.num_hidden_layers)],
        norm(),
        None if c.tie_word_embeddings else Linear(c.hidden_size, c.vocab_size, bias=False),
        Loop(depths=c.total_ut_steps, skipped=c.skipped, norm_each=True, gate=True),
    )
    model.default_depth = c.default_depth
    return c, model


NAMES = (
    (r"^early_exit_gate\.", "model.early_exit_gate."),
    (r"\.mixer_norm_2\.", ".input_layernorm_2."),
    (r"\.mlp_norm_2\.", ".post_attention_layernorm_2."),
    *llama.NAMES,
)
