"""``python -m models.train.parity``: DeltaNet learns parity where its transition may have negative eigenvalues, and
does not where it may not (arXiv 2411.12537).

After each bit of a sequence the model says whether the ones so far are odd in number. It is trained on short
sequences and asked about long ones. With beta up to 2, I - beta k k^T can turn a direction of the state round, which
is what a one asks for; with beta up to 1 it can only shrink it.
"""

import json
import time
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from models.batch import Batch
from models.decoder import Decoder
from models.registry import family

START = 2  # token before the first bit: something to write that the bits can turn
CONFIG: dict[str, Any] = {
    "model_type": "delta_net",
    "vocab_size": 3,
    "hidden_size": 64,
    "num_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "use_short_conv": False,
    "tie_word_embeddings": False,
}


def sequences(count: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens [count, 1 + length], the start and random bits, and the parity after each bit [count, length]."""
    bits = torch.randint(2, (count, length), generator=generator)
    return torch.cat([torch.full((count, 1), START), bits], 1), bits.cumsum(1) % 2


def predicted(model: Decoder, tokens: Tensor) -> Tensor:
    """tokens [count, 1 + length] -> logits of the two parities after each bit [count, length, 2]."""
    count, length = tokens.shape
    logits = model(tokens.flatten(), Batch.of_sequences([length] * count))
    return logits.view(count, length, -1)[:, 1:, :2]


def train(negative: bool, steps: int, longest: int, seed: int) -> Decoder:
    """A model trained on sequences of up to `longest` bits, 64 of one length a step."""
    config = CONFIG | {"allow_neg_eigval": negative}
    model = family(config, "parity").build(config, "parity")[1]
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=1.0 if "embeddings" in name else parameter.shape[1] ** -0.5)
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        length = int(torch.randint(3, longest + 1, (1,), generator=generator))
        tokens, parity = sequences(64, length, generator)
        loss = F.cross_entropy(predicted(model, tokens).flatten(0, 1), parity.flatten())
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    return model


@torch.no_grad()
def accuracy(model: Decoder, first: int, last: int, seed: int = 1) -> float:
    """Share of right answers after bits `first` to `last` of 32 sequences; a guess is right half of the time."""
    tokens, parity = sequences(32, last, torch.Generator().manual_seed(seed))
    right = predicted(model, tokens).argmax(-1) == parity
    return float(right[:, first - 1 :].float().mean())


def main(
    steps: Annotated[int, typer.Option(min=1)] = 200,
    longest: Annotated[int, typer.Option(min=3, help="bits in training")] = 40,
    beyond: Annotated[int, typer.Option(help="bits in the longest test")] = 1024,
    seed: int = 0,
) -> None:
    """Train both, and print a line of JSON for each."""
    for negative in (True, False):
        start = time.perf_counter()
        model = train(negative, steps, longest, seed)
        result = {
            "negative_eigenvalues": negative,
            "trained_on": longest,
            f"1-{longest}": round(accuracy(model, 1, longest), 4),
            f"{longest + 1}-256": round(accuracy(model, longest + 1, 256), 4),
            f"257-{beyond}": round(accuracy(model, 257, beyond), 4),
            "seconds": round(time.perf_counter() - start),
        }
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    typer.run(main)
