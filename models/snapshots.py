"""States of sequences as bytes: safetensors with a fingerprint and a checksum, refused unless both are right."""

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.numpy import save as save_arrays
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from models.errors import ModelError
from models.state import Snapshot

FORMAT = "fathom-state-2"
UNKNOWN = "?" * 64
"""Where the checksum will be, while it is taken of the file."""


class DamagedSnapshotError(ModelError):
    """Bytes that are not, or no longer, a snapshot."""


class ForeignSnapshotError(ModelError):
    """A snapshot of another model, dtype or version."""


def to_bytes(snapshots: Sequence[Snapshot], fingerprint: str, about: Mapping[str, Any]) -> bytes:
    """Snapshots of one sequence, one for each slot that it held, each with all of what grows, on the CPU. `about`: JSON
    values that `from_bytes` gives back."""
    tensors: dict[str, Tensor] = {}
    for i, snapshot in enumerate(snapshots):
        tensors[f"{i}.row"] = snapshot.row
        for (layer, leaf, instance), entries in snapshot.entries.items():
            tensors[f"{i}.{layer}.{leaf}.{instance}"] = entries
    # Of one row in memory there may be several views; a file holds each tensor once.
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    counts = [[[*key, count] for key, count in s.counts.items()] for s in snapshots]
    metadata = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "slots": str(len(snapshots)),
        "counts": json.dumps(counts),
        "about": json.dumps(about),
        "checksum": UNKNOWN,
    }
    data = _saved(tensors, metadata)
    return _with_checksum(data, UNKNOWN, hashlib.sha256(data).hexdigest())


def from_bytes(data: bytes, fingerprint: str) -> tuple[list[Snapshot], dict[str, Any]]:
    """Raises DamagedSnapshotError, or ForeignSnapshotError where the fingerprint or the format is another."""
    metadata = _metadata(data)
    if metadata.get("format") != FORMAT:
        raise ForeignSnapshotError(f"snapshot: its format is {metadata.get('format')!r}, this is {FORMAT}")
    checksum = metadata.get("checksum", "")
    if checksum != hashlib.sha256(_with_checksum(data, checksum, UNKNOWN)).hexdigest():
        raise DamagedSnapshotError("snapshot: its checksum is wrong")
    try:
        tensors = load_tensors(data)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise DamagedSnapshotError(f"snapshot: {error}") from None
    if metadata["fingerprint"] != fingerprint:
        raise ForeignSnapshotError(
            "snapshot: it is of another model, or of this one in another dtype or version"
        )
    snapshots = []
    for i, counts in enumerate(json.loads(metadata["counts"])):
        own = {k.removeprefix(f"{i}."): v for k, v in tensors.items() if k.startswith(f"{i}.")}
        snapshot = Snapshot(own.pop("row"))
        for name, entries in own.items():
            layer, leaf, instance = name.split(".")
            snapshot.entries[int(layer), leaf, int(instance)] = entries
        snapshot.counts = {(group, instance): count for group, instance, count in counts}
        snapshot.first = dict.fromkeys(snapshot.counts, 0)
        snapshots.append(snapshot)
    return snapshots, json.loads(metadata["about"])


def _metadata(data: bytes) -> dict[str, str]:
    """What the header says of itself, before anything of it is believed."""
    try:
        (length,) = struct.unpack_from("<Q", data)
        if 8 + length > len(data):
            raise ValueError("the header is longer than the file")
        metadata: dict[str, str] = json.loads(data[8 : 8 + length])["__metadata__"]
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("metadata must be text")
        return metadata
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedSnapshotError(f"snapshot: not a safetensors file of ours ({error})") from None


def _saved(tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> bytes:
    """As safetensors; through numpy, which takes a third of the time, where it has the types."""
    if any(tensor.dtype is torch.bfloat16 for tensor in tensors.values()):
        return save_tensors(dict(tensors), metadata)
    return save_arrays({name: tensor.numpy() for name, tensor in tensors.items()}, metadata)


def _with_checksum(data: bytes, old: str, new: str) -> bytes:
    """The same file with another checksum."""
    before, after = (f'"checksum":"{text}"'.encode("utf-8", "replace") for text in (old, new))
    return data.replace(before, after, 1)
