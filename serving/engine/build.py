"""From a model specification to an engine."""

import os

import torch

from models.load import LoadedModel, load
from serving.config import ModelSpec
from serving.engine.core import Request
from serving.engine.description import Description
from serving.engine.engine import Engine
from serving.engine.observer import Observer
from serving.engine.params import SamplingParams
from serving.engine.runner import TorchRunner
from serving.errors import ServeConfigError
from serving.threads import use_threads

DEFAULT_SLOTS = {"cpu": 64, "cuda": 256}


def build(spec: ModelSpec, observer: Observer | None = None) -> tuple[Engine, LoadedModel, Description]:
    """Load the model and make an engine for it. Raises models.errors.ModelError or ServeConfigError."""
    use_threads(spec.threads or os.cpu_count() or 1)
    loaded = load(spec.path, spec.dtype, spec.device)
    model = loaded.model
    slots = _slots(spec, model.layout().bytes_per_slot, model.device)
    engine = Engine(
        TorchRunner(model, slots),
        slots,
        eos_token_ids=loaded.eos_token_ids,
        prefill_tokens=spec.prefill_tokens,
        max_waiting=spec.max_waiting,
        max_tokens=spec.max_tokens,
    )
    warm_up(engine)
    if observer is not None:
        engine.observer = observer  # that only sees real requests
    description = Description(
        name=spec.name,
        family=loaded.family,
        parameters=model.parameter_count(),
        vocab_size=model.vocab_size,
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(model.device),
        layers=len(model.layers),
        max_tokens=spec.max_tokens,
        eos_token_ids=loaded.eos_token_ids,
        state_bytes_per_sequence=model.layout().bytes_per_slot,
        flops_per_token=model.flops_per_token(),
        fingerprint=loaded.fingerprint,
        slots=slots,
        max_depth=engine.runner.path(engine.runner.default_depth).full_depth,
    )
    return engine, loaded, description


def warm_up(engine: Engine) -> None:
    """Prefill and decode a little, so that the first request does not wait for kernels to be compiled."""
    engine.submit(Request("warm-up", [0, 0], SamplingParams(max_tokens=2, ignore_eos=True)))
    while engine.busy:
        engine.step()


def _slots(spec: ModelSpec, bytes_per_slot: int, device: torch.device) -> int:
    if spec.slots is not None:
        return spec.slots
    if spec.state_memory_mb is None:
        return DEFAULT_SLOTS[device.type]
    budget = spec.state_memory_mb * 1e6
    fit = int(budget // bytes_per_slot) - 1  # slot 0 is padding
    if fit < 1:
        need = f"{2 * bytes_per_slot / 1e6:g}"
        raise ServeConfigError(f"{spec.name}: state_memory_mb = {spec.state_memory_mb:g}: one sequence needs {need}")
    return fit
