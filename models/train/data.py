"""Batches of token ids from the corpus: the same for the same seed and step, whatever was done before."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from torch import Tensor

from models.train.tokenizer import END_OF_TEXT


def encode(texts: tuple[str, ...], tokenizer: Tokenizer) -> npt.NDArray[np.uint16]:
    """All documents one after the other, each behind an end-of-text token."""
    boundary = tokenizer.token_to_id(END_OF_TEXT)
    parts = [[boundary, *encoded.ids] for encoded in tokenizer.encode_batch(list(texts))]
    return np.concatenate([np.asarray(part, np.uint16) for part in parts])


def encoded(texts: tuple[str, ...], tokenizer: Tokenizer, cache: Path) -> npt.NDArray[np.uint16]:
    """`encode`, kept in a file between runs."""
    if not cache.exists():
        cache.parent.mkdir(parents=True, exist_ok=True)
        np.save(cache, encode(texts, tokenizer))
    return np.load(cache)


def crops(
    tokens: npt.NDArray[np.uint16], seed: int, step: int, count: int, length: int
) -> tuple[Tensor, Tensor]:
    """`count` random windows: inputs and targets, packed [count * length] each."""
    rng = np.random.Generator(np.random.PCG64([seed, step]))
    starts = rng.integers(0, len(tokens) - length - 1, count)
    windows = np.stack([tokens[s : s + length + 1] for s in starts]).astype(np.int64)
    return torch.from_numpy(windows[:, :-1].ravel()), torch.from_numpy(windows[:, 1:].ravel())
