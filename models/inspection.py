"""What a checkpoint is, what it takes to serve it, and what is wrong with it: without reading its weights."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from models.checkpoint import Checkpoint
from models.config import ModelConfig
from models.decoder import Decoder
from models.errors import ModelError
from models.load import doubts
from models.registry import build, family, names

UNTRAINED_TOKENS = 4096  # length of a sequence where no configuration says what it was trained at


@dataclass(slots=True)
class Report:
    """Sizes in bytes. What could not be found out, because of the problems, is None."""

    model: str
    family: str | None = None
    parameters: int | None = None
    layers: int | None = None
    mixers: dict[str, int] = field(default_factory=dict)  # kind -> layers that have one
    hidden_size: int | None = None
    vocab_size: int | None = None
    tokenizer: bool | None = None
    weights: dict[str, int] = field(default_factory=dict)  # type as stored -> bytes
    max_depth: int | None = None
    flops_per_token: float | None = None
    state_bytes_per_sequence: int | None = None
    state_bytes_per_token: int | None = None  # that a sequence grows by; 0 where all state is constant
    tokens_per_sequence: int | None = None  # that `slots` allows for, where a sequence grows
    slots: int | None = None  # sequences whose states the memory holds
    ignored: list[str] = field(default_factory=list)  # keys of the configuration that mean nothing here
    warnings: list[str] = field(default_factory=list)  # what is odd, and served all the same
    problems: list[str] = field(default_factory=list)

    @property
    def usable(self) -> bool:
        return not self.problems


def inspect(path_or_name: str | Path, memory: float | None = None) -> Report:
    """`memory`: bytes for the states of all sequences. Never raises for a bad checkpoint: the report says
    what is wrong."""
    report = Report(str(path_or_name))
    try:
        checkpoint = Checkpoint(path_or_name)
        _configuration(checkpoint, report, memory)
    except ModelError as error:
        report.problems.append(str(error))
    return report


def _configuration(checkpoint: Checkpoint, report: Report, memory: float | None) -> None:
    raw, file = checkpoint.config, checkpoint.config_file
    report.family = str(raw.get("model_type"))
    tokenizer = None
    try:
        report.weights = checkpoint.stored()
        tokenizer = checkpoint.tokenizer()
        report.tokenizer = tokenizer is not None
        checkpoint.chat()
        raw = checkpoint.read()
    except ModelError as error:
        report.problems.append(str(error))
    host = family(raw, file)
    declared = getattr(host, "Config", None)
    if isinstance(declared, type) and issubclass(declared, ModelConfig):
        report.ignored = declared.unknown(raw)
        report.problems += [str(problem) for problem in declared.problems(raw, file)]
        if report.problems:
            return
    config, model = build(raw, file)
    _sizes(report, config, model, memory)
    report.warnings = doubts(config, model.vocab_size, tokenizer)
    if not report.problems:
        checkpoint.check(model, names(raw, file))


def _sizes(report: Report, config: ModelConfig, model: Decoder, memory: float | None) -> None:
    report.parameters = model.parameter_count()
    report.layers, report.hidden_size, report.vocab_size = (
        len(model.blocks),
        model.hidden_size,
        model.vocab_size,
    )
    report.mixers = dict(Counter(type(mixer).__name__ for block in model.blocks for mixer in block.mixers))
    report.max_depth = model.path().full_depth
    report.flops_per_token = model.flops()
    layout = model.layout()
    # Pages hold what the weights are made of; on most machines that is what is stored.
    width = 4 if set(report.weights) == {"F32"} else 2
    report.state_bytes_per_sequence = layout.bytes_per_slot
    report.state_bytes_per_token = layout.bytes_per_token(width)
    longest = config.max_position_embeddings or UNTRAINED_TOKENS
    if report.state_bytes_per_token:
        report.tokens_per_sequence = longest
    if memory is not None:
        report.slots = max(0, layout.slots_within(memory, longest, width))
