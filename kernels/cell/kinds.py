"""The non-linear cells: how many gates and states each has, in which order."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Kind:
    code: int  # for compiled code
    gates: str  # one letter each, in the order of the weights
    states: str  # the output h first


KINDS = {
    "elman": Kind(0, "h", "h"),  # tanh
    "elman_relu": Kind(1, "h", "h"),
    "gru": Kind(2, "rzn", "h"),
    "lstm": Kind(3, "ifzo", "hc"),
    "slstm": Kind(4, "ifzo", "hcnm"),
}
ELMAN, ELMAN_RELU, GRU, LSTM, SLSTM = (kind.code for kind in KINDS.values())
