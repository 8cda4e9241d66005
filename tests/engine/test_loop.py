"""The thread around an engine: a step that fails costs those that were under way, and nobody else."""

import pytest

from serving.engine.core import Request
from serving.engine.loop import EngineLoop
from serving.engine.news import Failed, FinishReason, News
from serving.engine.params import SamplingParams
from tests.engine.fake import FakeRunner, assert_no_leak, make_engine, plain


def request(name: str, tokens: int) -> Request:
    return Request(name, [1, 2, 3], SamplingParams(max_tokens=tokens, ignore_eos=True))


def test_a_failed_step_is_told_to_all_that_were_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(FakeRunner(plain()))
    loop = EngineLoop(engine, lambda news: None)

    def steps() -> News:
        news: News = []
        while engine.busy or loop._commands:
            news += loop._step()
        return news

    with monkeypatch.context() as patch:

        def fail(*_: object) -> None:
            raise KeyError("lost")

        patch.setattr(
            engine.memory, "ended", fail
        )  # in the middle of a step, when some news is there already
        for name, tokens in (("short", 1), ("long", 9)):
            loop.submit(request(name, tokens))
        told = steps()
    assert {item.request_id for item in told if isinstance(item, Failed)} == {"short", "long"}
    assert loop.failures == 1
    assert_no_leak(engine)
    loop.submit(request("next", 4))
    assert [out.finish_reason for out in steps()][-1] is FinishReason.LENGTH  # type: ignore[union-attr]
    assert loop.failures == 0
    assert_no_leak(engine)
