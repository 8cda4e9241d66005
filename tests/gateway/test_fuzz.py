"""Random and damaged bytes to every RPC: the right codes, no crash, nothing left behind.

`python -m tests.gateway.test_fuzz 100000` sends so many to each (or so many seconds' worth: a second argument)."""

import asyncio
import collections
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message_factory import GetMessageClass

from protos.fathom.v1 import inference_pb2 as pb
from serving.config import GatewaySpec
from serving.gateway.rpc import StreamEndedError
from serving.gateway.services import services
from tests import tiny
from tests.gateway.harness import Context, House, call, house

METHODS = {f"{s.full_name}/{m.name}": m for s in services() for m in s.methods}
PROPER = {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION", "UNIMPLEMENTED", "DEADLINE_EXCEEDED"}
PROPER |= {"RESOURCE_EXHAUSTED", "OUT_OF_RANGE", "DATA_LOSS"}
TEXTS = ("", "a", "tiny", "def f(x):", "é漢🎈", "\x00", "x" * 300, "../..", "stream", "max_tokens")


def filled(rng: random.Random, message: Any, depth: int = 0) -> Any:
    """A message with random fields, some of them at their limits."""
    for field in message.DESCRIPTOR.fields:
        if rng.random() < 0.55 or depth > 3:
            continue
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            continue
        if field.message_type is not None:
            parts = [getattr(message, field.name)] if not field.is_repeated else []
            count = rng.randrange(3) if field.is_repeated else 0
            parts += [getattr(message, field.name).add() for _ in range(count)]
            for part in parts:
                part.SetInParent()
                filled(rng, part, depth + 1)
        elif field.is_repeated:
            getattr(message, field.name).extend(_value(rng, field) for _ in range(rng.randrange(5)))
        else:
            setattr(message, field.name, _value(rng, field))
    return message


def _value(rng: random.Random, field: Any) -> Any:
    kinds = field.cpp_type
    if kinds in (field.CPPTYPE_DOUBLE, field.CPPTYPE_FLOAT):
        return rng.choice([0.0, 0.5, 1.0, -1.0, 2.0, float("nan"), float("inf"), 1e30, rng.random()])
    if kinds == field.CPPTYPE_BOOL:
        return rng.random() < 0.5
    if kinds == field.CPPTYPE_STRING:
        text = rng.choice(TEXTS)
        return text.encode() if field.type == field.TYPE_BYTES else text
    if kinds == field.CPPTYPE_ENUM:
        return rng.choice([0, 1, 5, 99])
    signed = kinds in (field.CPPTYPE_INT32, field.CPPTYPE_INT64)
    return rng.choice([0, 1, 2, 7, 299, 300, 10**6, 2**31 - 1, *([-1, -(2**31)] if signed else [2**32 - 1])])


def body(rng: random.Random, method: MethodDescriptor) -> bytes:
    kind = rng.random()
    if kind < 0.2:
        return rng.randbytes(rng.randrange(64))
    data = bytearray(filled(rng, GetMessageClass(method.input_type)()).SerializeToString())
    for _ in range(rng.randrange(4) if kind < 0.6 else 0):
        if data:
            at = rng.randrange(len(data))
            data[at : at + rng.randrange(3)] = rng.randbytes(rng.randrange(3))
    return bytes(data)


async def send(h: House, name: str, method: MethodDescriptor, data: bytes) -> str:
    context = Context()
    if method.client_streaming:
        service, _, bare = name.partition("/")

        async def calls() -> Any:
            yield call(name, data)

        stream = h.rpc.exchange(service, bare, calls(), context)
    elif method.server_streaming:
        stream = h.rpc.stream(call(name, data), context)
    else:
        await h.rpc.unary(call(name, data), context)
        return context.code.name
    try:
        for _ in range(3):  # then the client hangs up
            await asyncio.wait_for(anext(stream), 0.2)
    except (StreamEndedError, StopAsyncIteration, TimeoutError):
        pass
    finally:
        await stream.aclose()
    return context.code.name


async def fuzz(
    h: House, name: str, count: int, seconds: float, seed: int = 0, at_a_time: int = 1
) -> collections.Counter[str]:
    rng = random.Random(f"{name} {seed}")
    codes: collections.Counter[str] = collections.Counter()
    until = time.monotonic() + seconds

    async def sender() -> None:
        while codes.total() < count and time.monotonic() < until:
            codes[await send(h, name, METHODS[name], body(rng, METHODS[name]))] += 1
            await asyncio.sleep(0)  # some answers wait for nothing; replicas want to be heard, too

    await asyncio.gather(*(sender() for _ in range(at_a_time)))
    return codes


def spec(folder: Path) -> GatewaySpec:
    return GatewaySpec(
        state_store=str(folder / "store"), max_timeout_s=2, default_timeout_s=1, max_sessions=5
    )


@pytest.mark.parametrize("name", [name for name in METHODS if name != "grpc.health.v1.Health/Watch"])
async def test_no_bytes_do_harm(name: str, tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "tiny")
    async with house(folder, gateway=spec(tmp_path), max_waiting=4) as h:
        codes = await fuzz(h, name, 120, seconds=20)
        assert set(codes) <= PROPER, codes
        messages, context = await h.stream(
            "fathom.v1.Inference/Generate", pb.GenerateRequest(text="def", sampling={"max_tokens": 3})
        )
        assert context.code is grpc.StatusCode.OK and messages
        await h.idle()


async def main(count: int, seconds: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        async with house(tiny.checkpoint(Path(folder) / "tiny"), gateway=spec(Path(folder))) as h:
            for name in METHODS:
                at_a_time = 64 if name.endswith("/Watch") else 8  # which says nothing for a while
                codes = await fuzz(h, name, count, seconds, seed=1, at_a_time=at_a_time)
                wrong = {code: n for code, n in codes.items() if code not in PROPER}
                print(
                    f"{name}: {codes.total()} messages, {dict(codes)}{'  WRONG' if wrong else ''}", flush=True
                )
            await h.idle()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else float("inf")))
