"""From plain to recursive: which layers stand for which, and equality at full rank."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from models.convert import Recursion, convert
from models.errors import ConfigError
from models.load import load
from serving import LLM, SamplingParams
from tests import tiny
from tests.depth.test_depth import GLA, LLAMA
from tests.models.small import SMALL

DEEP: dict[str, Any] = {**LLAMA, "num_hidden_layers": 8, "attention_bias": True}
HYBRID: dict[str, Any] = {
    **SMALL["recurrent_gemma"],
    "num_hidden_layers": 10,
}  # 2 recurrences, then attention
DEEP_GLA: dict[str, Any] = {**GLA, "num_hidden_layers": 6}


@pytest.mark.parametrize(
    ("config", "how"),
    [
        (DEEP, Recursion("cycle", 4, "lower")),
        (DEEP, Recursion("middle_cycle", 3, "stepwise", alpha=7.0)),
        (DEEP_GLA, Recursion("middle_sequence", 2, "average")),
    ],
    ids=["cycle", "middle_cycle", "middle_sequence gla"],
)
def test_at_full_rank_it_equals_the_original(tmp_path: Path, config: dict[str, Any], how: Recursion) -> None:
    source = tiny.checkpoint(tmp_path / "plain", config, text=False)
    strict = convert(source, tmp_path / "strict", how)
    assert strict.divergence > 1e-3 and strict.agreement < 1, "the layers are too alike to tell anything"
    equal = convert(source, tmp_path / "equal", replace(how, rank=config["hidden_size"]))
    assert equal.largest < 1e-3 and equal.agreement == 1 and equal.divergence < 1e-6
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    plain = LLM(load(source, dtype="float32"), slots=1).generate([[5, 6, 7]], params)[0]
    served = LLM(load(tmp_path / "equal", dtype="float32"), slots=1).generate([[5, 6, 7]], params)[0]
    assert served.token_ids == plain.token_ids and set(served.depths) != {1}


def test_strict_layers_are_the_ones_that_were_chosen(tmp_path: Path) -> None:
    source = tiny.checkpoint(tmp_path / "plain", DEEP, text=False)
    original = load(source, dtype="float32").model
    chosen = {"stepwise": [[1], [6]], "lower": [[1], [2]], "average": [[1, 3, 5], [2, 4, 6]]}
    for start, origins in chosen.items():
        convert(source, tmp_path / start, Recursion("middle_cycle", 3, start))  # type: ignore[arg-type]
        shared = load(tmp_path / start, dtype="float32").model
        for block, expected in zip([0, 1, 2, 3], [[0], *origins, [7]], strict=True):
            for name, parameter in shared.blocks[block].named_parameters():
                average = torch.stack([original.blocks[i].get_parameter(name) for i in expected]).mean(0)
                torch.testing.assert_close(parameter, average)


@pytest.mark.parametrize(
    ("config", "how", "words"),
    [
        (DEEP, Recursion("cycle", 3), "recursions = 3.*divide the 8 layers"),
        (DEEP, Recursion("middle_cycle", 1), "recursions = 1"),
        (DEEP, Recursion("cycle", 2, rank=-1), "rank = -1"),
        (DEEP, Recursion("cycle", 2, rank=21), "rank = 21.*full rank of this model's projections is 20"),
        (tiny.LOOPED, Recursion("cycle", 2), "recursive already"),
        (
            HYBRID,
            Recursion("cycle", 2),
            "sharing = 'cycle': layer 0 would stand for layer 5 .*of another kind",
        ),
        (HYBRID, Recursion("middle_cycle", 2, rank=2), "sharing = 'middle_cycle': layer .*of another kind"),
    ],
    ids=["3 of 8", "once", "rank", "above full rank", "recursive", "hybrid", "hybrid's ends"],
)
def test_impossible_conversions_are_refused(
    tmp_path: Path, config: dict[str, Any], how: Recursion, words: str
) -> None:
    source = tiny.checkpoint(tmp_path / "plain", config, text=False)
    with pytest.raises(ConfigError, match=words):
        convert(source, tmp_path / "target", how)
    assert not (tmp_path / "target").exists()


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    source = tiny.checkpoint(tmp_path / "plain", DEEP, text=False)
    before = (source / "model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match=r"target.*new or an empty folder"):
        convert(source, source, Recursion("cycle", 2))
    assert (source / "model.safetensors").read_bytes() == before
