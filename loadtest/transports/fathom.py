"""fathom.v1: Generate, streamed."""

from loadtest.config import Server
from loadtest.core import Depth, Done, Handle, Model, Request, Sample
from loadtest.errors import FlagError, TargetError
from loadtest.transports.channel import Call, Channel
from protos.fathom.v1 import inference_pb2, models_pb2

_GENERATE = "/fathom.v1.Inference/Generate"
_LIST = "/fathom.v1.Models/List"
_parse = inference_pb2.GenerateResponse.FromString


class FathomTransport:
    streams = True

    def __init__(self, server: Server):
        self._server = server
        self._channel = Channel(server)
        self._headers = self._channel.headers(_GENERATE)

    async def connect(self) -> Model:
        await self._channel.connect()
        status, detail, message = await self._channel.unary(
            _LIST, models_pb2.ListModelsRequest().SerializeToString()
        )
        wanted = self._server.model
        if status == "UNIMPLEMENTED":
            return Model(name=wanted)  # the model's limits stay unknown; Generate will say whether it exists
        if status != "OK":
            raise TargetError(f"--target {self._server.target}: listing its models: {status}: {detail}")
        models = {model.name: model for model in models_pb2.ListModelsResponse.FromString(message).models}
        if wanted and wanted not in models:
            raise FlagError(
                "--model", wanted, f"must be one of {', '.join(sorted(models)) or '(none is served)'}"
            )
        if not wanted and len(models) != 1:
            raise FlagError(
                "--model", None, f"must be one of {', '.join(sorted(models)) or '(none is served)'}"
            )
        return _model(models[wanted] if wanted else next(iter(models.values())))

    def encode(self, request: Request) -> bytes:
        message = inference_pb2.GenerateRequest(
            model=self._server.model,
            timeout_s=self._server.timeout,
            request_id=request.request_id,
            session_id=request.session_id,
            priority=request.priority,
        )
        if request.tokens is None:
            message.text = request.text
        else:
            message.tokens.ids.extend(request.tokens)
        sampling, asked = message.sampling, request.sampling
        sampling.max_tokens = request.max_tokens
        sampling.ignore_eos = asked.ignore_eos
        sampling.seed = request.seed
        if asked.temperature is not None:
            sampling.temperature = asked.temperature
        if asked.top_p is not None:
            sampling.top_p = asked.top_p
        if asked.top_k is not None:
            sampling.top_k = asked.top_k
        if request.depth is not None:
            message.depth.CopyFrom(depth_policy(request.depth))
        return message.SerializeToString()

    def send(self, encoded: bytes, sample: Sample, done: Done) -> Handle:
        call = _Generate(sample, done)
        self._channel.call(call, self._headers, encoded)
        return call

    async def close(self) -> None:
        await self._channel.close()


class _Generate(Call):
    __slots__ = ("done", "sample")

    def __init__(self, sample: Sample, done: Done):
        super().__init__()
        self.sample = sample
        self.done = done

    def on_message(self, now: float, message: bytes) -> None:
        response = _parse(message)
        sample = self.sample
        # Text without ids comes from servers that hide them: one token then, for want of knowledge.
        count = len(response.token_ids) or (1 if response.text else 0)
        if count:
            sample.arrived(now, count)
        if sample.keep:
            sample.text += response.text
            sample.tokens.extend(response.token_ids)
        if response.HasField("usage"):
            usage = response.usage
            sample.prompt_tokens = usage.prompt_tokens or sample.prompt_tokens
            sample.cached_tokens = usage.cached_tokens
            if usage.mean_depth:
                sample.mean_depth, sample.flops_saved = usage.mean_depth, usage.flops_saved

    def on_end(self, now: float, status: str, detail: str) -> None:
        self.sample.finish(now, status, detail)
        self.done(self.sample)


def depth_policy(depth: Depth) -> inference_pb2.DepthPolicy:
    wire = inference_pb2.DepthPolicy()
    if depth.policy == "fixed":
        wire.fixed = depth.depth
    elif depth.policy == "chain":
        wire.chain.layers.extend(depth.layers)
    elif depth.policy in ("gate", "confidence", "converged"):
        criterion = getattr(wire, depth.policy)
        criterion.SetInParent()
        if depth.measure:
            criterion.measure = inference_pb2.DepthPolicy.Measure.Value(depth.measure.upper())
        if depth.threshold is not None:
            criterion.threshold = depth.threshold
    else:
        getattr(wire, depth.policy).SetInParent()
    if depth.min_depth is not None:
        wire.min_depth = depth.min_depth
    if depth.max_depth is not None:
        wire.max_depth = depth.max_depth
    return wire


def _model(wire: models_pb2.Model) -> Model:
    return Model(
        name=wire.name,
        family=wire.family,
        parameters=wire.parameters,
        vocab_size=wire.vocab_size,
        max_tokens=wire.max_tokens,
        eos_token_ids=tuple(wire.eos_token_ids),
        has_tokenizer=wire.has_tokenizer,
        depth_policies=tuple(wire.depth_policies),
        max_depth=wire.max_depth,
        slots=wire.slots,
        replicas=wire.replicas,
        fingerprint=wire.fingerprint,
    )
