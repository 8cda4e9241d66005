"""What the engine tells about itself while it runs. The default listens to nothing."""

import numpy as np
import numpy.typing as npt

from serving.engine.core import Ints, Request, Tick
from serving.engine.news import FinishReason, Usage


class Observer:
    """Called from the engine's thread, at most a few times a tick; must be quick and must not raise."""

    def ticked(self, tick: Tick, seconds: float) -> None:
        """A stage has run."""

    def emitted(self, units: Ints, reasons: Ints, gaps: npt.NDArray[np.float64]) -> None:
        """Sequences have new tokens, of these depths and for these reasons no deeper; for those that had one
        before, the seconds since."""

    def finished(self, request: Request, reason: FinishReason, usage: Usage) -> None:
        """All sequences of the request have ended, the last one for this reason."""
