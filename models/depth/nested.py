"""Nested models: the first n layers, then the shared norm and head, are a model of their own.

SortedNet (arXiv 2309.00255), Sorted LLaMA (arXiv 2309.08968), LayerSkip (arXiv 2404.16710).
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import nn

from models.decoder import Decoder, Stage
from models.layers import Linear
from models.paths import Node, Path


class NestedDecoder(Decoder):
    """A stack that is cut at its exits: one stage for the layers between two of them, and one for the head alone, so
    that tokens which leave at different exits meet there. The depth of a token is the number of its layers.

    `fills`: a token that leaves early gives the layers that it skips its hidden vector, for later tokens to see
    (state propagation, arXiv 2207.07061); otherwise it is absent there.
    """

    def __init__(
        self,
        embeddings: nn.Embedding,
        layers: Sequence[nn.Module],
        norm: nn.Module,
        lm_head: Linear | None,
        *,
        exits: Sequence[int],
        fills: bool = True,
        **options: Any,
    ):
        super().__init__(embeddings, layers, norm, lm_head, **options)
        bounds = [0, *(e for e in exits if e < len(layers)), len(layers)]
        self.exits = tuple(bounds[1:])
        segments = (Stage(f"layers to {b}", range(a, b)) for a, b in pairwise(bounds))
        self.stages = (*segments, Stage("head", range(0), head=True))
        self.chains = False
        self.fills = fills

    def path(self) -> Path:
        head = len(self.exits)
        nodes = [Node(i, units=layers, exit_to=head) for i, layers in enumerate(self.exits)]
        return Path((*nodes, Node(head)))
