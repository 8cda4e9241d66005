"""The command lines that people type: what they print, write and refuse."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from loadtest import cli
from loadtest.result import Result
from tests.loadtest.conftest import Start


class Ended:
    def __init__(self, code: int, out: str, err: str):
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def loadtest(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """python -m loadtest, in this process."""

    def run(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["loadtest", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return Ended(int(ended.value.code or 0), captured.out, captured.err)

    return run


def test_a_closed_loop_as_in_the_readme(start_fake: Start, loadtest: Any, tmp_path: Path) -> None:
    fake, target = start_fake()
    file = tmp_path / "r.json"
    ended = loadtest(
        "--target", target, "--concurrency", 16, "--requests", 64, "--max-tokens", 8, "--json", file
    )  # fmt: skip
    assert ended.code == 0, ended.err
    assert "64/64" in ended.err and "time to first token" in ended.out and "64 ok, 0 failed" in ended.out
    result = Result.read(file)
    assert fake.requests == 64 and result.failures == {} and result.requests.ok == 64
    assert result.output_tokens == 64 * 8 and result.lengths.short == 0
    # A server never gives a token early, however busy the machine is.
    assert result.ttft_ms.min is not None and result.ttft_ms.min >= 10
    assert result.e2e_ms.min is not None and result.e2e_ms.min >= 17
    raw = json.loads(file.read_text())
    assert (
        raw["schema"] == "fathom.loadtest/1" and raw["ttft_ms"]["p50"] >= 10 and raw["offered_rate"] is None
    )


def test_an_open_loop_with_objectives_policies_and_a_report(
    start_fake: Start, loadtest: Any, tmp_path: Path
) -> None:
    _, target = start_fake()
    ended = loadtest(
        "--target", target, "--rate", 100, "--duration", 0.5, "--max-tokens", 4, "--slo", "ttft=5s",
        "--depth", "full:0.5", "--depth", "fixed=2:0.5", "--no-progress",
        "--json", tmp_path / "r.json", "--html", tmp_path / "r.html", "--plots", tmp_path / "plots",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    assert ended.err == "" and "offered" in ended.out and "goodput" in ended.out and "fixed=2" in ended.out
    result = Result.read(tmp_path / "r.json")
    assert result.goodput is not None and result.goodput.share == 1
    assert result.policies["full"].mean_depth == 4 and result.policies["fixed=2"].mean_depth == 2
    page = (tmp_path / "r.html").read_text()
    assert page.count("<svg") == 5
    assert re.search(r'(src|href)="[^#]', page) is None  # it needs nothing but itself
    pictures = sorted(path.name for path in (tmp_path / "plots").iterdir())
    assert pictures == ["first_token.png", "latencies.png", "policies.png", "rates.png", "tokens.png"]
    assert all((tmp_path / "plots" / name).read_bytes().startswith(b"\x89PNG") for name in pictures)


@pytest.mark.parametrize("transport", ["oip", "oip-unary", "openai"])
def test_other_servers(start_fake: Start, loadtest: Any, tmp_path: Path, transport: str) -> None:
    fake, target = start_fake(fail_every=4, fail_status="RESOURCE_EXHAUSTED")
    ended = loadtest(
        "--target", target, "--transport", transport, "--concurrency", 4, "--requests", 12, "--max-tokens", 6,
        "--turns", 2, "--no-progress", "--json", tmp_path / "r.json",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    result = Result.read(tmp_path / "r.json")
    assert result.failures == {"HTTP_429" if transport == "openai" else "RESOURCE_EXHAUSTED": 3}
    assert (result.requests.ok, result.output_tokens, fake.requests) == (9, 54, 12)
    assert result.ttft_ms.min is not None and result.ttft_ms.min >= (15 if transport == "oip-unary" else 10)
    assert result.itl_ms.count == (0 if transport == "oip-unary" else 9 * 5)


def test_tokens_that_come_together(start_fake: Start, loadtest: Any, tmp_path: Path) -> None:
    _, target = start_fake(tokens_per_message=4)
    flags = (
        "--concurrency",
        2,
        "--requests",
        4,
        "--max-tokens",
        16,
        "--no-progress",
        "--json",
        tmp_path / "r.json",
    )
    assert loadtest("--target", target, *flags).code == 0
    result = Result.read(tmp_path / "r.json")
    assert (result.output_tokens, result.itl_ms.count, result.message_gap_ms.count) == (64, 4 * 15, 4 * 3)


def test_search_finds_a_rate_between_one_that_works_and_one_that_does_not(
    start_fake: Start, loadtest: Any, tmp_path: Path
) -> None:
    _, target = start_fake(ttft=0.04, itl=0.0, slots=2)  # 50 requests/s at most
    ended = loadtest(
        "search", "--target", target, "--slo", "ttft=400ms", "--max-tokens", 1, "--arrival", "constant",
        "--duration", 0.6, "--drain", 0.2, "--first-rate", 10, "--tolerance", 0.9, "--attainment", 0.8,
        "--no-progress",
        "--json", tmp_path / "s.json", "--html", tmp_path / "s.html",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    found = json.loads((tmp_path / "s.json").read_text())
    assert found["schema"] == "fathom.loadtest.search/1" and 10 <= found["rate"] < 160
    failed = [probe["rate"] for probe in found["probes"] if not probe["met"]]
    met = [probe["rate"] for probe in found["probes"] if probe["met"]]
    assert max(met) == found["rate"] and min(failed) <= 1.9 * found["rate"]
    assert "within ttft <= 400 ms" in ended.out
    assert (tmp_path / "s.html").read_text().count("<svg") == 2
    assert loadtest("report", tmp_path / "s.json", "--plots", tmp_path / "plots").code == 0
    assert (tmp_path / "plots" / "attainment.png").exists()


def test_compare(start_fake: Start, loadtest: Any, tmp_path: Path) -> None:
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    for file, ttft in ((a, 0.01), (b, 0.2)):
        _, target = start_fake(ttft=ttft)
        flags = ("--concurrency", 2, "--requests", 4, "--max-tokens", 2, "--no-progress", "--json", file)
        assert loadtest("--target", target, *flags).code == 0
    ended = loadtest("compare", a, b)
    assert ended.code == 0 and "ttft p99 ms" in ended.out and "--target: A 127.0.0.1" in ended.out
    worse = loadtest("compare", a, b, "--max-regression", 0.5)
    assert worse.code == 1 and "ttft p50 ms" in worse.err
    assert loadtest("compare", a, a, "--max-regression", 0).code == 0
    assert "cannot be read" in loadtest("compare", a, tmp_path / "c.json").err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((), "--target: is required: HOST:PORT"),
        (("--target", "localhost"), "--target localhost: must be HOST:PORT"),
        (("--target", "localhost:0"), "--target localhost:0: must be HOST:PORT, with a port from 1 to 65535"),
        (("--rate", "-1"), "--rate -1.0: should be greater than 0"),
        (("--rate", "nan"), "--rate nan: should be a finite number"),
        (("--rate", "5", "--concurrency", "4"), "--rate 5.0: cannot go with --concurrency"),
        (("--concurrency", "0"), "--concurrency 0: should be greater than or equal to 1"),
        (("--transport", "http"), "--transport http: should be 'fathom', 'oip', 'oip-unary' or 'openai'"),
        (("--burstiness", "2"), "--burstiness 2.0: needs --rate"),
        (("--rate", "5", "--arrival", "poisson", "--burstiness", "2"), "--burstiness 2.0: is for --arrival"),
        (("--rate", "5", "--ramp-from", "1"), "--ramp-from 1.0: needs --rate, where it ends, and --duration"),
        (("--duration", "5", "--warmup", "5"), "--warmup 5.0: must be less than --duration 5"),
        (("--slo", "ttft=200"), "--slo ttft=200: must be METRIC=TIME"),
        (("--slo", "ttft=1s", "--slo", "ttft=2s"), "--slo ttft=1s: ttft is given twice"),
        (("--depth", "deep"), "--depth deep: must be POLICY"),
        (("--depth", "full", "--transport", "openai"), "--depth full: needs --transport fathom, not openai"),
        (("--depth", "router"), "--depth router: fake follows full, fixed"),
        (("--max-depth", "3"), "--max-depth 3: needs --depth"),
        (("--model", "other"), "--model other: must be one of fake"),
        (("--model", "other", "--transport", "openai"), "--model other: must be one of fake"),
        (("--model", "other", "--transport", "oip"), "--model other: model other: must be fake"),
        (("--max-tokens", "2000000"), "--max-tokens 2000000: 2000000 are over the 1048576 tokens"),
        (("--trace", "/nowhere"), "--trace /nowhere: cannot be read: No such file"),
        (("--prompt", "a", "--input-tokens", "3"), "--input-tokens 3: cannot go with --prompt"),
        (("--prompt-file", "/nowhere"), "--prompt-file /nowhere: no such file"),
        (("--length-scale", "half"), "--length-scale half: must be auto or a number > 0"),
        (("--header", "x"), "--header x: must be NAME=VALUE"),
        (("--json", "/nowhere/r.json"), "--json /nowhere/r.json: there is no folder /nowhere"),
        (("--cert-file", "/nowhere"), "--cert-file /nowhere: goes together with --key-file"),
        (("--ca-file", "/nowhere"), "--ca-file /nowhere: needs --tls"),
        (("search",), "--slo: is required"),
        (("search", "--slo", "ttft=1s", "--rate", "4"), "--rate 4.0: cannot go with search"),
        (("search", "--slo", "ttft=1s", "--attainment", "2"), "--attainment 2.0: should be less than"),
    ],
)  # fmt: skip
def test_a_flag_that_cannot_be_is_named_with_its_value_and_limit(
    start_fake: Start, loadtest: Any, arguments: tuple[str, ...], complaint: str
) -> None:
    target = () if not arguments or "--target" in arguments else ("--target", start_fake()[1])
    command = arguments[:1] if arguments[:1] == ("search",) else ()
    ended = loadtest(*command, *target, *arguments[len(command) :], "--no-progress")
    assert ended.code == 2
    assert ended.err.startswith(f"Error: {complaint}"), ended.err
    assert ended.err.count("\n") == 1


def test_a_server_that_is_not_there(loadtest: Any, unused_tcp_port: int) -> None:
    for transport in ("fathom", "openai"):
        ended = loadtest("--target", f"localhost:{unused_tcp_port}", "--transport", transport)
        assert ended.code == 1 and ended.err.startswith(
            f"Error: --target localhost:{unused_tcp_port}: cannot be reached"
        )
        assert "onnection refused" in ended.err or "Connect call failed" in ended.err


def test_when_every_request_fails(start_fake: Start, loadtest: Any) -> None:
    _, target = start_fake(fail_every=1)
    ended = loadtest("--target", target, "--requests", 3, "--no-progress")
    assert ended.code == 1 and "no request ended well" in ended.err
    assert "INTERNAL" in ended.out and "this request was to fail" in ended.out


def test_ctrl_c_prints_the_figures_so_far(start_fake: Start, tmp_path: Path) -> None:
    fake, target = start_fake()
    command = (
        sys.executable,
        "-m",
        "loadtest",
        "--target",
        target,
        "--concurrency",
        "2",
        "--duration",
        "600",
    )
    harness = subprocess.Popen(
        [*command, "--json", str(tmp_path / "r.json")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert harness.stderr and harness.stdout
    while fake.requests < 10:  # it is under way
        assert harness.poll() is None
        time.sleep(0.01)
    harness.send_signal(signal.SIGINT)
    out, _ = harness.communicate(timeout=60)
    assert harness.returncode == 130
    assert "time to first token" in out and "Interrupted" in out
    result = Result.read(tmp_path / "r.json")
    assert result.interrupted and result.requests.ok >= 8 and result.requests.unfinished <= 2
