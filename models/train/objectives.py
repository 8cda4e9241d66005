"""What training descends, in nats per token."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from models.batch import Batch
from models.decoder import Decoder
from models.depth.looped import LoopedDecoder
from models.depth.mor import ExpertChoice
from models.depth.nested import NestedDecoder

HELPED = 0.05  # nats by which a deeper prediction must be better to have been worth it
AUXILIARY = 0.1  # weight of the routers' loss


def next_token(model: Decoder, ids: Tensor, targets: Tensor, batch: Batch, step: int) -> Tensor:
    """The whole model's own prediction."""
    return F.cross_entropy(model(ids, batch), targets)


def every_exit(model: Decoder, ids: Tensor, targets: Tensor, batch: Batch, step: int) -> Tensor:
    """The mean over all sub-models, of every depth and width (Sorted LLaMA, arXiv 2309.08968, eq. 1; SortedNet)."""
    assert isinstance(model, NestedDecoder)
    losses = []
    for width in model.widths:
        rows, narrowed = model.embed(ids), replace(batch, width=width)
        for stage in range(len(model.exits)):
            rows = model.run(stage, rows, narrowed, None)
            losses.append(F.cross_entropy(model.logits(rows), targets))
    return torch.stack(losses).mean()


def gated_loops(model: Decoder, ids: Tensor, targets: Tensor, batch: Batch, step: int) -> Tensor:
    """A looped model whose tokens leave by its gate.

    Every other step all tokens take all loops, and predict after each; the gate learns to tell after which loop no
    later one predicts better by more than HELPED. In the steps between, tokens really leave, at random but more likely
    where the gate says so, and the others go on without them: what decoding will be like.
    """
    assert isinstance(model, LoopedDecoder)
    return _all_loops(model, ids, targets, batch) if step % 2 else _leaving(model, ids, targets, batch, step)


def _all_loops(model: LoopedDecoder, ids: Tensor, targets: Tensor, batch: Batch) -> Tensor:
    core, coda = model.cores[0], model.cores.stop
    rows = _before_core(model, ids, batch)
    losses, still, gates = [], torch.ones(len(ids), device=ids.device), []
    for depth in range(model.loop.depths):
        rows = model.run(core, rows, batch.at_depth(depth), None)
        logits = model.logits(model.run(coda, rows, batch.at_depth(0), None))
        losses.append(F.cross_entropy(logits, targets, reduction="none"))
        left = model.signal("gate", rows)
        gates.append((1 - (1 - left) / still.clamp_min(1e-6)).clamp(1e-6, 1 - 1e-6))  # of this pass alone
        still = 1 - left
    each = torch.stack(losses)  # [depths, T]
    later = torch.stack([each[d + 1 :].amin(0) for d in range(len(each) - 1)]).detach()
    enough = (each[:-1].detach() <= later + HELPED).float()
    with torch.autocast(ids.device.type, enabled=False):
        learnt = F.binary_cross_entropy(torch.stack(gates[:-1]), enough)
    return each.mean() + 0.1 * learnt


def _leaving(model: LoopedDecoder, ids: Tensor, targets: Tensor, batch: Batch, step: int) -> Tensor:
    core, coda = model.cores[0], model.cores.stop
    rows = _before_core(model, ids, batch)
    random = torch.Generator(device="cpu").manual_seed(step)
    going = torch.arange(len(ids), device=ids.device)
    for depth in range(model.loop.depths):
        after = model.run(core, rows[going], _some(batch, going, depth), None)
        rows = rows.index_copy(0, going, after)
        chance = 0.5 * model.signal("gate", after).detach().cpu() + 0.5 / model.loop.depths
        stays = torch.rand(len(going), generator=random) >= chance
        going = going[stays.to(going.device)]
        if not len(going):
            break
    logits = model.logits(model.run(coda, rows, batch.at_depth(0), None))
    return F.cross_entropy(logits, targets)


def picked_tokens(model: Decoder, ids: Tensor, targets: Tensor, batch: Batch, step: int) -> Tensor:
    """Expert-choice Mixture-of-Recursions: each recursion takes the share of a sequence's tokens that its router likes
    best, of those that the one before took; an auxiliary loss teaches the router to tell them without seeing the rest
    (arXiv 2507.10524, section 2.2 and appendix)."""
    assert isinstance(model, ExpertChoice) and model.aux_routers is None
    core, logit = model.cores[0], model.hidden_size
    rows = _before_core(model, ids, batch)
    going = torch.arange(len(ids), device=ids.device)
    auxiliary = rows.new_zeros(())
    for depth, share in enumerate(model.shares):
        if share < 1:
            scores = rows[going, logit].float()
            picked = _best(scores.detach(), going, batch, share)
            auxiliary = auxiliary + F.binary_cross_entropy_with_logits(scores, picked.float())
            going = going[picked]
        after = model.run(core, rows[going], _some(batch, going, depth), None)
        rows = rows.index_copy(0, going, after)
    logits = model.logits(model.run(model.cores.stop, rows, batch.at_depth(0), None))
    return F.cross_entropy(logits, targets) + AUXILIARY * auxiliary


class Distilled:
    """Recursive uptraining: the student's own loss and its divergence from a teacher, half and half (arXiv 2410.20672,
    section 3.2)."""

    def __init__(self, teacher: Decoder):
        self.teacher = teacher

    def __call__(self, model: Decoder, ids: Tensor, targets: Tensor, batch: Batch, step: int) -> Tensor:
        with torch.no_grad():
            taught = self.teacher(ids, batch).log_softmax(-1)
        logits = model(ids, batch)
        divergence = F.kl_div(logits.log_softmax(-1), taught, reduction="batchmean", log_target=True)
        return 0.5 * F.cross_entropy(logits, targets) + 0.5 * divergence


def _before_core(model: LoopedDecoder, ids: Tensor, batch: Batch) -> Tensor:
    rows = model.embed(ids)
    for stage in range(model.cores[0]):
        rows = model.run(stage, rows, batch, None)
    return rows


def _some(batch: Batch, tokens: Tensor, depth: int) -> Batch:
    """The batch of some tokens, rising, at one depth. Sequences without any are left out."""
    segment = torch.searchsorted(batch.offsets, tokens, right=True) - 1
    present, lengths = segment.unique_consecutive(return_counts=True)
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    depths = batch.depths.new_full(present.shape, depth)
    return Batch(batch.slots[present], depths, offsets, batch.positions[tokens])


def _best(scores: Tensor, tokens: Tensor, batch: Batch, share: float) -> Tensor:
    """Whether each of the candidates [t] is among the best of its sequence, bool; `share` is of the whole sequence."""
    segment = torch.searchsorted(batch.offsets, tokens, right=True) - 1
    best = scores.argsort(descending=True, stable=True)
    order = best[segment[best].argsort(stable=True)]  # sequence by sequence, the best of each first
    first = torch.searchsorted(segment, segment)  # of its sequence, for every candidate
    rank = torch.arange(len(tokens), device=tokens.device) - first
    count = (share * batch.offsets.diff()).long().clamp_min(1)
    return torch.zeros_like(segment, dtype=torch.bool).scatter(0, order, rank < count[segment])
