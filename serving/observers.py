"""Who is told of the requests of a gateway, as the serving file asks."""

from serving.config import GatewaySpec
from serving.gateway.requests import Listener


class Observers:
    def __init__(self, spec: GatewaySpec):
        """Raises ServeConfigError."""
        self.listeners: list[Listener] = []
        self._tracing = None
        if spec.logs is not None:
            from serving import logs

            logs.set_up(spec.logs)
            self.listeners.append(logs.log_request)
        if spec.tracing is not None:
            from serving.tracing import Tracing

            self._tracing = Tracing(spec.tracing)
            self.listeners.append(self._tracing)

    def close(self) -> None:
        if self._tracing is not None:
            self._tracing.close()
