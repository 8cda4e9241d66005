"""What both ends of the stream between gateway and engine replica agree on."""

from dataclasses import dataclass

SIGN_OF_LIFE_S = 0.1  # an engine says something at least so often
TOKEN_KEY = "x-fathom-token"
STREAM_OPTIONS = [
    ("grpc.max_receive_message_length", 1 << 30),
    ("grpc.max_send_message_length", 1 << 30),
    ("grpc.http2.min_ping_interval_without_data_ms", 1000),
    ("grpc.keepalive_permit_without_calls", 1),
]


@dataclass(frozen=True, slots=True)
class Entry:
    replica: str
    model: str
    address: str  # host:port of its Engine service
    token: str  # that it asks of whoever calls
    process: str = ""  # that it runs in (see serving.cluster.death)
