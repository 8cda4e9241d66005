"""Ways to ask a server for tokens: fathom.v1, the Open Inference Protocol, OpenAI's HTTP."""

from loadtest.config import Server
from loadtest.core import Transport
from loadtest.transports.fathom import FathomTransport
from loadtest.transports.oip import OipTransport
from loadtest.transports.openai import OpenAiTransport


def transport(server: Server) -> Transport:
    """The transport that the configuration names."""
    if server.transport == "openai":
        return OpenAiTransport(server)
    return FathomTransport(server) if server.transport == "fathom" else OipTransport(server)
