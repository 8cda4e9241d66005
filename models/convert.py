"""From a plain checkpoint to a recursive one: a few layers, passed several times, stand for all of them.

Relaxed Recursive Transformers, arXiv 2410.20672, section 3: the shared layers begin as some of the original ones, or as
their average; what they lack of the original at each depth is kept in a low-rank update, by singular values.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from models.batch import Batch
from models.checkpoint import Checkpoint, save
from models.decoder import Block, Decoder
from models.depth.looped import LoopedDecoder
from models.depth.lora import DepthLora, DepthNorm, projections
from models.errors import ConfigError
from models.layers import Packed
from models.load import load, prepare
from models.registry import family, names

Sharing = Literal["cycle", "sequence", "middle_cycle", "middle_sequence"]
Start = Literal["stepwise", "average", "lower"]
Skipped = Literal["absent", "propagate", "last_exited"]
COPIED = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


@dataclass(frozen=True, slots=True)
class Recursion:
    """How the layers of a plain model are to be shared."""

    sharing: Sharing = "middle_cycle"
    recursions: int = 2
    start: Start = "stepwise"
    rank: int = 0  # of the update at each depth; 0: none, every depth is the same (strict)
    alpha: float | None = None  # updates are stored so that they count alpha / rank times
    skipped: Skipped = "absent"

    @staticmethod
    def parse(
        sharing: str, recursions: int, start: str, rank: int, alpha: float | None, skipped: str
    ) -> "Recursion":
        """From words. Raises ConfigError."""
        known = {"sharing": (sharing, Sharing), "start": (start, Start), "skipped": (skipped, Skipped)}
        for name, (value, kind) in known.items():
            if value not in get_args(kind):
                raise ConfigError("conversion", name, value, f"must be one of {', '.join(get_args(kind))}")
        return Recursion(
            cast("Sharing", sharing), recursions, cast("Start", start), rank, alpha, cast("Skipped", skipped)
        )

    @property
    def outside(self) -> int:
        """Layers before the core, and as many after it, which stay as they are."""
        return 1 if self.sharing.startswith("middle") else 0

    def core(self, layers: int) -> int:
        """Layers that are shared, of a model with so many. Raises ConfigError."""
        inside = layers - 2 * self.outside
        if self.recursions < 2 or inside < self.recursions or inside % self.recursions:
            limit = f"must be 2 or more and divide the {inside} layers that {self.sharing} shares"
            raise ConfigError("conversion", "recursions", self.recursions, limit)
        return inside // self.recursions

    def layer(self, shared: int, depth: int, core: int) -> int:
        """The original layer that a shared one stands for at a depth."""
        inner = shared * self.recursions + depth if "sequence" in self.sharing else depth * core + shared
        return self.outside + inner

    def origins(self, shared: int, core: int) -> list[int]:
        """The original layers whose average a shared one begins as."""
        if self.start == "average":
            return [self.layer(shared, depth, core) for depth in range(self.recursions)]
        if self.start == "lower":
            return [self.outside + shared]
        last = core * self.recursions - 1
        return [self.outside + (round(shared * last / (core - 1)) if core > 1 else 0)]


@dataclass(frozen=True, slots=True)
class Distance:
    """How far the predictions of the converted model are from the original's, over `tokens` tokens."""

    tokens: int
    largest: float  # difference of two logits
    divergence: float  # nats a token, of the converted prediction from the original one
    agreement: float  # share of tokens for which both find the same token likeliest


def convert(source: str | Path, target: Path, how: Recursion, dtype: torch.dtype = torch.float32) -> Distance:
    """Write a recursive checkpoint into the folder `target`; how far it is from the original.

    Raises ModelError: the source cannot be loaded, is no plain stack, or cannot be shared in this way; or the target
    holds something already.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError("conversion", "target", str(target), "must be a new or an empty folder")
    checkpoint = Checkpoint(source)
    original = load(source, "float32", "cpu").model
    config = recursive_config(checkpoint.read(), how, len(original.layers))
    _check_rank(how.rank, original)
    _, model = family(config, "config.json").build(config, "config.json")
    assert isinstance(model, LoopedDecoder)
    _check_kinds(model, original, how)
    fill(model, original, how)
    save(target, model, names(config, "config.json"), config, dtype)
    for name in COPIED:
        if (checkpoint.folder / name).is_file():
            shutil.copyfile(checkpoint.folder / name, target / name)
    model.to(dtype).float().requires_grad_(False)  # the weights as they were written
    prepare(model)
    return distance(original, model, tokens(checkpoint, original.vocab_size))


def recursive_config(base: dict[str, Any], how: Recursion, layers: int) -> dict[str, Any]:
    """The configuration of a plain model with so many layers, shared."""
    if base.get("model_type") == "recursive":
        raise ConfigError("conversion", "model_type", "recursive", "is recursive already")
    if how.rank < 0:
        raise ConfigError("conversion", "rank", how.rank, "must be 0 or more")
    count = how.core(layers) + 2 * how.outside
    config = {
        "model_type": "recursive", "base": {**base, "num_hidden_layers": count}, "sharing": how.sharing,
        "num_recursions": how.recursions, "skipped": how.skipped, "lora_rank": how.rank, "untied": how.rank > 0,
    }  # fmt: skip
    return config if how.alpha is None else {**config, "lora_alpha": how.alpha}


def _check_rank(rank: int, original: Decoder) -> None:
    """Raises ConfigError for one that no projection has."""
    full = 0
    for _, projection in (p for block in original.blocks for p in projections(block)):
        rows, columns = projection.get_parameter("weight").shape
        sizes = projection.sizes if isinstance(projection, Packed) else [rows]
        full = max(full, min(columns, max(sizes)))
    if rank > full:
        raise ConfigError("conversion", "rank", rank, f"the full rank of this model's projections is {full}")


def _check_kinds(model: LoopedDecoder, original: Decoder, how: Recursion) -> None:
    """Raises ConfigError where a layer would stand for one of another kind, as there are in hybrid models."""
    last, core = len(original.layers) - 1, how.core(len(original.layers))
    stands_for = {len(model.layers) - 1: [last], 0: [0]} if how.outside else {}
    for shared in range(core):
        depths = [how.layer(shared, depth, core) for depth in range(how.recursions)]
        stands_for[how.outside + shared] = [*depths, *how.origins(shared, core)]
    for mine, origins in stands_for.items():
        for origin in origins:
            if _kinds(model.blocks[mine]) != _kinds(original.blocks[origin]):
                limit = (
                    f"layer {mine} would stand for layer {origin} of the original, which is of another kind"
                )
                raise ConfigError("conversion", "sharing", how.sharing, limit)


def _kinds(block: Block) -> dict[str, torch.Size]:
    """What a layer is made of: its parameters, but for what is there for each depth."""
    return {
        f"{path}.{name}": parameter.shape[isinstance(module, DepthNorm) :]
        for path, module in block.named_modules()
        if not path.startswith("loras")
        for name, parameter in module.named_parameters(recurse=False)
    }


@torch.no_grad()
def fill(model: LoopedDecoder, original: Decoder, how: Recursion) -> None:
    """Give a recursive model its weights."""
    for mine, theirs in (
        (model.embeddings, original.embeddings),
        (model.norm, original.norm),
        (model.lm_head, original.lm_head),
    ):
        if mine is not None and theirs is not None:
            mine.load_state_dict(theirs.state_dict())
    core = how.core(len(original.layers))
    for at in range(how.outside):
        model.blocks[at].load_state_dict(original.blocks[at].state_dict())
        model.blocks[-1 - at].load_state_dict(original.blocks[-1 - at].state_dict())
    for shared in range(core):
        begins = [original.blocks[i] for i in how.origins(shared, core)]
        depths = [original.blocks[how.layer(shared, d, core)] for d in range(how.recursions)]
        _share(model.blocks[how.outside + shared], begins, depths)


def _share(block: Block, begins: Sequence[Block], depths: Sequence[Block]) -> None:
    """A shared layer begins as the average of some, and is corrected towards another one at each depth."""
    for path, module in block.named_modules():
        if path.startswith("loras") or isinstance(module, DepthNorm):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            parameter.copy_(_average([b.get_submodule(path).get_parameter(name) for b in begins]))
    for path, module in block.named_modules():
        if isinstance(module, DepthNorm):
            for depth, other in enumerate(depths):
                module.copy(depth, other.get_submodule(path))
    if not hasattr(block, "loras"):
        return
    for path, projection in projections(block):
        lora = cast("DepthLora", block.get_submodule(f"loras.{path.replace('.', '_')}"))
        for depth, other in enumerate(depths):
            _correct(lora, depth, projection, other.get_submodule(path))


def _average(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.stack(list(tensors)).mean(0)


def _correct(lora: DepthLora, depth: int, shared: nn.Module, wanted: nn.Module) -> None:
    """The best update of its rank, by singular values: A = V[:r], B = U Sigma, over what the update is scaled by."""
    missing = (wanted.get_parameter("weight") - shared.get_parameter("weight")).double()
    rank, at = lora.A.shape[2], 0
    for part, size in enumerate(lora.sizes):
        U, S, Vh = torch.linalg.svd(missing[at : at + size], full_matrices=False)
        kept = min(rank, len(S))
        lora.A[depth, part, :kept] = Vh[:kept].float()
        lora.B[depth, at : at + size, :kept] = (U[:, :kept] * S[:kept] / lora.scale).float()
        at += size
    if lora.bias is not None:
        lora.bias[depth] = wanted.get_parameter("bias") - shared.get_parameter("bias")


def tokens(checkpoint: Checkpoint, vocab_size: int, count: int = 512) -> Tensor:
    """What the two are compared on: some source text, or random ids for a model without a tokenizer."""
    tokenizer = checkpoint.tokenizer()
    if tokenizer is None:
        return torch.randint(0, vocab_size, (count,), generator=torch.Generator().manual_seed(0))
    import inspect
    import textwrap

    return torch.tensor(tokenizer.encode(inspect.getsource(textwrap)).ids[:count])


@torch.no_grad()
def distance(original: Decoder, model: Decoder, ids: Tensor) -> Distance:
    """ids [T] of one sequence, at the full depth."""
    batch = Batch.of_sequences([len(ids)])
    theirs, ours = original(ids, batch), model(ids, batch)
    divergence = nn.functional.kl_div(
        ours.log_softmax(-1), theirs.log_softmax(-1), reduction="batchmean", log_target=True
    )
    return Distance(
        tokens=len(ids),
        largest=float((ours - theirs).abs().max()),
        divergence=float(divergence),
        agreement=float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()),
    )
