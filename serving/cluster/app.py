"""The two Ray Serve deployments, and the builders that a serving configuration names.

    import_path: serving.cluster.app:gateway     args: GatewayArgs
    import_path: serving.cluster.app:model       args: ModelSpec

Each model is an application of its own, without a route; the gateway is the one with a route. They find each other
through the directory, so any of them can come, go and be upgraded alone.
"""

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, suppress
from typing import Any

import ray
from fastapi import FastAPI
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from ray import serve
from ray.serve import Application

from serving.cluster import autoscaling
from serving.cluster.death import process_of
from serving.cluster.directory import BEAT_S, directory
from serving.cluster.link import Entry
from serving.config import GatewaySpec, ModelSpec, Port, Strict, validated
from serving.gateway.services import Call, services

log = logging.getLogger("fathom.cluster")

QUIET: dict[str, Any] = {"logging_config": {"enable_access_log": False}}

DRAIN_S = 10.0
"""That a replica has at its end to hand over its sequences."""

Grpc = Any  # the context that Ray Serve hands to a gRPC method


class Ports(Strict):
    """Of a gateway that clients come to directly."""

    grpc: Port
    http: Port


class GatewayArgs(Strict):
    spec: GatewaySpec = GatewaySpec()
    models: tuple[str, ...] = ()  # that the gateway is to know of before they are loaded
    ports: Ports | None = None  # its own; without them Ray Serve's ingress is in front


class EngineDeployment:
    """One replica of one model."""

    async def __init__(self, spec: ModelSpec):  # type: ignore[misc]  # Ray awaits it
        from serving.cluster.replica import EngineReplica  # torch is for the engines only

        name = serve.get_replica_context().replica_id.unique_id
        self._replica = await asyncio.to_thread(EngineReplica, spec, name, asyncio.get_running_loop())
        address = await self._replica.start(ray.util.get_node_ip_address())
        self._entry = Entry(name, spec.name, address, self._replica.token, process_of(os.getpid()))
        self._directory = directory()
        self._beating = asyncio.create_task(self._beat())

    async def _beat(self) -> None:
        while True:
            with suppress(Exception):  # the directory is being restarted: the next beat registers
                await self._directory.beat.remote(self._entry)
            await asyncio.sleep(BEAT_S)

    async def check_health(self) -> None:
        if not self._replica.healthy:
            raise RuntimeError("several steps in a row have failed")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Ray Serve, where this deployment is autoscaled."""
        load = self._replica._load()
        return {
            autoscaling.SLOTS: load.slots,
            autoscaling.RUNNING: load.running,
            autoscaling.WAITING: load.waiting,
        }

    async def __del__(self) -> None:
        self._beating.cancel()
        with suppress(Exception):
            await self._directory.leave.remote(self._entry.replica)
        await self._replica.drain(DRAIN_S)
        await self._replica.stop()


class GatewayDeployment:
    """Translates between the wire and the engines."""

    def __init__(self, args: GatewayArgs):
        from serving.gateway.fleet import Fleet
        from serving.gateway.metrics import GatewayMetrics
        from serving.gateway.requests import Requests
        from serving.gateway.rpc import Rpc
        from serving.observers import Observers

        self._fleet = Fleet(args.models)
        watch = directory().watch
        self._fleet.watch(lambda version, timeout_s: watch.remote(version, timeout_s))
        self._metrics = GatewayMetrics(serve.get_replica_context().replica_id.unique_id)
        self._spec = args.spec
        self._observers = Observers(args.spec)
        self._requests = Requests(self._fleet, args.spec, self._observers.listeners)
        self._requests.sessions.keep_tidy()
        self.rpc = Rpc(self._requests, self._fleet, args.spec, self._metrics)

    def _app(self) -> FastAPI:
        from serving.gateway.http import make_app

        return make_app(self._requests, self._fleet, self._spec, self._metrics)

    async def __del__(self) -> None:
        self._requests.sessions.close()
        await self._fleet.close()
        await asyncio.to_thread(self._observers.close)


class DirectGateway(GatewayDeployment):
    """A gateway with ports of its own."""

    async def __init__(self, args: GatewayArgs):  # type: ignore[misc]  # Ray awaits it
        from serving.gateway.doors import GrpcDoor, HttpDoor, any_address

        super().__init__(args)
        assert args.ports is not None
        grpc_door, http_door = GrpcDoor(self.rpc, args.spec), HttpDoor(self._app(), args.spec)
        self._doors = grpc_door, http_door
        await grpc_door.open(any_address(), args.ports.grpc)
        await http_door.open(any_address(), args.ports.http)

    async def __del__(self) -> None:
        await asyncio.gather(*(door.close(DRAIN_S) for door in self._doors))
        await super().__del__()


class ProxiedGateway(GatewayDeployment):
    """A gateway behind Ray Serve's ingress, which calls the method of an RPC's name."""

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._app()


def _answer(service: str, method: MethodDescriptor) -> Callable[..., Any]:
    """The deployment's method for an RPC."""

    async def unary(self: ProxiedGateway, call: Call, grpc_context: Grpc) -> Message:
        return await self.rpc.unary(call, grpc_context)

    async def stream(self: ProxiedGateway, call: Call, grpc_context: Grpc) -> AsyncGenerator[Message]:
        async with aclosing(self.rpc.stream(call, grpc_context)) as answers:
            async for answer in answers:
                yield answer

    async def exchange(
        self: ProxiedGateway, calls: AsyncIterator[Call], grpc_context: Grpc
    ) -> AsyncGenerator[Message]:
        async with aclosing(self.rpc.exchange(service, method.name, calls, grpc_context)) as answers:
            async for answer in answers:
                yield answer

    return exchange if method.client_streaming else stream if method.server_streaming else unary


for _service in services():
    for _method in _service.methods:
        setattr(ProxiedGateway, _method.name, _answer(_service.full_name, _method))


def gateway(args: dict[str, Any]) -> Application:
    """The application with the route "/". Raises ServeConfigError."""
    checked = validated(GatewayArgs, args, "gateway")
    kind = DirectGateway if checked.ports else serve.ingress()(ProxiedGateway)
    options: dict[str, Any] = {
        "num_replicas": checked.spec.replicas,
        "max_ongoing_requests": checked.spec.max_streams,
        "max_queued_requests": checked.spec.max_queued or checked.spec.max_streams,
        "ray_actor_options": {"num_cpus": checked.spec.cpus},
    }
    return serve.deployment(name="gateway", **QUIET, **options)(kind).bind(checked)


def model(args: dict[str, Any]) -> Application:
    """The application of one model. Raises ServeConfigError."""
    spec = validated(ModelSpec, args, "model")
    options: dict[str, Any] = {
        "ray_actor_options": {"num_cpus": spec.cpus, "num_gpus": gpus(spec)},
        "max_surge_percent": 25,  # of an upgrade: the new replica is up before an old one goes
        "health_check_period_s": 2,
        "health_check_timeout_s": 10,
        "graceful_shutdown_timeout_s": 20,
    }
    if spec.autoscaling is None:
        options["num_replicas"] = spec.replicas
    else:
        options["autoscaling_config"] = autoscaling.options(spec.autoscaling)
    return serve.deployment(name="engine", **QUIET, **options)(EngineDeployment).bind(spec)


def gpus(spec: ModelSpec) -> float:
    """GPUs that one replica sets aside: one where the model will run on a GPU."""
    if spec.gpus is not None:
        return spec.gpus
    if spec.device != "auto":
        return 0.0 if spec.device == "cpu" else 1.0
    return 1.0 if ray.is_initialized() and ray.cluster_resources().get("GPU", 0) >= 1 else 0.0
