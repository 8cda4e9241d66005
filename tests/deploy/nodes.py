"""Several Ray nodes on one machine, each as alone as a pod: with an address, processes and temporary files of its own.

Needs root and iproute2. Each node runs what KubeRay makes of the RayService: `ray start` with its parameters and its
environment, and the token that KubeRay would make up."""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.manifests import ROOT, Object

SUBNET = "10.213.77"
BRIDGE = "fathom0"


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def require() -> None:
    """Skip where nodes cannot be made."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    try:
        _ip("netns", "add", "fathom-probe")
        _ip("netns", "del", "fathom-probe")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.strip()}")


@dataclass
class Node:
    """One namespace, and the Ray node in it."""

    number: int
    environment: dict[str, str]
    temporary: Path  # Ray's folder on every node; what is in it is each node's own
    process: "subprocess.Popen[bytes] | None" = None

    @property
    def namespace(self) -> str:
        return f"fathom-{self.number}"

    @property
    def address(self) -> str:
        return f"{SUBNET}.{self.number + 1}"

    def make(self) -> None:
        """The namespace, and a cable from it to the bridge."""
        outer, inner = f"fathom-o{self.number}", f"fathom-i{self.number}"
        _ip("netns", "add", self.namespace)
        _ip("link", "add", outer, "type", "veth", "peer", "name", inner)
        _ip("link", "set", outer, "master", BRIDGE, "up")
        _ip("link", "set", inner, "netns", self.namespace)
        _ip("-n", self.namespace, "addr", "add", f"{self.address}/24", "dev", inner)
        _ip("-n", self.namespace, "link", "set", inner, "up")
        _ip("-n", self.namespace, "link", "set", "lo", "up")

    def start(self, head: str, parameters: dict[str, str]) -> None:
        """Ray, as the first process of the node. `head`: its address; this node's own for the head itself."""
        role = ["--head", "--port=6379", f"--temp-dir={self.temporary}"]
        if head != self.address:
            role = [f"--address={head}:6379"]
        options = [f"--{key}={value}" for key, value in parameters.items()]
        own = [f"--node-ip-address={self.address}", "--object-store-memory=100000000", "--block"]
        ray = str(Path(sys.executable).with_name("ray"))
        files = self.temporary.with_name(self.namespace)
        shutil.rmtree(files, ignore_errors=True)
        files.mkdir()
        inside = ["sh", "-c", 'mount --bind "$0" "$1" && shift && exec "$@"', str(files), str(self.temporary)]
        alone = [
            "ip",
            "netns",
            "exec",
            self.namespace,
            "unshare",
            "--pid",
            "--fork",
            "--mount-proc",
            "--kill-child",
        ]
        with open(files.with_suffix(".log"), "wb") as log:
            command = [*alone, *inside, ray, "start", *role, *own, *options]
            self.process = subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=subprocess.STDOUT
            )

    def first(self) -> int | None:
        """The node's first process, whose end ends all others; None once it has ended."""
        assert self.process is not None
        with suppress(FileNotFoundError, ProcessLookupError):
            children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
            return int(children[0]) if children else None
        return None

    def run(self, *command: str) -> "subprocess.Popen[bytes]":
        """One more process on the node."""
        inside = ["nsenter", f"--target={self.first()}", "--net", "--pid", "--mount"]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            [*inside, *command], env=self.environment, stdout=pipe, stderr=subprocess.STDOUT
        )

    def kill(self) -> None:
        """Every process at once, and the cable cut, as when a machine loses power."""
        _ip("link", "set", f"fathom-o{self.number}", "down")
        first = self.first()
        if first is not None:
            os.kill(first, signal.SIGKILL)

    def remove(self) -> None:
        if self.process is not None:
            first = self.first()
            if first is not None:
                os.kill(first, signal.SIGKILL)
            self.process.wait()
        for thing in (["link", "del", f"fathom-o{self.number}"], ["netns", "del", self.namespace]):
            with suppress(subprocess.CalledProcessError):  # it was never made
                _ip(*thing)


@dataclass
class Cluster:
    """A head and its workers."""

    head: Node
    workers: list[Node]
    folder: Path  # that all nodes see
    token: str = field(repr=False)

    def call(self, path: str, body: Object | None = None, token: str | None = None) -> Any:
        """The head's dashboard, as the operator asks it: GET, or PUT of a body. Raises HTTPError."""
        request = urllib.request.Request(
            f"http://{self.head.address}:8265{path}",
            data=None if body is None else json.dumps(body).encode(),
            method="GET" if body is None else "PUT",
            headers={
                "Content-Type": "application/json",
                "Authorization": f"Bearer {self.token if token is None else token}",
            },
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            text = answer.read()
        return json.loads(text) if text.strip() else None

    def deploy(self, config: Object) -> None:
        self.call("/api/serve/applications/", config)

    def applications(self) -> dict[str, Any]:
        return self.call("/api/serve/applications/")["applications"]

    def running(self) -> bool:
        """Whether all applications run. Raises AssertionError with the reason when one cannot."""
        applications = self.applications()
        for name, state in applications.items():
            assert state["status"] not in ("DEPLOY_FAILED", "UNHEALTHY"), (name, state["message"])
        return bool(applications) and all(s["status"] == "RUNNING" for s in applications.values())

    def alive(self) -> int:
        """Ray's nodes that live, the head among them."""
        listed = self.call("/api/v0/nodes")["data"]["result"]["result"]
        return sum(node["state"] == "ALIVE" for node in listed)


def wait(what: str, condition: Callable[[], bool], seconds: float = 240) -> None:
    """Until it holds. What cannot be reached yet does not hold yet."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with suppress(OSError, urllib.error.URLError, KeyError, TypeError):
            if condition():
                return
        time.sleep(0.3)
    pytest.fail(f"after {seconds:g} s still not: {what}")


@contextmanager
def cluster(rayservice: Object, temporary: Path, spare: int = 0) -> Iterator[Cluster]:
    """The smallest cluster that a RayService asks for, and `spare` workers more of its first group."""
    require()
    spec = rayservice["spec"]["rayClusterConfig"]
    token = secrets.token_hex(32)
    groups = [(spec["headGroupSpec"], 1)]
    groups += [(group, group["minReplicas"]) for group in spec["workerGroupSpecs"]]
    groups.append((spec["workerGroupSpecs"][0], spare))
    members = [group for group, count in groups for _ in range(count)]
    shared = temporary / "ray"
    shared.mkdir()
    nodes = [Node(number, _environment(group, token), shared) for number, group in enumerate(members)]
    made = Cluster(nodes[0], nodes[1:], temporary, token)
    try:
        _ip("link", "add", BRIDGE, "type", "bridge")
        _ip("addr", "add", f"{SUBNET}.254/24", "dev", BRIDGE)
        _ip("link", "set", BRIDGE, "up")
        for node in nodes:
            node.make()
        parameters = [group["rayStartParams"] for group in members]
        for count, (node, wanted) in enumerate(zip(nodes, parameters, strict=True), 1):
            node.start(
                made.head.address, wanted
            )  # one after the other: Ray gives a node 15 s for some of its start
            here = partial(_joined, made, nodes[:count], parameters)
            wait(f"node {count} of {len(nodes)} has joined", here)
        yield made
    except BaseException:
        for node in nodes:  # what Ray said: pytest shows it with the failure
            log = shared.with_name(f"{node.namespace}.log")
            print(node.namespace, log.read_text()[-2000:] if log.exists() else "was never started")
        raise
    finally:
        for node in nodes:
            node.remove()
        with suppress(subprocess.CalledProcessError):
            _ip("link", "del", BRIDGE)


def _joined(made: Cluster, nodes: list[Node], parameters: list[dict[str, str]]) -> bool:
    """Whether all are there. Ray gives up a node that takes too long to start, as on a busy machine; KubeRay makes
    another pod then, and so do we."""
    for node, wanted in zip(nodes, parameters, strict=False):
        assert node.process is not None
        if node.process.poll() is not None:
            node.start(made.head.address, wanted)
    return made.alive() == len(nodes)


def _environment(group: Object, token: str) -> dict[str, str]:
    """The container's own environment, what KubeRay adds to it, and what the image has."""
    container = group["template"]["spec"]["containers"][0]
    wanted = {entry["name"]: entry["value"] for entry in container["env"]}
    image = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    kuberay = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "RAY_ADDRESS": f"{SUBNET}.1:6379"}
    return {**wanted, **image, **kuberay}
