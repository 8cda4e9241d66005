"""One scrape for the gateway and all replicas behind it."""

import asyncio
import logging
from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, disable_created_metrics, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from serving.gateway.fleet import Fleet
from serving.gateway.replicas import Replica

disable_created_metrics()
log = logging.getLogger("fathom.gateway")


class GatewayMetrics:
    """Counts what this gateway answers, and gathers what the replicas count."""

    def __init__(self, gateway: str):
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "fathom:requests",
            "RPCs answered, by outcome",
            ("gateway", "method", "outcome"),
            registry=self._registry,
        )
        self._gateway = gateway
        self._of: dict[tuple[str, str], Counter] = {}  # looking one up costs ten times what counting does

    def ended(self, method: str, outcome: str) -> None:
        if (method, outcome) not in self._of:
            self._of[method, outcome] = self._requests.labels(self._gateway, method, outcome)
        self._of[method, outcome].inc()

    async def scrape(self, fleet: Fleet) -> bytes:
        """Prometheus' text format: this gateway's own metrics, then those of every replica that answers."""
        texts = await asyncio.gather(*(_ask(replica) for replica in fleet.replicas()))
        merged = CollectorRegistry()
        merged.register(_Texts([generate_latest(self._registry).decode(), *texts]))
        return generate_latest(merged)


async def _ask(replica: Replica) -> str:
    try:
        return await replica.metrics()
    except Exception as error:
        log.warning("replica %s gives no metrics: %s", replica.entry.replica, error)
        return ""


class _Texts(Collector):
    """Several expositions as one: families of the same name joined, as the format asks."""

    def __init__(self, texts: Iterable[str]):
        self._texts = list(texts)

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for text in self._texts:
            for family in text_string_to_metric_families(text):
                known = families.setdefault(family.name, family)
                if known is not family:
                    known.samples += family.samples
        yield from families.values()
