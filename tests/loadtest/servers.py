"""A real grpc.aio server for the harness to talk to."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc

from protos.fathom.v1 import inference_pb2, inference_pb2_grpc, models_pb2, models_pb2_grpc


class Inference(inference_pb2_grpc.InferenceServicer):
    """Gives the tokens 1, 2 ... of a prompt; what else it does, the prompt's text says."""

    def __init__(self) -> None:
        self.requests: list[inference_pb2.GenerateRequest] = []
        self.metadata: list[dict[str, Any]] = []
        self.cancelled = asyncio.Event()

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        if request.text == "fail":
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full: 100 % of it")
        if request.text == "hang":
            try:
                await asyncio.Event().wait()
            finally:
                self.cancelled.set()
        for i in range(request.sampling.max_tokens):
            yield inference_pb2.GenerateResponse(
                token_ids=[i + 1], text="y" * 100_000 if request.text == "big" else "y"
            )
            if request.text == "break" and i == 1:
                await context.abort(grpc.StatusCode.INTERNAL, "broke in mid-stream")
        usage = inference_pb2.Usage(
            prompt_tokens=len(request.tokens.ids) or 1, cached_tokens=1, mean_depth=1.5
        )
        yield inference_pb2.GenerateResponse(finish_reason=inference_pb2.LENGTH, usage=usage)


class Models(models_pb2_grpc.ModelsServicer):
    def __init__(self, *models: models_pb2.Model):
        self.models = models

    async def List(self, request: Any, context: Any) -> Any:  # noqa: N802
        return models_pb2.ListModelsResponse(models=self.models)


TINY = models_pb2.Model(name="tiny", vocab_size=100, max_tokens=1000, has_tokenizer=True, eos_token_ids=[0])


@asynccontextmanager
async def running(
    *models: models_pb2.Model,
    port: int = 0,
    credentials: grpc.ServerCredentials | None = None,
    **options: int,
) -> AsyncIterator[tuple[Inference, str]]:
    """The servicer, and the server's address."""
    server = grpc.aio.server(options=[(f"grpc.{name}", value) for name, value in options.items()])
    inference = Inference()
    inference_pb2_grpc.add_InferenceServicer_to_server(inference, server)
    if models:
        models_pb2_grpc.add_ModelsServicer_to_server(Models(*models), server)
    address = f"localhost:{port}"
    chosen = (
        server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    )
    await server.start()
    try:
        yield inference, f"localhost:{chosen}"
    finally:
        await server.stop(None)
