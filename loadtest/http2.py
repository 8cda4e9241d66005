"""The frames of HTTP/2 (RFC 9113) as gRPC uses them, for both ends of a connection.

grpc.aio hands every message from a polling thread to the event loop and on to a task. Where a harness times
thousands of messages a second beside the server that it measures, that hand-over is the largest error in its
figures, and most of its cost; docs/loadtest.md has the comparison. Here bytes are stamped as they are read
from the socket and go straight to the call that they belong to. Header compression is left to the library
hpack.
"""

import asyncio
import struct
import time
from collections import deque
from collections.abc import Iterable
from typing import Any, Final, cast

import hpack

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
END_STREAM = ACK = 0x1
END_HEADERS, PADDED, PRIORITY = 0x4, 0x8, 0x20
ENABLE_PUSH, MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE, MAX_FRAME_SIZE = 2, 3, 4, 5
CANCEL = 8
LARGEST = 2**31 - 1  # window in bytes, and stream number
FIRST_WINDOW = 65_535  # bytes, until the other end says otherwise

_BLOCKS = 64  # header blocks remembered
_BUFFER = 1 << 18  # bytes: a frame is at most 16 KiB unless we ask for more, and we do not

_HEAD = struct.Struct(">HBBBI")  # length (its high 16 and low 8 bits), type, flags, stream
_PREFIX = struct.Struct(">BI")  # of a gRPC message: whether compressed, length


def frame(kind: int, flags: int, number: int, payload: bytes = b"") -> bytes:
    return _HEAD.pack(len(payload) >> 8, len(payload) & 0xFF, kind, flags, number) + payload


def prefixed(message: bytes) -> bytes:
    """A gRPC message as it goes into DATA frames."""
    return _PREFIX.pack(0, len(message)) + message


def header_block(fields: Iterable[tuple[str, str]]) -> bytes:
    """Encode headers without the connection's table, so that one block serves every call on every
    connection."""
    return hpack.Encoder().encode([hpack.NeverIndexedHeaderTuple(name, value) for name, value in fields])


class Stream:
    """One call, at either end. Those who make or answer calls derive from it and say what to do with what
    arrives."""

    __slots__ = ("held", "number", "partial", "tail", "window")

    def __init__(self) -> None:
        self.number = 0
        self.window = FIRST_WINDOW  # bytes that the other end still takes
        self.held = b""  # of what is sent, until it takes more
        self.tail = b""  # frames that follow what is held
        self.partial = b""  # of a received message that is not complete

    def on_message(self, now: float, message: bytes) -> None:
        """A message was read from the socket at `now`, in seconds of time.perf_counter."""
        raise NotImplementedError


class Http2(asyncio.BufferedProtocol):
    """Either end of a connection: frames, settings, flow control. Streams are told of whole gRPC messages.

    Buffered, because a plain protocol's bytes are allocated anew, 256 KiB, for every read of a few dozen.
    """

    def __init__(self) -> None:
        self.streams: dict[int, Stream] = {}
        self.transport = cast("asyncio.Transport", None)  # until connection_made
        self.limit = LARGEST  # streams at a time that the other end allows
        self._decoder = hpack.Decoder()
        self._blocks: dict[bytes, dict[bytes, bytes]] = {}
        self._window = FIRST_WINDOW  # bytes on all streams together that the other end still takes
        self._stream_window = FIRST_WINDOW
        self._frame_size = 16_384
        self._waiting: deque[Stream] = deque()  # with something held
        self._buffer = bytearray(_BUFFER)
        self._view = memoryview(self._buffer)
        self._filled = 0  # bytes of the buffer: a frame that is not complete
        self._headers = (0, 0, b"")  # stream, flags and block so far
        self._received = 0  # bytes, since the other end's window was last renewed

    # -- to be said by either end ----------------------------------------------------------------------------

    def on_headers(self, now: float, number: int, fields: dict[bytes, bytes], ended: bool) -> None:
        raise NotImplementedError

    def on_data_end(self, now: float, number: int) -> None:
        """The other end closed its side of a stream with a DATA frame."""
        raise NotImplementedError

    def on_reset(self, now: float, number: int, code: int) -> None:
        raise NotImplementedError

    def on_goaway(self, now: float, last: int) -> None:
        """Streams above `last` were not looked at, and no new one will be."""

    def on_settings(self) -> None:
        """The other end's settings have arrived."""

    def on_broken(self, now: float, reason: str) -> None:
        """The connection is lost, or what arrived is not HTTP/2."""
        raise NotImplementedError

    # -- sending ---------------------------------------------------------------------------------------------

    def send(self, stream: Stream, opening: bytes, body: bytes, tail: bytes = b"", end: bool = False) -> None:
        """Write the frames `opening`, then `body` as DATA as far as flow control lets it, then the frames
        `tail`.

        `end` closes this side of the stream with its last DATA frame.
        """
        size = len(body)
        if not stream.held and size <= self._window and size <= stream.window and size <= self._frame_size:
            self._window -= size
            stream.window -= size
            self.transport.write(opening + frame(DATA, END_STREAM if end else 0, stream.number, body) + tail)
            return
        if opening:
            self.transport.write(opening)
        if not stream.held:
            self._waiting.append(stream)
        stream.held += body
        stream.tail = frame(DATA, END_STREAM, stream.number) if end else tail
        self._send_held()

    def _send_held(self) -> None:
        for _ in range(len(self._waiting)):
            stream = self._waiting.popleft()
            if stream.number not in self.streams:
                continue  # reset meanwhile
            while stream.held:
                size = min(self._window, stream.window, self._frame_size, len(stream.held))
                if size <= 0:
                    break
                chunk, stream.held = stream.held[:size], stream.held[size:]
                self._window -= size
                stream.window -= size
                self.transport.write(frame(DATA, 0, stream.number, chunk))
            if stream.held:
                self._waiting.append(stream)
            elif stream.tail:
                self.transport.write(stream.tail)

    # -- asyncio ---------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        # Windows so large that the other end never waits for this one.
        settings = frame(SETTINGS, 0, 0, struct.pack(">HI", INITIAL_WINDOW_SIZE, LARGEST))
        self.transport.write(
            settings + frame(WINDOW_UPDATE, 0, 0, (LARGEST - FIRST_WINDOW).to_bytes(4, "big"))
        )

    def connection_lost(self, error: Exception | None) -> None:
        self.on_broken(time.perf_counter(), f"connection lost{f': {error}' if error else ''}")

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._view[self._filled :]

    def buffer_updated(self, size: int) -> None:
        now = time.perf_counter()
        view, position, filled = self._view, 0, self._filled + size
        try:
            while filled - position >= 9:
                high, low, kind, flags, number = _HEAD.unpack_from(view, position)
                end = position + 9 + (high << 8 | low)
                if end > filled:
                    break
                if kind == DATA:
                    self._on_data(now, flags, number, bytes(view[position + 9 : end]))
                else:
                    self._on_control(now, kind, flags, number, bytes(view[position + 9 : end]))
                position = end
        except (hpack.HPACKError, struct.error, IndexError, ValueError) as error:
            self.on_broken(now, f"not HTTP/2: {error}")
            self.transport.abort()
            return
        if position and position < filled:
            view[: filled - position] = bytes(view[position:filled])
        self._filled = filled - position

    # -- frames ----------------------------------------------------------------------------------------------

    def _on_data(self, now: float, flags: int, number: int, payload: bytes) -> None:
        self._received += len(payload)
        if self._received > LARGEST // 2:
            self.transport.write(frame(WINDOW_UPDATE, 0, 0, self._received.to_bytes(4, "big")))
            self._received = 0
        stream = self.streams.get(number)
        if stream is None:
            return
        if flags & PADDED:
            payload = payload[1 : len(payload) - payload[0]]
        if stream.partial:
            payload = stream.partial + payload
        position, size = 0, len(payload)
        while size - position >= 5:
            compressed, length = _PREFIX.unpack_from(payload, position)
            end = position + 5 + length
            if end > size:
                break
            if compressed:
                raise ValueError("a compressed message, which was not offered")
            stream.on_message(now, payload[position + 5 : end])
            position = end
        stream.partial = payload[position:]
        if flags & END_STREAM:
            self.on_data_end(now, number)

    def _on_control(self, now: float, kind: int, flags: int, number: int, payload: bytes) -> None:
        if kind == HEADERS:
            if flags & PADDED:
                payload = payload[1 : len(payload) - payload[0]]
            if flags & PRIORITY:
                payload = payload[5:]
            self._headers = number, flags, payload
        elif kind == CONTINUATION:
            number, first, block = self._headers
            self._headers = number, first, block + payload
        elif kind == SETTINGS and not flags & ACK:
            self._on_settings(payload)
        elif kind == PING and not flags & ACK:
            self.transport.write(frame(PING, ACK, 0, payload))
        elif kind == WINDOW_UPDATE:
            self._on_window(number, int.from_bytes(payload, "big") & LARGEST)
        elif kind == RST_STREAM:
            self.on_reset(now, number, int.from_bytes(payload, "big"))
        elif kind == GOAWAY:
            self.on_goaway(now, int.from_bytes(payload[:4], "big") & LARGEST)
        if kind in (HEADERS, CONTINUATION) and flags & END_HEADERS:
            number, first, block = self._headers
            self.on_headers(now, number, self._decode(block), bool(first & END_STREAM))

    def _decode(self, block: bytes) -> dict[bytes, bytes]:
        """While nothing has been put into the connection's table, a block means the same every time."""
        fields = self._blocks.get(block)
        if fields is None:
            pairs: Any = self._decoder.decode(block, raw=True)
            fields = dict(pairs)
            if self._decoder.header_table.dynamic_entries:
                self._blocks.clear()
            elif len(self._blocks) < _BLOCKS:
                self._blocks[block] = fields
        return fields

    def _on_window(self, number: int, step: int) -> None:
        if number == 0:
            self._window += step
        elif stream := self.streams.get(number):
            stream.window += step
        if self._waiting:
            self._send_held()

    def _on_settings(self, payload: bytes) -> None:
        for key, value in struct.iter_unpack(">HI", payload):
            if key == MAX_CONCURRENT_STREAMS:
                self.limit = value
            elif key == INITIAL_WINDOW_SIZE:
                for stream in self.streams.values():
                    stream.window += value - self._stream_window
                self._stream_window = value
            elif key == MAX_FRAME_SIZE:
                self._frame_size = value
        self.transport.write(frame(SETTINGS, ACK, 0))
        self.on_settings()
        if self._waiting:
            self._send_held()

    def adopt(self, number: int, stream: Stream) -> None:
        """Count a stream among those of this connection."""
        stream.number, stream.window = number, self._stream_window
        self.streams[number] = stream
