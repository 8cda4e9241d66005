"""``python -m models.train [NAME ...]``: train models of the zoo; those that are named, or all that are missing."""

import json
import platform
from pathlib import Path
from typing import Annotated

import torch
import typer
from tokenizers import Tokenizer

from models.checkpoint import ZOO, save
from models.decoder import Decoder
from models.depth.per_depth import PerDepth
from models.errors import ConfigError
from models.load import load, pick_device
from models.registry import family, names
from models.train import corpus, data
from models.train.evaluate import bits_per_byte, compressors
from models.train.loop import Recipe, initialise, train
from models.train.recipes import RECIPES, VOCABULARY
from models.train.tokenizer import train_tokenizer

RUNS = Path("runs")


def make(recipe: Recipe, texts: corpus.Corpus) -> None:
    """Train, save into the zoo, and write the model's card beside it."""
    folder = ZOO / recipe.name
    tokenizer = _tokenizer(texts)
    tokens = data.encoded(texts.training, tokenizer, RUNS / "corpus.npy")
    host = family(recipe.config, recipe.name)
    _, model = host.build(recipe.config, recipe.name)
    for module in model.modules():
        if isinstance(module, PerDepth):
            module.tie()
    initialise(model, recipe.seed)
    if recipe.start:
        begin(model, ZOO / recipe.start)
    model.to(pick_device("auto"))
    print(f"{recipe.name}: {model.parameter_count():,} parameters, {len(tokens):,} tokens of training text")
    train(model, recipe, tokens, RUNS / recipe.name)
    save(folder, model, names(recipe.config, recipe.name), recipe.config, torch.bfloat16)
    tokenizer.save(str(folder / "tokenizer.json"))
    model.to(torch.bfloat16).float()  # the weights as they ship
    card = {
        "parameters": model.parameter_count(),
        "trained_on": f"standard library of Python {platform.python_version()}, {len(texts.training)} files",
        "training_tokens": recipe.steps * recipe.tokens,
        "held_out_bytes": texts.held_out_bytes,
        **{name: round(bits, 4) for name, bits in compressors(texts.held_out).items()},
    }
    if not model.layout().paged:
        card["held_out_bits_per_byte"] = round(bits_per_byte(model, tokenizer, texts.held_out), 4)
    (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    print(json.dumps(card, indent=2))


def begin(model: Decoder, other: Path) -> None:
    """Give a model the layers of another one with as many: a looped model those of a plain one, which it is with one
    pass; a routed one those of a looped one, whose gate it does without."""
    _, foreign = model.load_state_dict(load(other, "float32", "cpu").model.state_dict(), strict=False)
    layers = [name for name in foreign if not name.startswith("early_exit_gate")]
    if layers:
        raise ConfigError(other, "num_hidden_layers", len(layers), "tensors have no place in the new model")


def _tokenizer(texts: corpus.Corpus) -> Tokenizer:
    """One tokenizer for the whole zoo, so that its models can be compared and can draft for each other."""
    kept = RUNS / "tokenizer.json"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        train_tokenizer(texts.training, VOCABULARY).save(str(kept))
    return Tokenizer.from_file(str(kept))


def main(
    names: Annotated[list[str] | None, typer.Argument(help=f"which models: {', '.join(RECIPES)}")] = None,
    threads: Annotated[int | None, typer.Option(help="processor threads")] = None,
) -> None:
    """Train models of the zoo: those that are named, or all that are missing."""
    if threads:
        torch.set_num_threads(threads)
    unknown = [name for name in names or [] if name not in RECIPES]
    if unknown:
        raise typer.BadParameter(f"{unknown[0]}: must be one of {', '.join(RECIPES)}")
    texts = corpus.read()
    for name, recipe in RECIPES.items():
        if name in names if names else not (ZOO / name / "model.safetensors").exists():
            make(recipe, texts)


if __name__ == "__main__":
    typer.run(main)
