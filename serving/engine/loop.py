"""The thread that an engine runs in."""

import collections
import logging
import threading
from collections.abc import Callable

from serving.engine.core import Request
from serving.engine.engine import Engine
from serving.engine.news import Failed, News
from serving.errors import OverloadedError, RequestError

log = logging.getLogger("fathom.engine")


class EngineLoop:
    """Steps an engine while it has work, and sleeps otherwise. Any thread may submit and cancel."""

    def __init__(self, engine: Engine, deliver: Callable[[News], None], begin: Callable[[], object] = bool):
        """`deliver` is called from the engine's thread, once after each step that has news; `begin` once before."""
        self.engine = engine
        self.failures = 0  # steps in a row that raised
        self._deliver = deliver
        self._begin = begin
        self._commands: collections.deque[Callable[[], News]] = collections.deque()
        self._wake = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="fathom-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the present step."""
        self._stopping = True
        self._wake.set()
        self._thread.join()

    def submit(self, request: Request) -> None:
        """Hand over a request; its news, or its failure, will be delivered."""

        def command() -> News:
            try:
                displaced = self.engine.submit(request)
            except RequestError as error:
                return [Failed(request.id, error)]
            if displaced is None:
                return []
            return [Failed(displaced.id, OverloadedError("the queue is full, and others have less in it"))]

        self._send(command)

    def cancel(self, request_id: str, index: int | None = None) -> None:
        """Stop a request, or one of its continuations, before the next step."""
        self._send(lambda: [*self.engine.cancel(request_id, index)])

    def refused(self) -> None:
        """A request was turned away elsewhere, because the queue here is full."""

        def command() -> News:
            self.engine.scheduler.refused()
            return []

        self._send(command)

    def drain(self) -> None:
        """Take no more requests, and hand over those that there are."""
        self._send(lambda: [*self.engine.drain()])

    def _send(self, command: Callable[[], News]) -> None:
        self._commands.append(command)
        self._wake.set()

    def _run(self) -> None:
        self._begin()
        while not self._stopping:
            self._wake.clear()
            news = self._step()
            if news:
                self._deliver(news)
            if not self.engine.busy and not self._commands:
                self._wake.wait()

    def _step(self) -> News:
        news: News = []
        while self._commands:
            news += self._commands.popleft()()
        for request in self.engine.give_up():
            told = OverloadedError(
                "more requests come than can be served: this one's turn has not come in time"
            )
            news.append(Failed(request.id, told))
        under_way = list(self.engine.scheduler.requests)
        try:
            news += self.engine.step()
            self.failures = 0
        except Exception as error:
            # A failed step leaves the states of its rows in doubt: what runs is lost, what comes next is not. Its
            # news is lost, too, so those hear of it that were over by then.
            log.exception("a step failed; the requests that were running are given up")
            self.failures += 1
            for request_id in under_way:
                self.engine.cancel(request_id)
                news.append(Failed(request_id, error))
        return news
