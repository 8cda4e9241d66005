"""Tiny checkpoints with random weights, as files."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from models.checkpoint import save
from models.registry import family, names
from models.train.tokenizer import train_tokenizer

GLA: dict[str, Any] = {
    "model_type": "gla",
    "vocab_size": 300,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_heads": 3,
    "expand_k": 0.5,
    "expand_v": 1.0,
    "intermediate_size": 40,
    "hidden_act": "swish",
    "bos_token_id": 0,
    "eos_token_id": 0,
}

LOOPED: dict[str, Any] = {  # 1 layer, then 2 layers up to 3 times, then 1 layer; a gate says when to leave
    "model_type": "recursive",
    "base": {**GLA, "num_hidden_layers": 4},
    "sharing": "middle_cycle",
    "num_recursions": 3,
    "exit_gate": True,
}


def tokenizer(vocab_size: int = 300) -> Tokenizer:
    """Byte-level BPE: all bytes, and a few merges. Token 0 is end-of-text."""
    return train_tokenizer(("def f(x):\n    return x + 1  # naïve café 漢字 🎈\n" * 3,), vocab_size)


def checkpoint(
    folder: Path,
    config: dict[str, Any] | None = None,
    *,
    seed: int = 0,
    text: bool = True,
    scale: float = 1.5,
) -> Path:
    """A folder with random weights of a configuration, and with a tokenizer unless told otherwise."""
    config = config or GLA
    host = family(config, "test")
    _, model = host.build(config, "test")
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, scale / parameter.shape[-1] ** 0.5)
            else:
                parameter.normal_(1, 0.2)
    save(folder, model, names(config, "test"), config, torch.float32)
    if text:
        tokenizer(config.get("base", config)["vocab_size"]).save(str(folder / "tokenizer.json"))
    return folder
