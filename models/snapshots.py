"""States of sequences as bytes: safetensors with a fingerprint and a checksum, refused unless both are right."""

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from models.errors import ModelError
from models.state import Snapshot

FORMAT = "fathom-state-1"


class DamagedSnapshotError(ModelError):
    """Bytes that are not, or no longer, a snapshot."""


class ForeignSnapshotError(ModelError):
    """A snapshot of another model, dtype or version."""


def to_bytes(snapshots: Sequence[Snapshot], fingerprint: str, about: Mapping[str, Any]) -> bytes:
    """Snapshots of one sequence, one for each slot that it held, each with all of what grows. `about`: JSON values
    that `from_bytes` gives back."""
    tensors: dict[str, Tensor] = {}
    for i, snapshot in enumerate(snapshots):
        tensors[f"{i}.row"] = snapshot.row
        for (layer, leaf, instance), entries in snapshot.entries.items():
            tensors[f"{i}.{layer}.{leaf}.{instance}"] = entries
    # Of one row in memory there may be several views; a file holds each tensor once.
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    counts = [[[*key, count] for key, count in s.counts.items()] for s in snapshots]
    metadata = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "slots": str(len(snapshots)),
        "counts": json.dumps(counts),
        "about": json.dumps(about),
    }
    metadata["checksum"] = _checksum(*_parts(save_tensors(tensors, metadata)))
    return save_tensors(tensors, metadata)


def from_bytes(data: bytes, fingerprint: str) -> tuple[list[Snapshot], dict[str, Any]]:
    """Raises DamagedSnapshotError, or ForeignSnapshotError where the fingerprint or the format is another."""
    header, body = _parts(data)
    metadata = header["__metadata__"]
    if metadata.get("format") != FORMAT:
        raise ForeignSnapshotError(f"snapshot: its format is {metadata.get('format')!r}, this is {FORMAT}")
    if metadata.pop("checksum", "") != _checksum(header, body):
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


def _parts(data: bytes) -> tuple[dict[str, Any], memoryview]:
    """The header and the body of a safetensors file, before anything of it is believed."""
    try:
        (length,) = struct.unpack_from("<Q", data)
        if 8 + length > len(data):
            raise ValueError("the header is longer than the file")
        header = json.loads(data[8 : 8 + length])
        if not all(isinstance(value, str) for value in header["__metadata__"].values()):
            raise ValueError("metadata must be text")
        return header, memoryview(data)[8 + length :]
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedSnapshotError(f"snapshot: not a safetensors file of ours ({error})") from None


def _checksum(header: Mapping[str, Any], body: memoryview) -> str:
    digest = hashlib.blake2b(body, digest_size=16)
    digest.update(json.dumps(header, sort_keys=True).encode())
    return digest.hexdigest()
