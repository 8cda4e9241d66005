"""Tokens that are drawn in compiled code on CPUs are those that torch would draw."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from serving.engine.draw import draw, draw_naive

ALMOST_ONE = 1 - 2.0**-53

ROWS = given(
    vocabulary=st.sampled_from([1, 3, 63, 64, 65, 1000]),
    spread=st.sampled_from([0.0, 1.0, 30.0, 1e4]),
    masked=st.sampled_from([0.0, 0.5, 0.99]),
    seed=st.integers(0, 999),
)


def rows_of(vocabulary: int, spread: float, masked: float, seed: int) -> torch.Tensor:
    """Logits [5, V], some of them -inf, never all of a row."""
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(5, vocabulary, generator=generator)
    hidden = torch.rand(5, vocabulary, generator=generator) < masked
    hidden[:, seed % vocabulary] = False
    return logits.masked_fill(hidden, float("-inf"))


@ROWS
def test_draws_what_torch_draws(vocabulary: int, spread: float, masked: float, seed: int) -> None:
    logits, random = rows_of(vocabulary, spread, masked, seed), np.random.default_rng(seed)
    temperature, uniforms = random.uniform(0.1, 3, 5).astype(np.float32), random.uniform(size=5)
    p = (logits / torch.from_numpy(temperature)[:, None]).softmax(-1).double().cumsum(-1).numpy()
    for row, (made, expected) in enumerate(
        zip(draw(logits, temperature, uniforms), draw_naive(logits, temperature, uniforms), strict=True)
    ):
        edge = np.abs(p[row] - uniforms[row]).min()
        assert made == expected or edge < 1e-5, f"row {row}: {made}, torch {expected}, {edge} from an edge"


@ROWS
def test_what_is_masked_is_never_drawn(vocabulary: int, spread: float, masked: float, seed: int) -> None:
    logits = rows_of(vocabulary, spread, masked, seed)
    for u in (0.0, 0.5, ALMOST_ONE):
        ids = draw(logits, np.ones(5, np.float32), np.full(5, u))
        assert (logits[torch.arange(5), torch.from_numpy(ids)] > float("-inf")).all()


@ROWS
def test_a_row_is_drawn_as_by_itself(vocabulary: int, spread: float, masked: float, seed: int) -> None:
    logits, random = rows_of(vocabulary, spread, masked, seed), np.random.default_rng(seed)
    temperature, uniforms = random.uniform(0.1, 3, 5).astype(np.float32), random.uniform(size=5)
    alone = [draw(logits[i : i + 1], temperature[i : i + 1], uniforms[i : i + 1])[0] for i in range(5)]
    assert alone == draw(logits, temperature, uniforms).tolist()
