"""A checkpoint folder: config.json, safetensors, tokenizer.json. Nothing is ever read by pickle."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from models.errors import CheckpointError, ConfigError, ModelNotFoundError, brief
from models.layers import Parted

ZOO = Path(__file__).parent / "zoo"
INDEX = "model.safetensors.index.json"
GENERATION = "generation_config.json"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
BUFFERS = re.compile(r"rotary_emb\.inv_freq$|freqs_cis$|\.attn\.bias$|\.masked_bias$")
"""Tensors that some libraries save although they follow from the configuration."""
SHARD = re.compile(r"[\w.-]{1,200}\.safetensors")
STORED = ("F32", "F16", "BF16", "F64")
HEADS = ("lm_head.weight", "head.weight")
EMBEDDINGS = re.compile(r"(^|\.)(embed_tokens|embeddings?)\.weight$")

Names = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """One tensor of a file: the whole of a parameter, or a part of one."""

    file: Path
    key: str
    opened: Any  # the file, open


def find(path_or_name: str | Path) -> Path:
    """The folder of a checkpoint: a local path, ``zoo/NAME``, or a Hub id where the network allows.

    Raises ModelNotFoundError with what was tried.
    """
    path = Path(path_or_name)
    if path.is_dir():
        return path
    text = str(path_or_name)
    if text.startswith("zoo/"):
        folder = ZOO / text.removeprefix("zoo/")
        if folder.is_dir():
            return folder
        there = ", ".join(f"zoo/{p.parent.name}" for p in sorted(ZOO.glob("*/config.json")))
        raise ModelNotFoundError(f"{text}: not in the zoo, which has {there or 'no models yet: make zoo'}")
    if path.exists():
        raise ModelNotFoundError(
            f"{text}: a checkpoint is a folder with config.json and *.safetensors, not a file"
        )
    if re.fullmatch(r"[\w.-]+/[\w.-]+", text):
        return _from_hub(text)
    raise ModelNotFoundError(f"{text}: no such folder, zoo model or Hub id")


def _from_hub(repo: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = ["*.json", "*.safetensors", "*.jinja", "config.yaml"]
    try:
        return Path(snapshot_download(repo, allow_patterns=wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelNotFoundError(f"{repo}: no such folder, and the Hub did not give it: {error}") from None


def _number(value: dict[str, Any]) -> Any:
    """Infinity and not-a-number, as the transformers library writes them."""
    special = value.get("__float__") if len(value) == 1 else None
    return float(special) if isinstance(special, str) else value


class Checkpoint:
    """The files of one model."""

    def __init__(self, path_or_name: str | Path):
        self.folder = find(path_or_name)
        self.config_file = self.folder / "config.json"
        self.config: dict[str, Any] = self._json("config.json", required=True)
        if (self.folder / "config.yaml").is_file():
            self.config["yaml"] = self._yaml("config.yaml")

    def _json(self, name: str, required: bool = False) -> dict[str, Any]:
        file = self.folder / name
        if not file.is_file():
            if required:
                raise CheckpointError(f"{self.folder}: {name} is missing")
            return {}
        try:
            value = json.loads(file.read_text("utf-8"), object_hook=_number)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{file}: not valid JSON: {error}") from None
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from None
        if not isinstance(value, dict):
            raise CheckpointError(f"{file}: must be a JSON object, got {type(value).__name__}")
        return value

    def _yaml(self, name: str) -> dict[str, Any]:
        file = self.folder / name
        try:
            value = yaml.safe_load(file.read_text("utf-8"))
        except (ValueError, RecursionError, yaml.YAMLError) as error:
            raise CheckpointError(f"{file}: not valid YAML: {error}") from None
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from None
        if not isinstance(value, dict):
            raise CheckpointError(f"{file}: must be a mapping, got {type(value).__name__}")
        return value

    def read(self) -> dict[str, Any]:
        """The configuration as the weights have it: that a head is tied to the embeddings counts only where the files
        hold no other head. Generation's own configuration, where there is one, says what ends a text."""
        settled = dict(self.config)
        endings = self._json(GENERATION).get("eos_token_id")
        if endings is not None:
            several = endings if isinstance(endings, list) else [endings]
            if not all(type(token) is int for token in several):
                raise ConfigError(self.folder / GENERATION, "eos_token_id", endings, "must be token ids")
            settled["eos_token_id"] = endings
        if self._head_apart():
            settled["tie_word_embeddings"] = False
        return settled

    @torch.no_grad()
    def _head_apart(self) -> bool:
        with ExitStack() as stack:
            where = self._opened(stack)
            heads = [key for key in HEADS if key in where]
            embeddings = [key for key in where if EMBEDDINGS.search(key)]
            if not heads or not embeddings:
                return False
            both = [(where[key][1], key) for key in (heads[0], embeddings[0])]
            if any(opened.get_slice(key).get_dtype() not in STORED for opened, key in both):
                return False  # which `check` says better
            return not torch.equal(*(opened.get_tensor(key) for opened, key in both))

    def tokenizer(self) -> Tokenizer | None:
        """None where the checkpoint has none: such a model takes and gives token ids only."""
        file = self.folder / "tokenizer.json"
        if not file.is_file():
            return None
        try:
            return Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{file}: not a tokenizer: {error}") from None

    def chat(self) -> dict[str, str]:
        """The chat template under "template", and the special tokens that it may name under theirs
        ("bos_token" ...); empty where the checkpoint has no template."""
        config = self._json("tokenizer_config.json")
        file = self.folder / "chat_template.jinja"
        try:
            template = file.read_text("utf-8") if file.is_file() else config.get("chat_template")
        except ValueError as error:
            raise CheckpointError(f"{file}: not a text: {error}") from None
        if isinstance(template, list):  # several, by name
            named = [t for t in template if isinstance(t, dict)]
            template = {t.get("name"): t.get("template") for t in named}.get("default")
        if not isinstance(template, str):
            return {}
        tokens = {name: value for name, value in config.items() if name.endswith("_token")}
        texts = {name: t.get("content") if isinstance(t, dict) else t for name, t in tokens.items()}
        return {"template": template, **{name: text for name, text in texts.items() if isinstance(text, str)}}

    def weight_files(self) -> list[Path]:
        index = self._json(INDEX).get("weight_map", {})
        if not isinstance(index, dict):
            raise CheckpointError(f"{self.folder / INDEX}: weight_map must be an object, tensor to file")
        for name in index.values():
            # A link to elsewhere is its owner's doing (the Hub's own cache is made of them); a path is not.
            if not isinstance(name, str) or not SHARD.fullmatch(name):
                raise CheckpointError(f"{self.folder / INDEX}: {brief(name)} is no name of a file beside it")
        files = sorted({self.folder / name for name in index.values()})
        if not files:  # others beside the usual one are adapters, or the same weights in another format
            usual = self.folder / "model.safetensors"
            files = [usual] if usual.is_file() else sorted(self.folder.glob("*.safetensors"))
            files = [file for file in files if file.is_file()]
        missing = [f.name for f in files if not f.is_file()]
        if missing:
            raise CheckpointError(f"{self.folder / INDEX}: {missing[0]} is missing")
        if files:
            return files
        pickled = sorted(f.name for pattern in PICKLED for f in self.folder.glob(pattern))
        if pickled:
            raise CheckpointError(
                f"{self.folder / pickled[0]}: pickle files are never loaded; convert them to safetensors"
            )
        raise CheckpointError(f"{self.folder}: no *.safetensors")

    def fingerprint(self) -> str:
        """A digest of configuration and weights: equal for equal models. Large tensors count by their headers
        and a sample of their bytes, so that it is quick."""
        plain = {key: value for key, value in self.config.items() if key != "yaml"}
        digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode())
        if "yaml" in self.config:
            digest.update((self.folder / "config.yaml").read_bytes())
        for file in self.weight_files():
            size = file.stat().st_size
            with file.open("rb") as f:
                digest.update(f.read(1 << 20))
                for part in range(1, 16):
                    f.seek(part * size // 16)
                    digest.update(f.read(1 << 14))
        return digest.hexdigest()[:32]

    def stored(self) -> dict[str, int]:
        """Bytes of all tensors, by the type that they are stored in (F32, BF16, ...)."""
        sizes: dict[str, int] = {}
        for file in self.weight_files():
            try:
                with file.open("rb") as f:
                    length = int.from_bytes(f.read(8), "little")
                    header = json.loads(f.read(min(length, file.stat().st_size)))
                entries = [entry for name, entry in header.items() if name != "__metadata__"]
                for entry in entries:
                    begin, end = entry["data_offsets"]
                    sizes[entry["dtype"]] = sizes.get(entry["dtype"], 0) + end - begin
            except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise CheckpointError(f"{file}: truncated or not safetensors") from None
        return sizes

    def check(self, model: nn.Module, names: Names) -> None:
        """Compare names and shapes with what a model asks for, without reading the weights.

        Raises CheckpointError naming the file, the tensor and both shapes.
        """
        for _ in self._matched(model, names):
            pass

    @torch.no_grad()
    def load_into(self, model: nn.Module, names: Names) -> None:
        """Fill every parameter from the files. Raises as `check`, and for a value that is no finite number: one of them
        makes every logit not a number, of every sequence."""
        for module in model.modules():
            if isinstance(module, Parted):  # what no part fills counts as zero
                for parameter in module.parameters(recurse=False):
                    parameter.zero_()
        for pieces, target in self._matched(model, names):
            tensors = [piece.opened.get_tensor(piece.key) for piece in pieces]
            target.copy_(tensors[0] if len(tensors) == 1 else torch.cat(tensors))
            if not _finite(target):
                raise CheckpointError(_what_is_not_finite(pieces, tensors, target.dtype))

    def _opened(self, stack: ExitStack) -> dict[str, tuple[Path, Any]]:
        """Tensor -> the file that holds it, and that file, open as long as the stack is."""
        where: dict[str, tuple[Path, Any]] = {}
        for file in self.weight_files():
            try:
                opened = stack.enter_context(safe_open(str(file), framework="pt"))
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{file}: truncated or not safetensors: {error}") from None
            for key in opened.keys():  # noqa: SIM118 (not a dict)
                if key in where:
                    raise CheckpointError(f"{file}: tensor {key} is in {where[key][0].name} as well")
                where[key] = file, opened
        return where

    def _matched(self, model: nn.Module, names: Names) -> Iterator[tuple[list[Piece], Tensor]]:
        """The tensors of the files that fill a parameter one behind the other; and that parameter. Shapes are
        compared."""
        with ExitStack() as stack:
            where, tied = self._opened(stack), getattr(model, "lm_head", None) is None
            for name, target in checkpoint_tensors(model, names):
                spellings = alternatives(name)
                # The base of a model, saved by itself, has names without their first part; and of tied weights a
                # file may hold either.
                spellings += [[key.partition(".")[2] for key in keys] for keys in spellings]
                if tied and EMBEDDINGS.search(name):
                    spellings += [[head] for head in HEADS]
                keys = next((keys for keys in spellings if all(key in where for key in keys)), spellings[0])
                pieces, shape = [], [0]
                for key in keys:
                    if key not in where:
                        near = ", ".join(sorted(where)[:3])
                        raise CheckpointError(
                            f"{self.folder}: tensor {key} {list(target.shape)} is missing "
                            f"(the files hold {f'{near}, ...' if near else 'no more'})"
                        )
                    file, opened = where.pop(key)
                    part = opened.get_slice(key)
                    if part.get_dtype() not in STORED:
                        raise CheckpointError(
                            f"{file}: tensor {key} is {part.get_dtype()}: must be {', '.join(STORED)}; "
                            "quantised weights are not supported"
                        )
                    size, *rest = part.get_shape() or [1]
                    pieces.append(Piece(file, key, opened))
                    shape = [shape[0] + size, *rest]
                if shape != (list(target.shape) or [1]):
                    raise CheckpointError(
                        f"{file}: tensor {key} has shape {shape}, "
                        f"the configuration asks for {list(target.shape)}"
                    )
                yield pieces, target
            spare = sorted(key for key in where if not BUFFERS.search(key) and key not in HEADS)
            if spare:
                raise CheckpointError(
                    f"{where[spare[0]][0]}: tensor {spare[0]} has no place in this model "
                    f"({len(spare)} such tensors)"
                )


def _finite(tensor: Tensor) -> bool:
    """Whether every value is a finite number. A sum tells at half of what copying costs; it may overflow where no value
    does, so that each of them counts only then."""
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def _what_is_not_finite(pieces: Sequence[Piece], tensors: Sequence[Tensor], dtype: torch.dtype) -> str:
    for piece, tensor in zip(pieces, tensors, strict=True):
        wrong = ~tensor.isfinite()
        if wrong.any():
            return (
                f"{piece.file}: tensor {piece.key} {list(tensor.shape)}: {int(wrong.sum())} of its "
                f"{tensor.numel()} values are not finite numbers, the first is {tensor[wrong][0]}"
            )
    largest, piece = max(
        zip((t.abs().max().item() for t in tensors), pieces, strict=True), key=lambda p: p[0]
    )
    return f"{piece.file}: tensor {piece.key} has values up to {largest:g}, too large for {dtype}"


def alternatives(name: str) -> list[list[str]]:
    """What a name of `checkpoint_tensors` may stand for, the usual first: ``a.b|c.w`` for a.b.w or a.c.w, and
    ``a.b+c.w`` for two tensors, one behind the other along their first dimension, whatever their sizes."""
    spellings = [""]
    for segment in name.split("."):
        spellings = [f"{before}.{one}" for before in spellings for one in segment.split("|")]
    joint: list[list[str]] = []
    for spelling in spellings:
        keys = [""]
        for segment in spelling[1:].split("."):
            keys = [f"{key}.{one}" for key in keys for one in segment.split("+")]
        joint.append([key[1:] for key in keys])
    return joint


def checkpoint_tensors(model: nn.Module, names: Names) -> Iterator[tuple[str, Tensor]]:
    """Each parameter, or part of one, with its name in the checkpoint (see `alternatives`): ours with the
    family's changes."""
    substitutions = [(re.compile(pattern), replacement) for pattern, replacement in names]
    paths: dict[str, str] = {"": ""}  # path here -> path there, before the substitutions
    seen: set[tuple[str, int]] = set()
    # A module that serves in several places is in the checkpoint under each of its names there.
    for path, module in model.named_modules(remove_duplicate=False):
        above, _, own = path.rpartition(".")
        if path:
            paths[path] = f"{paths[above]}{getattr(module, 'saved_as', own)}."
        is_parted = isinstance(module, Parted)
        found = module.parts() if is_parted else module.named_parameters(recurse=False)
        for name, tensor in found:
            name = paths[above if is_parted else path] + name
            for pattern, replacement in substitutions:
                name = pattern.sub(replacement, name)
            if (name, id(module)) not in seen:
                seen.add((name, id(module)))
                yield name, tensor


def save(folder: Path, model: nn.Module, names: Names, config: Mapping[str, Any], dtype: torch.dtype) -> None:
    """Write config.json and model.safetensors, in the format that `Checkpoint` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for name, part in checkpoint_tensors(model, names):
        keys = alternatives(name)[0]
        pieces = (
            part.detach().to("cpu", dtype).chunk(len(keys))
            if len(keys) > 1
            else [part.detach().to("cpu", dtype)]
        )
        tensors |= {key: piece.contiguous().clone() for key, piece in zip(keys, pieces, strict=True)}
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    config = dict(config)
    if "yaml" in config:
        (folder / "config.yaml").write_text(yaml.safe_dump(config.pop("yaml"), sort_keys=False), "utf-8")
    text = json.dumps({**config, "torch_dtype": str(dtype).removeprefix("torch.")}, indent=2)
    (folder / "config.json").write_text(text + "\n", "utf-8")
