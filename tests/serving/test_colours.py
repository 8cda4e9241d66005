"""Colours of depths in the terminal."""

import pytest

from protos.fathom.v1 import inference_pb2 as pb
from serving import client


@pytest.mark.parametrize("deepest", [1, 2, 4, 13, 32, 300])
def test_colours_spread_over_all_depths_of_the_model(deepest: int) -> None:
    shades = [client.SHADES.index(client.shade(depth, deepest)) for depth in range(deepest + 1)]
    assert shades == sorted(shades)
    assert shades[0] == shades[1] == 0
    assert shades[-1] == (len(client.SHADES) - 1 if deepest > 1 else 0)
    assert len(set(shades)) == min(deepest, len(client.SHADES))


def test_what_is_deeper_than_known_is_the_last_colour() -> None:
    assert client.shade(9, 4) == client.SHADES[-1]


def test_each_token_has_its_colour(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = []
    monkeypatch.setattr("typer.secho", lambda text, nl, fg: said.append((text, fg)))
    message = pb.GenerateResponse(text="abcd", text_lengths=[1, 2], depths=[1, 32])
    client.coloured(message, 32)
    assert said == [("a", client.SHADES[0]), ("bc", client.SHADES[-1])]
    assert capsys.readouterr().out == "d"
