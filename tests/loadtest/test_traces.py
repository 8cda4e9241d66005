"""Traces are read, drawn and scaled to a model."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.errors import FlagError
from loadtest.traces import PUBLISHED, Row, Scale, read_trace

AZURE = Path(__file__).parents[3] / "shared/data/azure_llm_2023_conv_first_5_min.csv"


@pytest.mark.skipif(not AZURE.exists(), reason="needs ../shared/data, which the project does not carry")
def test_azures_own_file() -> None:
    rows = read_trace(AZURE)
    assert rows[:3] == [Row(0.0, 374, 44), Row(rows[1].at, 396, 109), Row(rows[2].at, 879, 55)]
    assert rows[1].at == pytest.approx(4.314579, abs=1e-6)
    assert len(rows) == 1445 and rows[-1].at == pytest.approx(299.884, abs=0.001)


def test_azures_later_format(tmp_path: Path) -> None:
    file = tmp_path / "trace.csv"
    file.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2024-05-10 00:00:01.5+00:00,7,3\n2024-05-10 00:00:00.000000+00:00,2162,0\n"
    )
    assert read_trace(file) == [Row(0.0, 2162, 1), Row(1.5, 7, 3)]


def test_mooncakes_format(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text(
        '{"timestamp": 27000, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47]}\n\n'
        '{"timestamp": 30000, "input_length": 6472, "output_length": 26, "hash_ids": [46, 48]}\n'
    )
    assert read_trace(file) == [Row(0.0, 6955, 52, (46, 47)), Row(3.0, 6472, 26, (46, 48))]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "is empty"),
        ("a,b\n1,2\n", "line 1: must be JSON, or a header with ContextTokens, GeneratedTokens, TIMESTAMP"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,2\n", "line 2: Invalid isoformat"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10,1\n", "line 2: "),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "has no requests"),
        ('{"timestamp": 1, "input_length": 5}\n', "line 1: no field 'output_length'"),
        ('{"timestamp": 1, "input_length": 5, "output_length": -5}\n', "line 1: a length is negative"),
        ("{}\n", "line 1: no field 'timestamp'"),
        ("{\n", "line 1: Expecting"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_its_line(
    tmp_path: Path, content: str, complaint: str
) -> None:
    file = tmp_path / "trace"
    file.write_text(content)
    with pytest.raises(FlagError) as error:
        read_trace(file)
    assert str(error.value).startswith(f"--trace {file}: {complaint}")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FlagError, match="cannot be read: No such file"):
        read_trace(tmp_path / "none")


lengths = st.integers(1, 100_000)
rows = st.lists(st.builds(Row, st.just(0.0), lengths, lengths), min_size=1, max_size=30)


@given(rows, st.integers(2, 5000), st.none() | st.integers(1, 200))
def test_scaled_lengths_fit_the_model(rows: list[Row], limit: int, output_limit: int | None) -> None:
    scale = Scale.of("auto", rows, limit, output_limit)
    assert scale.factor <= 1
    for row in rows:
        scaled = scale.apply(row)
        assert scaled.input >= 1 and scaled.output >= 1
        assert scaled.input + scaled.output <= limit
        assert scaled.output <= (output_limit or limit)


@given(rows, st.integers(2, 5000))
def test_scaling_shrinks_all_alike_and_cuts_hardly_any(rows: list[Row], limit: int) -> None:
    many = rows * 20
    scale = Scale.of("auto", many, limit, None)
    for row in many:
        scaled = scale.apply(row)
        if (
            row.input * scale.factor > 1
            and row.output * scale.factor > 1
            and scaled.input + scaled.output < limit - 1
        ):
            assert abs(scaled.input - row.input * scale.factor) <= 1
            assert abs(scaled.output - row.output * scale.factor) <= 1
    # One percent beyond the percentile, and those that rounding lifts over the limit.
    longest = sorted(row.input + row.output for row in many)[-1]
    at_limit = sum(
        row.input + row.output >= 0.99 * min(longest, limit / scale.factor) - 1 / scale.factor for row in many
    )
    assert scale.clipped <= at_limit


def test_lengths_that_fit_stay(tmp_path: Path) -> None:
    rows = [Row(0.0, 10, 20), Row(1.0, 30, 5)]
    for scale in (
        Scale.of("auto", rows, 100, None),
        Scale.of("auto", rows, 0, None),
        Scale.of("1", rows, 100, None),
    ):
        assert [scale.apply(row) for row in rows] == rows and scale.clipped == 0


@pytest.mark.parametrize("name", PUBLISHED)
def test_synthetic_lengths_have_the_published_parameters(name: str) -> None:
    published = PUBLISHED[name]
    drawn = list(islice(published.draw(np.random.default_rng(0)), 20_000))
    for values, (mu, sigma) in (
        ([row.input for row in drawn], published.input),
        ([row.output for row in drawn], published.output),
    ):
        assert np.median(values) == pytest.approx(np.exp(mu), rel=0.05)
        # Lengths of a few tokens are rounded, so the spread is taken where they are long.
        assert np.log(np.percentile(values, 97.7) / np.median(values)) == pytest.approx(2 * sigma, rel=0.05)
    correlation = np.corrcoef(np.log([row.input for row in drawn]), np.log([row.output for row in drawn]))[
        0, 1
    ]
    assert abs(correlation) < 0.03
