"""Registration of kernels as torch custom operators in the namespace ``fathom``."""

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("fathom", "DEF")


def define(
    schema: str, *, cpu: Callable[..., Any], gpu: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """Register an operator under its schema and return a function that calls it.

    `fake` gives the result's shape without computing, for torch.compile and for tensors without data. Outside of
    torch.compile the function goes straight to the device's implementation: torch's dispatcher costs some 15 us a
    call on a CPU, as much as a whole decoding step of a small layer.
    """
    name = schema[: schema.index("(")]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, cpu, "CPU")
    _LIBRARY.impl(name, gpu, "CUDA")
    torch.library.register_fake(f"fathom::{name}", fake, lib=_LIBRARY)
    operator = getattr(torch.ops.fathom, name).default

    def call(first: torch.Tensor, *args: Any) -> Any:
        if torch.compiler.is_compiling() or first.is_meta:
            return operator(first, *args)
        return (gpu if first.is_cuda else cpu)(first, *args)

    call.__name__ = name
    return call
