"""A plain reference for models of adaptive depth: one sequence, one token, one layer at a time, with keys and values in
lists. It shares projections, norms and MLPs with the models under test, and nothing else."""

from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from models.batch import Batch
from models.decoder import Block, Decoder, Mixer
from models.depth.huginn import Huginn
from models.depth.huginn import SandwichBlock as HuginnBlock
from models.depth.looped import LoopedDecoder
from models.depth.noise import truncated_normal
from models.depth.ouro import SandwichBlock as OuroBlock
from models.mixers.attention import Attention
from models.mixers.olmo_hybrid import PostNormBlock
from models.mixers.qwen3_next import GatedAttention
from models.state import Layout, StatePool
from serving.engine.depth import AT_LEAST, DEFAULT_THRESHOLDS, DepthPolicy


@dataclass
class Plain:
    """Greedy decoding under a policy."""

    model: Decoder
    policy: DepthPolicy
    seed: int = 0
    streak: int = 0  # passes in a row that gave the same prediction
    entries: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    states: dict[tuple[int, int], StatePool] = field(default_factory=dict)
    seen: dict[str, list[float]] = field(default_factory=dict)  # every signal value that was looked at

    @torch.inference_mode()
    def generate(self, prompt: list[int], count: int) -> tuple[list[int], list[float], list[int]]:
        """Tokens, their log-probabilities, and the depth each prediction took."""
        ids, logprobs, depths = list(prompt), [], []
        for position in range(len(prompt) + count - 1):
            logits, depth = self.token(ids[position], position)
            if position >= len(prompt) - 1:
                ids.append(int(logits.argmax()))
                logprobs.append(float(logits.log_softmax(-1)[ids[-1]]))
                depths.append(depth)
        return ids[len(prompt) :], logprobs, depths

    def token(self, token: int, position: int) -> tuple[Tensor, int]:
        self.streak = 0
        if self.policy.kind == "chain":
            return self.chain(token, position)
        if isinstance(self.model, LoopedDecoder):
            return self.looped(token, position)
        return self.nested(token, position)

    # The three kinds.

    def chain(self, token: int, position: int) -> tuple[Tensor, int]:
        x = self.model.embed(torch.tensor([token]))
        passed: dict[int, int] = {}
        for layer in self.policy.layers:
            x = self.layer(layer, passed.get(layer, 0), x, position)
            passed[layer] = passed.get(layer, 0) + 1
        return self.model.logits(x)[0], len(self.policy.layers)

    def nested(self, token: int, position: int) -> tuple[Tensor, int]:
        x = self.model.embed(torch.tensor([token]))
        last = len(self.model.layers)
        exits = getattr(self.model, "exits", (last,))
        before = x
        for layer in range(last):
            x = self.layer(layer, 0, x, position)
            depth = layer + 1
            if depth not in exits:
                continue
            if self.leaves(depth, before, x, position):
                if self.model.fills:
                    for skipped in range(depth, self.reach(last)):
                        self.skip(skipped, 0, x, position)
                return self.model.logits(x)[0], depth
            before = x
        return self.model.logits(x)[0], last

    def looped(self, token: int, position: int) -> tuple[Tensor, int]:
        model = self.model
        assert isinstance(model, LoopedDecoder)
        loop = model.loop
        x = super(LoopedDecoder, model).embed(torch.tensor([token]))
        for layer in range(loop.prelude):
            x = self.layer(layer, 0, x, position)
        e = x
        if isinstance(model, Huginn):
            x = torch.zeros_like(e)
            if model.start_scale:
                start = truncated_normal(torch.tensor([self.seed]), torch.tensor([position]), e.shape[1])
                x = start * model.start_scale
        end = len(model.layers) - loop.coda
        core = list(range(loop.prelude, end))
        if loop.sequence:
            x, depth = self.in_sequence(core, x, position)
        else:
            x, depth = self.in_cycles(core, x, e, position)
        return self.predict(x, position), depth

    def in_sequence(self, core: list[int], x: Tensor, position: int) -> tuple[Tensor, int]:
        model = self.model
        assert isinstance(model, LoopedDecoder)
        for number, layer in enumerate(core, 1):
            for depth in range(model.loop.depths):
                before, x = x, self.layer(layer, depth, x, position)
            if self.leaves(number, before, x, position):
                if model.fills:
                    for skipped in core[number : self.reach(len(core))]:
                        for depth in range(model.loop.depths):
                            self.skip(skipped, depth, x, position)
                return x, number
        return x, len(core)

    def in_cycles(self, core: list[int], x: Tensor, e: Tensor, position: int) -> tuple[Tensor, int]:
        model = self.model
        assert isinstance(model, LoopedDecoder)
        still, gone = 1.0, 0.0
        for depth in range(model.loop.depths):
            before, given = x, []
            if isinstance(model, Huginn):
                x = model.adapter(torch.cat([x, e], -1))
            for layer in core:
                given.append(x)
                x = self.layer(layer, depth, x, position)
            if model.loop.norm_each:
                x = model.norm(x)
            if model.loop.gate:
                leaves = float(torch.sigmoid(model.early_exit_gate(x)))
                still, gone = still * (1 - leaves), gone + still * leaves
            if self.leaves(depth + 1, before, x, position, gone):
                for deeper in range(depth + 1, self.reach(model.loop.depths)):
                    for j, layer in enumerate(core):
                        if model.loop.skipped == "propagate":
                            self.skip(layer, deeper, x, position)
                        elif model.loop.skipped == "last_exited":
                            self.skip(layer, deeper, given[j], position, weights_of=depth)
                return x, depth + 1
        return x, model.loop.depths

    def reach(self, full: int) -> int:
        """As deep as any token of this sequence may come."""
        return min(full, self.policy.depth or self.policy.max_depth or full)

    # Leaving.

    def leaves(self, depth: int, before: Tensor, after: Tensor, position: int, gate: float = 0.0) -> bool:
        p = self.policy
        early = False
        if p.signal is not None:
            value = gate if p.signal == "gate" else self.measure(p.signal, depth, before, after, position)
            self.seen.setdefault(p.signal, []).append(value)
            threshold = DEFAULT_THRESHOLDS.get(p.signal, 1.0) if p.threshold is None else p.threshold
            early = value >= threshold if p.signal in AT_LEAST else value <= threshold
        ceiling = p.depth or p.max_depth
        if ceiling is not None:  # of a model without an exit at that depth: the one before
            ceiling = max(exit_ for exit_ in self.model.path().exits if exit_ <= ceiling)
        return (early and depth >= (p.min_depth or 0)) or (ceiling is not None and depth >= ceiling)

    def measure(self, name: str, depth: int, before: Tensor, after: Tensor, position: int) -> float:
        if name in ("latent_diff", "cosine"):
            if self.first(depth):
                return float("nan")
            if name == "cosine":
                return float(1 - (before * after).sum() / before.norm() / after.norm())
            return float((after - before).norm() / after.norm())
        p = self.predict(after, position, keep=False).softmax(-1)
        top = p.sort(descending=True).values
        one = {"probability": top[0], "margin": top[0] - top[1], "entropy": -(p * p.log()).sum()}
        if name in one:
            return float(one[name])
        q = self.predict(before, position, keep=False).softmax(-1)
        if name == "argmax":
            same = bool(p.argmax() == q.argmax()) and not self.first(depth)
            self.streak = self.streak + 1 if same else 0
            return float(self.streak)
        if self.first(depth):
            return float("nan")
        if name == "entropy_diff":
            return float(abs((p * p.log()).sum() - (q * q.log()).sum()))
        if name == "minp_kl":
            p, q = (torch.where(x < 0.1 * x.max(), torch.tensor(1 / len(x)), x) for x in (p, q))
            p, q = p / p.sum(), q / q.sum()
        return float((q * (q.log() - p.log())).sum())

    def first(self, depth: int) -> bool:
        """Whether there is nothing yet to compare with."""
        exits = getattr(self.model, "exits", (1,))
        return depth <= exits[0]

    def predict(self, x: Tensor, position: int, keep: bool = True) -> Tensor:
        model = self.model
        if not isinstance(model, LoopedDecoder):
            return model.logits(x)[0]
        if keep or isinstance(model, Huginn):
            x = model.norm(x) if isinstance(model, Huginn) else x
            for layer in range(len(model.layers) - model.loop.coda, len(model.layers)):
                x = self.layer(layer, 0, x, position)
                if not keep:
                    self.entries[layer, 0].pop()
        return model.logits(x)[0]

    # Layers.

    def skip(self, layer: int, depth: int, x: Tensor, position: int, weights_of: int | None = None) -> None:
        """Write what later tokens see, of a layer of one mixer or of two."""
        block: Block = self.model.layers[layer]  # type: ignore[assignment]
        write = self.layer if isinstance(block.mlp, Mixer) else self.mix
        write(layer, depth, x, position, weights_of)

    def layer(
        self, layer: int, depth: int, x: Tensor, position: int, weights_of: int | None = None
    ) -> Tensor:
        block: Block = self.model.layers[layer]  # type: ignore[assignment]
        mixed = self.mix(layer, depth, x, position, weights_of)
        if isinstance(block, HuginnBlock):
            x = block.norm_2(mixed + x)
            return block.norm_4(block.mlp(block.mlp_norm(x)) + x)
        if isinstance(block, OuroBlock):
            x = x + block.mixer_norm_2(mixed)
            return x + block.mlp_norm_2(block.mlp(block.mlp_norm(x)))
        if isinstance(block, PostNormBlock):
            x = x + block.mixer_norm(mixed)
            return x + block.mlp_norm(block.mlp(x))
        if block.pre_norm is not None:
            x = block.pre_norm(x)
        x = x + mixed
        if block.mlp is None:
            return x
        if isinstance(block.mlp, Mixer):
            return x + self.recur(block.mlp, layer, depth, block.mlp_norm(x), position)
        return x + block.mlp(block.mlp_norm(x))

    def mix(self, layer: int, depth: int, x: Tensor, position: int, weights_of: int | None = None) -> Tensor:
        """The mixer of one layer at one depth, its state advanced; with the weights of another depth, if told so."""
        block: Block = self.model.layers[layer]  # type: ignore[assignment]
        shared = isinstance(self.model, LoopedDecoder) and self.model.loop.skipped == "shared"
        if isinstance(self.model, LoopedDecoder):
            self.model.token_depths.value = torch.tensor([depth if weights_of is None else weights_of])
        h = x if block.pre_norm is None else block.pre_norm(x)
        h = h if isinstance(block, PostNormBlock) else block.mixer_norm(h)
        if not isinstance(block.mixer, Attention):
            return self.recur(block.mixer, layer, depth, h, position)
        attention, gate = block.mixer, None
        if isinstance(attention, GatedAttention):
            both, k, v = attention.qkv(h)
            q, gate = both.unflatten(-1, (attention.heads, -1)).chunk(2, -1)
            k, v = (y.unflatten(-1, (attention.kv_heads, -1)) for y in (k, v))
            q, k, v = attention.prepared(q, k, v, torch.tensor([position]))
        else:
            q, k, v = attention.project(h, torch.tensor([position]))
        known = self.entries.setdefault((layer, 0 if shared else depth), [])
        if not (shared and depth):
            known.append((k[0], v[0]))
        seen = known[-(attention.window or 0) :]  # of those that came here
        keys, values = (torch.stack(x) for x in zip(*seen, strict=True))
        group = attention.heads // attention.kv_heads
        out = []
        for head in range(attention.heads):
            scores = keys[:, head // group] @ q[0, head] * attention.scale
            if attention.softcap is not None:
                scores = attention.softcap * torch.tanh(scores / attention.softcap)
            out.append(scores.softmax(0) @ values[:, head // group])
        o = torch.cat(out)[None]
        return attention.o_proj(o if gate is None else o * torch.sigmoid(gate.flatten(1)))

    def recur(self, mixer: Mixer, layer: int, depth: int, h: Tensor, position: int) -> Tensor:
        """One step of a recurrent mixer of one layer at one depth, its state advanced."""
        leaves = cast("Block", self.model.layers[layer]).leaves()  # a layer with two mixers has one state
        pool = self.states.setdefault((layer, depth), StatePool(Layout.of([leaves]), 1))
        index = torch.tensor([1]), torch.tensor([0]), torch.tensor([0, 1])
        return mixer(h, Batch(*index, torch.tensor([position])), pool.layers[0])
