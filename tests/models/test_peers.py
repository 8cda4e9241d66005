"""The benchmark against transformers, on a model so small that only its line of JSON is of interest."""

import json

import pytest

pytest.importorskip("transformers")

from serving.bench import peers


def test_the_same_tokens_and_a_row_for_each_batch(capsys: pytest.CaptureFixture[str]) -> None:
    shape = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
    peers.run([1, 5], tokens=6, rounds=1, threads=1, shape=shape, processor_time=True)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["bench"] == "peers"
    assert [row["batch"] for row in result["rows"]] == [1, 5]
    for row in result["rows"]:
        assert row["equal_tokens"] and row["stored16_equal_tokens"]
        assert row["ratio"] > 0 and row["share_of_limit"] > 0
