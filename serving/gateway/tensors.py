"""Tensors of the Open Inference Protocol: raw bytes or typed contents in, raw bytes out."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from protos.inference import grpc_service_pb2 as wire
from serving.errors import InvalidArgumentError

MAX_RANK = 8
NUMBERS = {
    "BOOL": "?", "INT8": "<i1", "INT16": "<i2", "INT32": "<i4", "INT64": "<i8", "UINT8": "<u1", "UINT16": "<u2",
    "UINT32": "<u4", "UINT64": "<u8", "FP32": "<f4", "FP64": "<f8",
}  # fmt: skip
CONTENTS = {
    "BOOL": "bool_contents", "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents",
    "INT64": "int64_contents", "UINT8": "uint_contents", "UINT16": "uint_contents", "UINT32": "uint_contents",
    "UINT64": "uint64_contents", "FP32": "fp32_contents", "FP64": "fp64_contents", "BYTES": "bytes_contents",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Tensor:
    """Its elements in row order: bool, int, float or bytes."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    values: list[Any]


def read_inputs(request: wire.ModelInferRequest) -> dict[str, Tensor]:
    """The input tensors by name. Raises InvalidArgumentError, naming the tensor."""
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        limit = f"must be one for each of {len(request.inputs)} inputs, or none"
        raise InvalidArgumentError("raw_input_contents", f"{len(raw)} entries", limit)
    tensors: dict[str, Tensor] = {}
    for number, given in enumerate(request.inputs):
        if given.name in tensors:
            raise InvalidArgumentError("inputs", given.name, "is there twice")
        for parameter in given.parameters:
            raise InvalidArgumentError(f"inputs[{given.name}].parameters", parameter, "is not supported")
        tensors[given.name] = _read(given, raw[number] if raw else None)
    return tensors


def _read(given: wire.ModelInferRequest.InferInputTensor, raw: bytes | None) -> Tensor:
    where = f"inputs[{given.name}]"
    if given.datatype not in CONTENTS:
        raise InvalidArgumentError(
            f"{where}.datatype", given.datatype, f"must be one of {', '.join(CONTENTS)}"
        )
    shape = tuple(given.shape)
    if len(shape) > MAX_RANK or any(size < 0 for size in shape):
        raise InvalidArgumentError(
            f"{where}.shape", list(shape), f"must have at most {MAX_RANK} sizes from 0"
        )
    values = _contents(given, where) if raw is None else _from_raw(raw, given.datatype, where)
    if len(values) != prod(shape):
        limit = f"has {prod(shape)} elements, its contents have {len(values)}"
        raise InvalidArgumentError(f"{where}.shape", list(shape), limit)
    return Tensor(given.name, given.datatype, shape, values)


def _contents(given: wire.ModelInferRequest.InferInputTensor, where: str) -> list[Any]:
    for field, _ in given.contents.ListFields():
        if field.name != CONTENTS[given.datatype]:
            limit = f"elements of {given.datatype} go to {CONTENTS[given.datatype]}"
            raise InvalidArgumentError(f"{where}.contents", field.name, limit)
    return list(getattr(given.contents, CONTENTS[given.datatype]))


def _from_raw(raw: bytes, datatype: str, where: str) -> list[Any]:
    if datatype == "BYTES":
        return _strings(raw, where)
    dtype = np.dtype(NUMBERS[datatype])
    if len(raw) % dtype.itemsize:
        limit = f"must be a multiple of {dtype.itemsize} bytes"
        raise InvalidArgumentError(f"{where} in raw_input_contents", f"{len(raw)} bytes", limit)
    return np.frombuffer(raw, dtype).tolist()


def _strings(raw: bytes, where: str) -> list[bytes]:
    """Each element is a little-endian uint32 with its length, then its bytes."""
    values, at = [], 0
    while at < len(raw):
        start = at + 4
        at = start + struct.unpack_from("<I", raw, at)[0] if start <= len(raw) else start
        if at > len(raw):
            limit = "end within an element"
            raise InvalidArgumentError(f"{where} in raw_input_contents", f"{len(raw)} bytes", limit)
        values.append(raw[start:at])
    return values


def add_output(response: wire.ModelInferResponse, name: str, datatype: str, values: Sequence[Any]) -> None:
    """Append a tensor of one dimension."""
    response.outputs.add(name=name, datatype=datatype, shape=[len(values)])
    if datatype == "BYTES":
        texts = (value.encode() for value in values)
        response.raw_output_contents.append(b"".join(struct.pack("<I", len(text)) + text for text in texts))
    else:
        response.raw_output_contents.append(np.asarray(values, np.dtype(NUMBERS[datatype])).tobytes())
