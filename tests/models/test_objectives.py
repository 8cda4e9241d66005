"""What training descends."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from models.batch import Batch
from models.train.objectives import _best


@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=5), st.floats(0, 1), st.integers(0, 99), st.booleans()
)
def test_each_sequence_s_best_go_on(lengths: list[int], share: float, seed: int, equal: bool) -> None:
    """Of the candidates of a sequence as many as its share of all its tokens, one at least: those with the best
    scores."""
    generator = torch.Generator().manual_seed(seed)
    batch, total = Batch.of_sequences(lengths), sum(lengths)
    tokens = torch.arange(total)[torch.rand(total, generator=generator) < 0.7]
    scores = torch.zeros(len(tokens)) if equal else torch.randn(len(tokens), generator=generator)
    picked = _best(scores, tokens, batch, share)
    owner = torch.searchsorted(batch.offsets, tokens, right=True) - 1
    for number, length in enumerate(lengths):
        mine, taken = scores[owner == number], picked[owner == number]
        wanted = min(len(mine), max(1, int(torch.tensor(length) * share)))
        assert int(taken.sum()) == wanted
        assert torch.equal(mine[taken].sort().values, mine.sort().values[len(mine) - wanted :])
