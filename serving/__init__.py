"""Serving: the engine, the gateway, the replicas on Ray Serve, and the command line. Importing this package needs
neither Ray nor gRPC."""

from serving.engine.params import SamplingParams
from serving.llm import LLM, Completion

__all__ = ["LLM", "Completion", "SamplingParams"]
