"""``fathom serve``: a Ray instance with everything that a serving file asks for, in the foreground."""

import io
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

from serving.config import ServeConfig
from serving.errors import ServeConfigError

log = logging.getLogger("fathom.serve")

APPLICATION = "fathom"


def serve(config: ServeConfig) -> None:
    """Start, say when ready, and stay until interrupted. Raises ServeConfigError."""
    stop = threading.Event()
    _stop_when_told(stop)
    with running(config, stop) as ready:
        print(ready, flush=True)
        stop.wait()
        print("stopping", flush=True)


def _stop_when_told(stop: threading.Event) -> None:
    for sign in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sign, lambda *_: stop.set())


@contextmanager
def running(config: ServeConfig, stop: threading.Event | None = None) -> Iterator[str]:
    """Everything up and ready inside, down again outside. Gives the line that says so."""
    _check_ports(config)
    _check_models(config)
    if config.ingress == "haproxy":
        os.environ["RAY_SERVE_ENABLE_HA_PROXY"] = "1"
        os.environ["RAY_SERVE_ENABLE_DIRECT_INGRESS"] = "1"
    os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "1")
    # Ray's workers step back behind everything else on a machine; serving is what this one is for.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # An engine's idle threads must not take the processor from the proxy and the gateway.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Between proxy and gateway gRPC costs half of what Ray's object references do: every message is one.
    os.environ.setdefault("RAY_SERVE_PROXY_USE_GRPC", "1")

    import ray
    from ray import serve as ray_serve

    from serving.cluster import app

    owned = not ray.is_initialized()
    if owned:
        ray.init(
            address=config.ray_address,
            include_dashboard=None if config.ray_address else False,
            logging_level=logging.ERROR,
            log_to_driver=False,
            configure_logging=True,
        )
    if stop is not None:
        _stop_when_told(stop)  # Ray has put itself in the place of ours, and would abort
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    try:
        direct = config.ingress == "direct"
        ray_serve.start(
            proxy_location="Disabled" if direct else "EveryNode",
            http_options=ray_serve.HTTPOptions(host="0.0.0.0", port=config.http_port),
            grpc_options={
                "port": config.grpc_port,
                "grpc_servicer_functions": ["serving.gateway.services.add_services"],
                "enable_reflection": True,
            },
            logging_config={"enable_access_log": False, "log_level": "WARNING"},
        )
        names = [spec.name for spec in config.models]
        ports = {"grpc": config.grpc_port, "http": config.http_port} if direct else None
        front = app.gateway({"spec": config.gateway.model_dump(), "models": names, "ports": ports})
        targets = [ray_serve.RunTarget(front, APPLICATION, None if direct else "/")]
        targets += [
            ray_serve.RunTarget(app.model(m.model_dump()), _application(m.name), None) for m in config.models
        ]
        ray_serve.run_many(targets, wait_for_applications_running=False)
        _wait(config, stop)
        yield _ready_line(config)
    finally:
        # Ray reports its own parts that it has just ended.
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            ray_serve.shutdown()
            if owned:
                ray.shutdown()


def _application(model: str) -> str:
    return f"{APPLICATION}-{model}"


def _ready_line(config: ServeConfig) -> str:
    names = ", ".join(spec.name for spec in config.models)
    port = "" if config.grpc_port == 9000 else f" --target localhost:{config.grpc_port}"
    return (
        f"fathom is ready: gRPC localhost:{config.grpc_port}, HTTP http://localhost:{config.http_port}, "
        f"models {names}. "
        f'Try: .venv/bin/fathom generate{port} "def read_json(path):"'
    )


def _check_ports(config: ServeConfig) -> None:
    for name, port in (("grpc_port", config.grpc_port), ("http_port", config.http_port)):
        with socket.socket(
            socket.AF_INET6 if socket.has_ipv6 else socket.AF_INET, socket.SOCK_STREAM
        ) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("::" if socket.has_ipv6 else "0.0.0.0", port))
            except OSError as error:
                flag = "--" + name.replace("_", "-")
                raise ServeConfigError(
                    f"{name} = {port}: in use or not allowed ({error.strerror}); choose with {flag}"
                ) from None


def _check_models(config: ServeConfig) -> None:
    """What is wrong with a checkpoint is best said before anything is started."""
    if config.ray_address is not None:
        return  # the replicas may see other files than this process
    from models.checkpoint import Checkpoint
    from models.registry import build, names

    for spec in config.models:
        checkpoint = Checkpoint(spec.path)
        raw, file = checkpoint.read(), checkpoint.config_file
        _, model = build(raw, file)
        checkpoint.check(model, names(raw, file))


def _wait(config: ServeConfig, stop: threading.Event | None) -> None:
    """Until every application runs. Raises ServeConfigError with what keeps one from it."""
    from ray import serve as ray_serve

    names = [APPLICATION, *(_application(spec.name) for spec in config.models)]
    deadline = time.monotonic() + config.startup_timeout_s
    while True:
        states = ray_serve.status().applications
        waiting = [name for name in names if name not in states or states[name].status != "RUNNING"]
        if not waiting and _all_registered(config):
            return
        for name in waiting:
            if name in states and states[name].status in ("DEPLOY_FAILED", "UNHEALTHY"):
                raise ServeConfigError(f"{name} does not start: {_reason(states[name])}")
        if time.monotonic() > deadline:
            reasons = "; ".join(
                f"{n}: {_reason(states[n]) if n in states else 'not deployed'}" for n in waiting
            )
            raise ServeConfigError(
                f"not ready after startup_timeout_s = {config.startup_timeout_s:g}: {reasons}"
            )
        if stop is not None and stop.wait(0.1):
            raise KeyboardInterrupt
        time.sleep(0 if stop is not None else 0.1)


def _reason(state: object) -> str:
    deployments = getattr(state, "deployments", {})
    messages = [getattr(state, "message", ""), *(d.message for d in deployments.values())]
    return " ".join(m for m in messages if m) or str(getattr(state, "status", "unknown"))


def _all_registered(config: ServeConfig) -> bool:
    """Whether the gateway knows a replica of every model: it learns of them a moment after Ray Serve does."""
    import urllib.request
    from urllib.error import URLError

    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{config.http_port}/healthz", timeout=2) as answer:
            return bool(answer.status == 200)
    except (URLError, OSError):
        return False
