"""The training loop: seeded, resumable, on a GPU when there is one."""

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.batch import Batch
from models.decoder import Decoder
from models.train.data import crops
from models.train.objectives import next_token

Objective = Callable[[Decoder, Tensor, Tensor, Batch, int], Tensor]
"""(model, ids, targets, batch, step) -> the loss to descend, in nats per token."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one model of the zoo is made."""

    name: str
    config: dict[str, Any]
    objective: Objective = field(default=next_token)
    steps: int = 2500
    tokens: int = 8192  # of a step
    length: int = 512  # tokens of a sequence, at first
    long_length: int = 2048  # and later, so that the model learns to live with a long past
    long_from: float = 0.56  # share of the steps that are short
    learning_rate: float = 3e-3
    warmup: int = 100
    seed: int = 0
    start: str = ""  # model of the zoo whose layers it begins with
    muon: bool = True  # for the matrices of the layers; without it AdamW takes them too

    def shape(self, step: int) -> tuple[int, int]:
        """Sequences of a step, and tokens of each."""
        length = self.length if step < self.long_from * self.steps else self.long_length
        return self.tokens // length, length


def initialise(model: Decoder, seed: int) -> None:
    """Normal(0, 0.02) matrices, projections back into the residual stream scaled down by its depth; routers near 0."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.startswith("routers"):
            nn.init.normal_(parameter, std=0.002)
        elif parameter.dim() >= 2:
            into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            scale = 0.02 / math.sqrt(2 * len(model.layers)) if into_residual else 0.02
            nn.init.normal_(parameter, std=scale)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)


class Optimiser:
    """Muon for the matrices of the layers, AdamW for the rest; a warm-up and a cosine down to a tenth.

    Muon orthogonalises in bfloat16, which takes longer than a small step itself on a CPU without such instructions.
    """

    def __init__(self, model: Decoder, recipe: Recipe):
        matrices = [
            p for n, p in model.named_parameters() if recipe.muon and p.dim() == 2 and n.startswith("layers.")
        ]
        chosen = {id(p) for p in matrices}
        others = [p for p in model.parameters() if id(p) not in chosen]
        self.recipe = recipe
        self.parts: tuple[torch.optim.Optimizer, ...] = (
            torch.optim.AdamW(others, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0),
        )
        if matrices:
            muon = torch.optim.Muon(matrices, lr=0.0, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
            self.parts = (muon, *self.parts)

    def step(self, at: int) -> None:
        r = self.recipe
        done = max(0.0, (at - r.warmup) / max(1, r.steps - r.warmup))
        rate = r.learning_rate * min(1.0, (at + 1) / r.warmup) * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = rate
            part.step()
            part.zero_grad()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for i, part in enumerate(self.parts):
            for j, parameter in enumerate(p for group in part.param_groups for p in group["params"]):
                for key, value in part.state[parameter].items():
                    yield f"{i}.{j}.{key}", torch.as_tensor(value)

    def load(self, tensors: dict[str, Tensor]) -> None:
        for i, part in enumerate(self.parts):
            for j, parameter in enumerate(p for group in part.param_groups for p in group["params"]):
                prefix = f"{i}.{j}."
                kept = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
                # Step counts stay on the CPU, as the optimisers keep them.
                part.state[parameter] = {
                    k: v if v.dim() == 0 else v.to(parameter.device) for k, v in kept.items()
                }


def train(model: Decoder, recipe: Recipe, tokens: npt.NDArray[np.uint16], folder: Path) -> None:
    """Train in place. Progress is kept in `folder`, and taken up again from there."""
    optimiser = Optimiser(model, recipe)
    first = _resume(model, optimiser, folder)
    mixed = torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda")
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  {task.fields[rate]:,.0f} tokens/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        task = progress.add_task(
            recipe.name, total=recipe.steps, completed=first, loss=float("nan"), rate=0.0
        )
        smoothed, begun = float("nan"), time.monotonic()
        for step in range(first, recipe.steps):
            sequences, length = recipe.shape(step)
            batch = Batch.of_sequences([length] * sequences, model.device)
            ids, targets = (x.to(model.device) for x in crops(tokens, recipe.seed, step, sequences, length))
            with mixed:
                loss = recipe.objective(model, ids, targets, batch, step)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step(step)
            value = loss.item()
            if not math.isfinite(value):
                raise RuntimeError(f"{recipe.name}: the loss became {value} at step {step}")
            smoothed = value if math.isnan(smoothed) else 0.98 * smoothed + 0.02 * value
            rate = (step + 1 - first) * recipe.tokens / (time.monotonic() - begun)
            progress.update(task, completed=step + 1, loss=smoothed, rate=rate)
            if (step + 1) % 100 == 0 or step + 1 == recipe.steps:
                _keep(model, optimiser, folder, step + 1)
                if not progress.console.is_terminal:
                    print(
                        f"{recipe.name}: step {step + 1}/{recipe.steps} loss {smoothed:.4f} {rate:,.0f} tokens/s",
                        flush=True,
                    )


def _keep(model: Decoder, optimiser: Optimiser, folder: Path, step: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    tensors |= {f"optimiser.{k}": v for k, v in optimiser.tensors()}
    partial = folder / "progress.tmp"
    save_file(
        {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()},
        str(partial),
        metadata={"step": json.dumps(step)},
    )
    partial.replace(folder / "progress.safetensors")


def _resume(model: Decoder, optimiser: Optimiser, folder: Path) -> int:
    from safetensors import safe_open

    file = folder / "progress.safetensors"
    if not file.exists():
        return 0
    tensors = load_file(str(file))
    model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
    optimiser.load(
        {k.removeprefix("optimiser."): v for k, v in tensors.items() if k.startswith("optimiser.")}
    )
    with safe_open(str(file), framework="pt") as opened:
        return int(json.loads(opened.metadata()["step"]))
