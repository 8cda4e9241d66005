"""What tells that a token has gone deep enough.

Confidence (kernels.depth) looks at the prediction that the token would make now; convergence compares it, or the hidden
vector, with that of the pass before. (CALM arXiv 2207.07061; Huginn arXiv 2502.05171, section 6.1.)
"""

import torch
from torch import Tensor

LATENT = frozenset({"latent_diff", "cosine"})
ONE_PREDICTION = {"probability": 0, "margin": 1, "entropy": 2}
"""The columns of what `Decoder.confidence` gives."""
TWO_PREDICTIONS = frozenset({"kl", "entropy_diff", "minp_kl"})
MIN_P = 0.1


def latent(name: str, before: Tensor, after: Tensor) -> Tensor:
    """Hidden vectors [T, D] of two successive passes -> [T]: |x' - x| / |x'|, or 1 - cos(x', x)."""
    before, after = before.float(), after.float()
    if name == "cosine":
        return 1 - torch.nn.functional.cosine_similarity(after, before, dim=-1)
    return (after - before).norm(dim=-1) / after.norm(dim=-1).clamp_min(1e-12)


def entropy(logits: Tensor) -> Tensor:
    logp = logits.log_softmax(-1)
    return -(logp.exp() * logp).nan_to_num().sum(-1)


def change(name: str, before: Tensor, after: Tensor) -> Tensor:
    """Logits [T, V] of two successive passes -> [T], nats: the divergence of the old prediction from the new one, also
    with the unlikely tokens levelled out, or the difference of their entropies."""
    if name == "entropy_diff":
        return (entropy(after) - entropy(before)).abs()
    q, p = (_likely(x) if name == "minp_kl" else x.log_softmax(-1) for x in (before, after))
    return (q.exp() * (q - p)).nan_to_num().sum(-1)


def _likely(logits: Tensor) -> Tensor:
    """Log-probabilities [T, V] in which all tokens less than a tenth as likely as the likeliest one have 1 / V."""
    probabilities = logits.softmax(-1)
    unlikely = probabilities < MIN_P * probabilities.amax(-1, keepdim=True)
    levelled = probabilities.masked_fill(unlikely, 1 / logits.shape[-1])
    return (levelled / levelled.sum(-1, keepdim=True)).log()
