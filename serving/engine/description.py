"""What a replica tells about the model that it serves."""

import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class Description:
    name: str
    family: str
    parameters: int
    vocab_size: int
    dtype: str
    device: str
    layers: int
    max_tokens: int  # longest sequence, prompt and continuation together
    eos_token_ids: tuple[int, ...]
    state_bytes_per_sequence: int
    state_bytes_per_token: int  # that a sequence grows by; 0 where all state is constant
    flops_per_token: int
    fingerprint: str
    slots: int
    max_depth: int = 1
    depth_policies: tuple[str, ...] = ("full",)
    depths: tuple[int, ...] = (1,)  # at which a token may leave; the last is the full one

    @property
    def identity(self) -> str:
        return identity(self.fingerprint, self.dtype)

    def to_json(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @staticmethod
    def from_json(data: bytes) -> "Description":
        fields = json.loads(data)
        for name in ("eos_token_ids", "depth_policies", "depths"):
            fields[name] = tuple(fields[name])
        return Description(**fields)


def identity(fingerprint: str, dtype: str) -> str:
    """What a model has to agree in for a kept state to be its own."""
    return f"{fingerprint}/{dtype}"
