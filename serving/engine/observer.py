"""What the engine tells about itself while it runs. The default listens to nothing."""

from serving.engine.core import FinishReason, Request, Tick, Usage


class Observer:
    """Called from the engine's thread; must be quick and must not raise."""

    def ticked(self, tick: Tick, seconds: float) -> None:
        """A stage has run."""

    def token(self, request: Request) -> None:
        """A sequence of the request has a new token."""

    def finished(self, request: Request, reason: FinishReason, usage: Usage | None) -> None:
        """All sequences of the request have ended, the last one for this reason."""
