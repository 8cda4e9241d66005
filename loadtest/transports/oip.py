"""Open Inference Protocol v2: ModelStreamInfer, as NVIDIA's Triton streams, or ModelInfer, which gives all at
once.

The protocol says nothing of text generation. The names of tensors are those of Triton's language model
backends: `text_input`, `stream`, `sampling_parameters` (JSON) or `max_tokens`, and `text_output`. The model's
metadata says which of them it takes; settings that it has no tensor for travel as request parameters.
"""

import json
import struct
from collections.abc import Mapping
from math import prod

from loadtest.config import Server
from loadtest.core import Done, Handle, Model, Request, Sample
from loadtest.errors import FlagError, TargetError
from loadtest.transports.channel import Call, Channel
from protos.inference import grpc_service_pb2 as wire

_SERVICE = "/inference.GRPCInferenceService/"
_TOKEN_OUTPUTS = ("token_ids", "output_ids")
_Value = bool | int | float | str


class OipTransport:
    def __init__(self, server: Server):
        self._server = server
        self.streams = server.transport == "oip"
        self._channel = Channel(server)
        self._name = server.model
        self._inputs: dict[str, wire.ModelMetadataResponse.TensorMetadata] = {}
        # Triton then ends a failed stream with a gRPC status instead of an error in a message.
        self._headers = self._channel.headers(
            _SERVICE + ("ModelStreamInfer" if self.streams else "ModelInfer"), [("triton_grpc_error", "true")]
        )

    async def connect(self) -> Model:
        await self._channel.connect()
        self._name = self._server.model or await self._only_model()
        request = wire.ModelMetadataRequest(name=self._name)
        status, detail, message = await self._channel.unary(
            _SERVICE + "ModelMetadata", request.SerializeToString()
        )
        if status in ("NOT_FOUND", "INVALID_ARGUMENT"):
            raise FlagError("--model", self._name, detail or "the server does not know it")
        if status not in ("OK", "UNIMPLEMENTED"):
            raise TargetError(f"--target {self._server.target}: metadata of {self._name}: {status}: {detail}")
        metadata = wire.ModelMetadataResponse.FromString(message)
        self._inputs = {tensor.name: tensor for tensor in metadata.inputs}
        if self._inputs and "text_input" not in self._inputs:
            raise FlagError("--model", self._name, f"takes {', '.join(self._inputs)}, but no text_input")
        return Model(name=self._name, family=metadata.platform)

    async def _only_model(self) -> str:
        request = wire.RepositoryIndexRequest(ready=True)
        status, detail, message = await self._channel.unary(
            _SERVICE + "RepositoryIndex", request.SerializeToString()
        )
        if status == "UNIMPLEMENTED":
            raise FlagError("--model", None, "is required: the server does not list its models")
        if status != "OK":
            raise TargetError(f"--target {self._server.target}: listing its models: {status}: {detail}")
        names = sorted({model.name for model in wire.RepositoryIndexResponse.FromString(message).models})
        if len(names) != 1:
            raise FlagError("--model", None, f"must be one of {', '.join(names) or '(none is served)'}")
        return names[0]

    def encode(self, request: Request) -> bytes:
        message = wire.ModelInferRequest(model_name=self._name, id=request.request_id)
        self._add(message, "text_input", request.text)
        settings = _settings(request)
        if "sampling_parameters" in self._inputs:
            self._add(message, "sampling_parameters", json.dumps(settings))
            settings = {}
        if not self._inputs or "stream" in self._inputs:
            self._add(message, "stream", self.streams)
        if "exclude_input_in_output" in self._inputs:
            self._add(message, "exclude_input_in_output", True)
        for name, value in settings.items():
            if name in self._inputs:
                self._add(message, name, value)
            else:
                _set_parameter(message.parameters[name], value)
        return message.SerializeToString()

    def _add(self, message: wire.ModelInferRequest, name: str, value: _Value) -> None:
        """A tensor with one element, in the type and rank that the metadata asks for."""
        metadata = self._inputs.get(name)
        datatype = metadata.datatype if metadata else _datatype(value)
        shape = [max(1, size) for size in metadata.shape] if metadata and metadata.shape else [1]
        message.inputs.add(name=name, datatype=datatype, shape=shape)
        message.raw_input_contents.append(_raw(value, datatype))

    def send(self, encoded: bytes, sample: Sample, done: Done) -> Handle:
        call = _StreamInfer(sample, done) if self.streams else _Infer(sample, done)
        self._channel.call(call, self._headers, encoded)
        return call

    async def close(self) -> None:
        await self._channel.close()


class _StreamInfer(Call):
    __slots__ = ("done", "error", "sample")

    def __init__(self, sample: Sample, done: Done):
        super().__init__()
        self.sample = sample
        self.done = done
        self.error = ""

    def on_message(self, now: float, message: bytes) -> None:
        response = wire.ModelStreamInferResponse.FromString(message)
        self.error = self.error or response.error_message
        text, count = _output(response.infer_response)
        if count:
            self.sample.arrived(now, count)
        if self.sample.keep:
            self.sample.text += text

    def on_end(self, now: float, status: str, detail: str) -> None:
        if self.error and status == "OK":
            status, detail = "UNKNOWN", self.error
        self.sample.finish(now, status, detail)
        self.done(self.sample)


class _Infer(_StreamInfer):
    __slots__ = ()

    def on_message(self, now: float, message: bytes) -> None:
        text, count = _output(wire.ModelInferResponse.FromString(message))
        if count:
            # Text without ids: as many tokens as were asked for, which --ignore-eos makes sure of.
            self.sample.arrived(now, count if count > 1 else self.sample.asked)
        if self.sample.keep:
            self.sample.text += text


def _output(response: wire.ModelInferResponse) -> tuple[str, int]:
    """Text, and tokens: counted where their ids are among the outputs, else one for any text."""
    text, count = "", 0
    for i, tensor in enumerate(response.outputs):
        if tensor.name in _TOKEN_OUTPUTS:
            count = prod(tensor.shape)
        elif tensor.name == "text_output":
            raw = response.raw_output_contents
            parts = _strings(raw[i]) if i < len(raw) else list(tensor.contents.bytes_contents)
            text = b"".join(parts).decode(errors="replace")
    return text, count or (1 if text else 0)


def _strings(raw: bytes) -> list[bytes]:
    """Elements of a BYTES tensor: each a little-endian uint32 with its length, then its bytes."""
    parts, position = [], 0
    while position + 4 <= len(raw):
        (length,) = struct.unpack_from("<I", raw, position)
        parts.append(raw[position + 4 : position + 4 + length])
        position += 4 + length
    return parts


def _settings(request: Request) -> Mapping[str, _Value]:
    sampling = request.sampling
    settings: dict[str, _Value | None] = {
        "max_tokens": request.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "seed": request.seed,
        "ignore_eos": True if sampling.ignore_eos else None,
    }
    return {name: value for name, value in settings.items() if value is not None}


def _datatype(value: _Value) -> str:
    return {bool: "BOOL", int: "INT32", float: "FP32", str: "BYTES"}[type(value)]


_FORMATS = {
    "BOOL": "<?", "INT8": "<b", "INT16": "<h", "INT32": "<i", "INT64": "<q", "UINT8": "<B", "UINT16": "<H",
    "UINT32": "<I", "UINT64": "<Q", "FP32": "<f", "FP64": "<d",
}  # fmt: skip


def _raw(value: _Value, datatype: str) -> bytes:
    if datatype == "BYTES":
        text = str(value).encode()
        return struct.pack("<I", len(text)) + text
    if datatype.startswith("FP"):
        return struct.pack(_FORMATS[datatype], float(value))
    return struct.pack(_FORMATS[datatype], int(value))


def _set_parameter(parameter: wire.InferParameter, value: _Value) -> None:
    if isinstance(value, bool):
        parameter.bool_param = value
    elif isinstance(value, int):
        parameter.int64_param = value
    elif isinstance(value, float):
        parameter.double_param = value
    else:
        parameter.string_param = value
