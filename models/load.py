"""From a checkpoint to a model that is ready to serve."""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from tokenizers import Tokenizer
from torch import nn

from models.checkpoint import Checkpoint
from models.config import ModelConfig, token_ids
from models.decoder import Decoder
from models.errors import ConfigError
from models.int8 import to_int8
from models.registry import build, names

log = logging.getLogger("fathom.models")

WEIGHTS = ("auto", "int8")
BLOCKS_SHARE = 1 / 8  # of the memory, for a second copy of the weights
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class LoadedModel:
    name: str
    model: Decoder
    config: ModelConfig
    family: str
    tokenizer: Tokenizer | None
    fingerprint: str
    chat: dict[str, str] = field(default_factory=dict)  # its chat template (see Checkpoint.chat)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return self.config.eos_token_ids


def load(
    path_or_name: str | Path,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    weights: str = "auto",
) -> LoadedModel:
    """Load a checkpoint folder, ``zoo/NAME`` or Hub id.

    `weights`: "auto" has them in the `dtype`, as they are; "int8" rounds those of projections to eight bits, on a
    CPU, and so changes what the model says a little.

    Raises ModelNotFoundError, ConfigError or CheckpointError (all ModelError), naming what is wrong.
    """
    place = pick_device(device)
    if weights not in WEIGHTS or (weights == "int8" and place.type != "cpu"):
        allowed = ", ".join(WEIGHTS) if place.type == "cpu" else f"auto on {place.type}"
        raise ConfigError("options", "weights", weights, f"must be {allowed}")
    checkpoint = Checkpoint(path_or_name)
    raw, file = checkpoint.read(), checkpoint.config_file
    config, model = build(raw, file)
    checkpoint.check(model, names(raw, file))  # before there is memory for what a configuration claims
    tokenizer = checkpoint.tokenizer()
    for doubt in doubts(config, model.vocab_size, tokenizer):
        log.warning("%s: %s", checkpoint.folder, doubt)
    model = model.to(pick_dtype(dtype, place)).to_empty(device=place)
    checkpoint.load_into(model, names(raw, file))
    model.requires_grad_(False).eval()
    if weights == "int8":
        to_int8(model)
    prepare(model)
    return LoadedModel(
        name=str(path_or_name),
        model=model,
        config=config,
        family=str(raw["model_type"]),
        tokenizer=tokenizer,
        fingerprint=checkpoint.fingerprint() + ("/int8" if weights == "int8" else ""),
        chat=checkpoint.chat(),
    )


def doubts(config: ModelConfig, vocab_size: int, tokenizer: Tokenizer | None) -> list[str]:
    """What is odd about a checkpoint, but no reason to refuse it. Published ones do name tokens that their vocabulary
    lacks. (The one for padding is never used here.)"""
    named = {"bos_token_id": token_ids(config.bos_token_id), "eos_token_id": token_ids(config.eos_token_id)}
    found = [
        f"{name} = {token}: the model's tokens end at {vocab_size - 1}, so this one never comes up"
        for name, tokens in named.items()
        for token in tokens
        if token >= vocab_size
    ]
    known = 0 if tokenizer is None else tokenizer.get_vocab_size()
    if known > vocab_size:
        found.append(
            f"tokenizer.json knows {known} tokens, the model {vocab_size}: a text with others is refused"
        )
    return found


def prepare(model: nn.Module) -> None:
    """Let every module that has a `prepare` compute what follows from its weights, which are final now. Before that,
    projections get a second copy in blocks, where there is room for one."""
    if sum(p.nbytes for p in model.parameters() if p.is_cpu) <= BLOCKS_SHARE * _memory():
        for module in model.modules():
            if hasattr(module, "to_blocks"):
                cast("Callable[[], None]", module.to_blocks)()
    for module in reversed(list(model.modules())):  # the parts before the whole
        if hasattr(module, "prepare"):
            cast("Callable[[], None]", module.prepare)()


def _memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def pick_device(device: str | torch.device) -> torch.device:
    if str(device) != "auto":
        return torch.device(device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pick_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """`auto`: bfloat16 on a GPU and on CPUs with AVX512-BF16 instructions, float32 elsewhere."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        native = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()
        return torch.bfloat16 if native else torch.float32
    if dtype not in DTYPES:
        raise ConfigError("options", "dtype", dtype, f"must be auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]
