"""Metrics of depth, against counts of what was asked for and what came out."""

from collections import Counter

import pytest
from prometheus_client.parser import text_string_to_metric_families

from serving import LLM, SamplingParams
from serving.cluster.metrics import EngineMetrics
from serving.engine.core import Request
from serving.engine.depth import DepthPolicy, ExitReason
from serving.engine.engine import Engine
from serving.engine.runner import TorchRunner
from tests.depth.plain import Plain
from tests.depth.test_depth import between, loaded


def told(metrics: EngineMetrics) -> dict[str, dict[tuple[str, ...], float]]:
    """The samples of each name, by the values of the labels that tell them apart."""
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(metrics.text().decode()):
        for sample in family.samples:
            labels = tuple(v for k, v in sorted(sample.labels.items()) if k not in ("model", "replica"))
            found.setdefault(sample.name.removeprefix("fathom:"), {})[labels] = sample.value
    return found


@pytest.mark.parametrize(("name", "kind"), [("looped gla", "gate"), ("nested propagate", "entropy")])
def test_counts_are_of_what_was_done(name: str, kind: str) -> None:
    model = loaded(name)
    policy = DepthPolicy.gate(1.0) if kind == "gate" else DepthPolicy.confidence(kind, 0.0)
    scout = Plain(model.model, policy)
    scout.generate([5, 6, 7], 6)
    threshold = between(scout.seen[kind])
    policy = DepthPolicy.gate(threshold) if kind == "gate" else DepthPolicy.confidence(kind, threshold)
    metrics = EngineMetrics("m", "r")
    # By a clock that stands still: where launches cost nothing the fullest stage runs, on any machine.
    runner = TorchRunner(model.model, 3, max_tokens=64)
    engine = Engine(runner, 3, clock=lambda: 0.0, observer=metrics)
    options = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}
    for i in range(5):  # of one token, so that each pass is one for a token that is generated
        engine.submit(Request(str(i), [i], SamplingParams(**options, depth=policy)))  # type: ignore[arg-type]
    out = []
    while engine.busy:
        out += engine.step()
    made = Counter((d, r) for o in out for d, r in zip(o.depths, o.exit_reasons, strict=True))
    found = told(metrics)
    assert {
        (int(depth), reason): count
        for (depth, reason), count in found["generation_tokens_by_depth_total"].items()
    } == {(depth, ExitReason(reason).name.lower()): count for (depth, reason), count in made.items()}
    assert len({depth for depth, _ in made}) > 1
    passes: Counter[tuple[str, str]] = Counter()  # of a token through a stage: (depth reached, stage)
    path = model.model.path()
    for (depth, _), count in made.items():
        reached = 0
        for node in path.nodes:
            if node.units <= depth:
                reached = max(reached, node.units)
                passes[str(reached), str(node.stage)] += count
    assert found["stage_tokens_total"] == passes
    # Of the nested one all rows come back to the beginning before any begins again.
    assert found["refills_total"][()] > 0 or name != "looped gla"
    assert found["final_stage_wait_ticks_count"][()] <= found["stage_ticks_total"][str(path.nodes[-1].stage),]


def test_prompt_tokens_of_a_tick_are_those_that_it_ran() -> None:
    """Also where they leave, or go on to a stage that not all of them come to, by the time that they are counted."""
    engine = LLM(loaded("nested absent"), slots=2, prefill_tokens=16).engine
    engine.observer = metrics = EngineMetrics("m", "r")
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, depth="fixed(2)")
    engine.submit(Request("0", list(range(11)), params))
    while engine.busy:
        engine.step()
    found = told(metrics)
    assert found["tick_prefill_tokens_sum"][()] == 3 * 11  # two segments and the head
    assert found["tick_prefill_tokens_count"][()] == 3
    assert found["prompt_tokens_total"][()] == 11
    assert found["final_stage_wait_ticks_count"][()] == 0  # no row waited for it
