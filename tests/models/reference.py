"""Comparing a hosted checkpoint with the library that wrote it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.batch import Batch
from models.checkpoint import save as write
from models.load import LoadedModel, load
from models.registry import family
from serving import LLM, SamplingParams

LENGTHS = (1, 7, 80)  # 80: more than a chunk of the scans
NEW = 5
Logits = Callable[[Tensor], Tensor]  # ids [L] -> logits [L, vocabulary] of one whole pass


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Weights under which every term of a model counts: no zeros, no ones, no near-identities."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(1.2 * noise / parameter[0].numel() ** 0.5)
            else:
                parameter.add_(0.2 * noise.view_as(parameter))


def publish(config: dict[str, Any], folder: Path) -> None:
    """A checkpoint of one of our own formats, with random weights."""
    host = family(config, "test")
    model = host.build(config, "test")[1]
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 0.5)
    randomise(model)
    write(folder, model, host.NAMES, config, torch.float32)


def save(model: Any, folder: Path, *, apart: bool = False) -> None:
    """As a person would publish it: config.json and safetensors, by the library's own writer. `apart`:
    weights that two modules share go under both names, where that writer would refuse them."""
    model.eval()
    shared = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(folder, **({"state_dict": shared} if apart else {}))


@torch.no_grad()
def assert_equal(
    folder: Path, logits: Logits, *, tolerance: float = 1e-4, lengths: tuple[int, ...] = LENGTHS
) -> None:
    """Greedy tokens equal, log-probabilities within `tolerance`: in the engine, with prompts at once and in
    pieces, and in training's whole pass."""
    loaded = load(folder, dtype="float32")
    vocabulary = loaded.model.vocab_size
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(vocabulary, (n,), generator=generator).tolist() for n in lengths]
    whole = _run(loaded, prompts, prefill_tokens=4096)
    for prompt, (ids, scores) in zip(prompts, whole, strict=True):
        expected = logits(torch.tensor(prompt + ids)).float().cpu()
        greedy = expected[len(prompt) - 1 : -1].argmax(-1).tolist()
        assert ids == greedy, f"{len(prompt)} tokens: {ids} after the prompt, the reference has {greedy}"
        logprobs = expected.log_softmax(-1)[torch.arange(len(scores)), (prompt + ids)[1:]]
        apart = (torch.tensor(scores) - logprobs).abs().max()
        assert apart < tolerance, f"{len(prompt)} tokens: log-probabilities are {apart:.2g} apart"
        if len(prompt) == max(lengths):  # the way of training, without a pool of states, and all in parallel
            device = loaded.model.device
            batch = Batch.of_sequences([len(prompt + ids)], device)
            trained = loaded.model(torch.tensor(prompt + ids, device=device), batch).cpu()
            torch.testing.assert_close(
                trained.log_softmax(-1), expected.log_softmax(-1), atol=5 * tolerance, rtol=0
            )
    for size in (3, 33):
        for (ids, scores), (ids_whole, scores_whole) in zip(_run(loaded, prompts, size), whole, strict=True):
            assert ids == ids_whole, f"prefill in pieces of {size} gives other tokens"
            # Each may be so far from the reference.
            torch.testing.assert_close(
                torch.tensor(scores), torch.tensor(scores_whole), atol=2 * tolerance, rtol=0
            )


def _run(
    loaded: LoadedModel, prompts: list[list[int]], prefill_tokens: int
) -> list[tuple[list[int], list[float]]]:
    """For each prompt: its greedy continuation, and the log-probability of every token after the first."""
    llm = LLM(loaded, slots=3, prefill_tokens=prefill_tokens)
    made = [
        c.token_ids
        for c in llm.generate(prompts, SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True))
    ]
    return list(zip(made, llm.score([p + m for p, m in zip(prompts, made, strict=True)]), strict=True))


LENGTH = ("max_position_embeddings",)  # only the length it was trained at: a default says nothing


def assert_config_is_covered(reference: Any, derived: frozenset[str] = frozenset()) -> None:
    """No key of a published configuration class is unknown, and ours have its defaults, but for keys that it
    derives from others."""
    raw = reference.to_dict()
    config = family(raw, "test").Config
    assert not config.unknown(raw), (
        f"{raw['model_type']}: not read, and not known to be inert: {config.unknown(raw)}"
    )
    for name, field in config.model_fields.items():
        theirs = raw.get(next((key for key, ours in config.aliases.items() if ours == name), name))
        if not field.is_required() and theirs is not None and name not in {*derived, *LENGTH}:
            theirs = tuple(theirs) if isinstance(theirs, list) else theirs
            assert field.default == theirs, (
                f"{raw['model_type']}: {name} is {theirs!r} by default, not {field.default!r}"
            )
