"""Serving: the engine, the gateway, the replicas on Ray Serve, and the command line.

Importing this package is cheap, and needs neither Ray nor gRPC: its names are loaded when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from serving.engine.params import SamplingParams
    from serving.llm import LLM, Completion

__all__ = ["LLM", "Completion", "SamplingParams"]

_HOMES = {
    "LLM": "serving.llm",
    "Completion": "serving.llm",
    "SamplingParams": "serving.engine.params",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
