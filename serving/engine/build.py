"""From a model specification to an engine."""

from contextlib import suppress

from kernels.invariance import use_invariance
from models.load import LoadedModel, load
from models.paths import NOWHERE
from serving.config import ModelSpec
from serving.engine.backend import Runner
from serving.engine.core import Request
from serving.engine.depth import DepthPolicy
from serving.engine.description import Description, identity
from serving.engine.engine import Engine
from serving.engine.grammar import Grammars
from serving.engine.observer import Observer
from serving.engine.params import SamplingParams
from serving.engine.runner import TorchRunner
from serving.errors import RequestError, ServeConfigError
from serving.threads import use_threads

DEFAULT_SLOTS = {"cpu": 64, "cuda": 256}
CONSTANT_STATE_TOKENS = (
    1 << 20
)  # a sequence of constant state costs nothing as it grows; some limit there must be
SNAPSHOT_BYTES = 4096  # of snapshots that a token may cost, as long as at most 256 tokens lie between two
UNTRAINED_TOKENS = 4096  # of a model with full attention that does not say how long a sequence may be


def build(spec: ModelSpec, observer: Observer | None = None) -> tuple[Engine, LoadedModel, Description]:
    """Load the model and make an engine for it. Raises models.errors.ModelError or ServeConfigError."""
    use_invariance(spec.batch_invariant)
    use_threads(spec.threads, spare=1)  # for the gateway and the proxy
    loaded = load(spec.path, spec.dtype, spec.device, spec.weights)
    model = loaded.model
    slots = _slots(spec, loaded)
    engine = make_engine(
        loaded,
        slots,
        prefill_tokens=spec.prefill_tokens,
        max_waiting=spec.max_waiting,
        queue_target_s=spec.queue_target_s,
        max_tokens=spec.max_tokens,
        kv_tokens=spec.kv_tokens,
        prefix_cache_mb=spec.prefix_cache_mb,
        snapshot_tokens=_snapshot_tokens(spec, loaded),
        shed_wait_s=spec.shed_wait_s,
        min_depth=spec.min_depth,
    )
    warm_up(engine)
    if observer is not None:
        engine.observer = observer  # that only sees real requests
    path = engine.runner.path(engine.runner.default_depth)
    description = Description(
        name=spec.name,
        family=loaded.family,
        parameters=model.parameter_count(),
        vocab_size=model.vocab_size,
        dtype=_dtype(loaded),
        device=str(model.device),
        layers=len(model.layers),
        max_tokens=engine.max_tokens,
        eos_token_ids=loaded.eos_token_ids,
        state_bytes_per_sequence=model.layout().bytes_per_slot,
        state_bytes_per_token=model.layout().bytes_per_token(model.dtype.itemsize),
        flops_per_token=int(model.flops()),
        fingerprint=loaded.fingerprint,
        slots=slots,
        max_depth=path.full_depth,
        depth_policies=_policies(engine.runner, path.full_depth),
        depths=tuple(sorted({n.units for n in path.nodes if n.exit_to != NOWHERE} | {path.full_depth})),
    )
    return engine, loaded, description


def _policies(runner: Runner, full_depth: int) -> tuple[str, ...]:
    """Kinds of depth policy that the model can follow."""
    examples = [DepthPolicy.full(), DepthPolicy.router(), DepthPolicy.gate(), DepthPolicy.confidence()]
    examples += [DepthPolicy.converged(), DepthPolicy.deadline(), DepthPolicy.chain([0])]
    if full_depth > 1:
        examples.insert(1, DepthPolicy.fixed(full_depth))
    kinds = []
    for policy in examples:
        with suppress(RequestError):
            runner.path(policy)
            kinds.append(str(policy.kind))
    return tuple(kinds)


def make_engine(
    loaded: LoadedModel,
    slots: int,
    *,
    prefill_tokens: int,
    max_waiting: int,
    queue_target_s: float | None = None,
    max_tokens: int | None = None,
    kv_tokens: int | None = None,
    prefix_cache_mb: float = 0,
    snapshot_tokens: int = 0,
    shed_wait_s: float | None = None,
    min_depth: int | None = None,
) -> Engine:
    """`max_tokens` of one sequence, `kv_tokens` of all sequences together that a model with full attention has memory
    for; by default as long as it was trained for, and `slots` times that."""
    max_tokens = _longest(loaded, max_tokens)
    return Engine(
        TorchRunner(
            loaded.model,
            slots,
            max_tokens=max_tokens,
            token_capacity=kv_tokens,
            fingerprint=identity(loaded.fingerprint, _dtype(loaded)),
        ),
        slots,
        eos_token_ids=loaded.eos_token_ids,
        prefill_tokens=prefill_tokens,
        max_waiting=max_waiting,
        queue_target_s=queue_target_s,
        max_tokens=max_tokens,
        prefix_cache_bytes=int(prefix_cache_mb * 1e6),
        snapshot_tokens=snapshot_tokens,
        shed_wait_s=shed_wait_s,
        min_depth=min_depth,
        grammars=Grammars(
            loaded.tokenizer.to_str() if loaded.tokenizer is not None else None, loaded.model.vocab_size
        ),
    )


def warm_up(engine: Engine) -> None:
    """Prefill and decode a little, so that the first request does not wait for kernels to be compiled."""
    engine.submit(Request("warm-up", [0, 0], SamplingParams(max_tokens=2, ignore_eos=True)))
    while engine.busy:
        engine.step()


def _dtype(loaded: LoadedModel) -> str:
    return str(loaded.model.dtype).removeprefix("torch.")


def _snapshot_tokens(spec: ModelSpec, loaded: LoadedModel) -> int:
    """Replaying what came after a snapshot keeps a stream waiting, and taking one keeps all of them."""
    if spec.snapshot_tokens is not None:
        return spec.snapshot_tokens
    return min(max(loaded.model.layout().bytes_per_slot // SNAPSHOT_BYTES, 64), 256)


def _slots(spec: ModelSpec, loaded: LoadedModel) -> int:
    model = loaded.model
    if spec.slots is not None:
        return spec.slots
    if spec.state_memory_mb is None:
        return DEFAULT_SLOTS[model.device.type]
    layout, longest = model.layout(), _longest(loaded, spec.max_tokens)
    fit = layout.slots_within(1e6 * spec.state_memory_mb, longest, model.dtype.itemsize, spec.kv_tokens)
    if fit < 1:
        growing = f" of {longest} tokens" if layout.paged else ""
        raise ServeConfigError(
            f"{spec.name}: state_memory_mb = {spec.state_memory_mb:g}: not enough for one sequence{growing}, of "
            f"{layout.bytes_per_slot:,} bytes and {layout.bytes_per_token(model.dtype.itemsize):,} a token"
        )
    return fit


def _longest(loaded: LoadedModel, max_tokens: int | None) -> int:
    """Tokens of one sequence."""
    if max_tokens is not None:
        return max_tokens
    if not loaded.model.layout().paged:
        return CONSTANT_STATE_TOKENS
    return loaded.config.max_position_embeddings or UNTRAINED_TOKENS
