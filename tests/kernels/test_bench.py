"""The kernels' benchmark: what it can say without a GPU, what it would say with one, and that it catches a
wrong kernel."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from kernels.bench.__main__ import main
from kernels.bench.case import Case, Trial
from kernels.bench.cases import CASES
from kernels.bench.measure import Row, as_json, check, copy_bandwidth, line, measure

BY_NAME = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


class FakeClock:
    """Says how long every call takes, in order, and does not call."""

    def __init__(self, *seconds: float | Exception):
        self.left = list(seconds)

    def seconds(self, call: Callable[[], Any]) -> float:
        answer = self.left.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def trial(**changes: Any) -> Trial:
    plain = Trial(lambda: torch.ones(3, 2), torch.ones(3, 2), bytes=4000)
    return replace(plain, **changes)


CASE = Case("op/model", lambda rows, device, **size: trial(), {"H": 4}, {"H": 1})


@BY_NAME
def test_every_case_agrees_with_the_naive_recurrence(case: Case) -> None:
    assert check(case.build_small()) < 1e-5


@BY_NAME
def test_every_rival_in_torch_does_the_same_step(case: Case) -> None:
    """A comparison with something that computes less would flatter nobody: two steps, from the same
    states."""
    ours, theirs = case.build_small(), case.build_small()
    if theirs.torch_step is None:
        pytest.skip("no rival")
    for _ in range(2):
        torch.testing.assert_close(ours.step(), theirs.torch_step(), rtol=1e-4, atol=1e-5)


@BY_NAME
def test_every_case_counts_at_least_its_states(case: Case) -> None:
    """Twice the rows, twice the states: the bytes grow, but weights count once."""
    few = case.make(3, torch.device("cpu"), **case.small).bytes
    many = case.make(6, torch.device("cpu"), **case.small).bytes
    assert few < many <= 2 * few


def test_without_a_gpu_it_says_so_and_checks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", "outer/gla", "cell/gru"]) == 0
    *text, last = capsys.readouterr().out.splitlines()
    assert text[0].startswith("No GPU: nothing is timed")
    report = json.loads(last)
    assert report["device"] is None and report["agrees"]
    assert [row["case"] for row in report["rows"]] == ["outer/gla", "cell/gru"]
    assert all(row["microseconds"] is None for row in report["rows"])


def test_a_wrong_kernel_fails_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = CASES[0].make
    monkeypatch.setattr(
        "kernels.bench.cases.CASES", (replace(CASES[0], make=lambda *a, **s: _wrong(right(*a, **s))),)
    )  # fmt: skip
    assert main([]) == 1
    out = capsys.readouterr().out
    assert "DISAGREES" in out and not json.loads(out.splitlines()[-1])["agrees"]


def _wrong(made: Trial) -> Trial:
    return replace(made, step=lambda: made.step() * 1.01)


def test_an_unknown_case_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--only", "outer/nothing"])
    assert "is in none of outer/" in capsys.readouterr().err


def test_ratios() -> None:
    """4000 bytes in 2 us against a copy of 2.5 GB/s; others take 3 and 5 us."""
    made = trial(fla=lambda: None, torch_step=lambda: torch.ones(1))
    row = measure(CASE, 64, made, 2.5e9, FakeClock(2e-6, 3e-6, 5e-6))
    assert row.microseconds == pytest.approx(2.0)
    assert row.share_of_copy == pytest.approx(0.8)
    assert row.over_fla == pytest.approx(1.5) and row.over_compiled == pytest.approx(2.5)
    assert "80%" in line(row) and as_json([row], "gpu", 2.5e9)["rows"][0]["units"] == 64


def test_a_disagreeing_case_is_never_timed() -> None:
    for step in (lambda: torch.full((3, 2), 1.1), lambda: torch.full((3, 2), float("nan"))):
        row = measure(CASE, 64, trial(step=step), 1e9, FakeClock())
        assert not row.agrees and row.microseconds is None


def test_a_rival_that_fails_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    made = trial(fla=lambda: None)
    row = measure(CASE, 64, made, 1e9, FakeClock(2e-6, RuntimeError("no such kernel")))
    assert row.over_fla is None and row.microseconds is not None
    assert "op/model: not compared: RuntimeError: no such kernel" in capsys.readouterr().out


def test_a_copy_reads_and_writes() -> None:
    assert copy_bandwidth(FakeClock(1e-6), torch.device("cpu"), size=1000) == pytest.approx(2e9)


def test_units_are_rows_times_heads() -> None:
    seen: list[int] = []
    case = replace(CASE, make=lambda rows, device, **size: seen.append(rows) or trial())  # type: ignore[func-returns-value]
    for units in (64, 4096, 2):
        case.build(units, torch.device("cpu"))
    assert seen == [16, 1024, 1]
    assert Row("x", 1, float("nan")).agrees is False
