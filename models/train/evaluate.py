"""Held-out bits per byte, and what general compressors need for the same files."""

import bz2
import gzip
import lzma
import math

import torch
from tokenizers import Tokenizer

from models.batch import Batch
from models.decoder import Decoder
from models.state import StatePool
from models.train.tokenizer import END_OF_TEXT

CHUNK = 2048


@torch.inference_mode()
def bits_per_byte(model: Decoder, tokenizer: Tokenizer, texts: tuple[str, ...]) -> float:
    """Of a model of constant state, at its full depth: each text from its first byte to its last in one go, the state
    carried from chunk to chunk. For others, and other depths, see `fathom bench quality`."""
    pool = StatePool(model.layout(), 1, model.device)
    boundary = tokenizer.token_to_id(END_OF_TEXT)
    bits = 0.0
    for text in texts:
        pool.reset(1)
        ids = torch.tensor([boundary, *tokenizer.encode(text).ids], device=model.device)
        for start in range(0, len(ids) - 1, CHUNK):
            chunk = ids[start : start + CHUNK]
            rows, batch = model.embed(chunk), _one(start, len(chunk), model.device)
            for node in model.path().nodes:
                rows = model.run(node.stage, rows, batch.at_depth(node.depth), pool.layers)
            targets = ids[start + 1 : start + 1 + len(chunk)]
            loss = torch.nn.functional.cross_entropy(
                model.logits(rows)[: len(targets)], targets, reduction="sum"
            )
            bits += loss.item() / math.log(2)
    return bits / sum(len(text.encode()) for text in texts)


def _one(start: int, length: int, device: torch.device) -> Batch:
    index = torch.tensor([1], device=device), torch.tensor([0], device=device)
    return Batch(
        *index, torch.tensor([0, length], device=device), torch.arange(start, start + length, device=device)
    )


def compressors(texts: tuple[str, ...]) -> dict[str, float]:
    """Bits per byte of each compressor at its strongest, all texts in one stream."""
    data = "".join(texts).encode()
    sizes = {
        "gzip": len(gzip.compress(data, 9)),
        "bz2": len(bz2.compress(data, 9)),
        "xz": len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)),
    }
    return {name: 8 * size / len(data) for name, size in sizes.items()}
