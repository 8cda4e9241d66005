"""docs/serving.md names every key of the serving file with its default, and its example can be served."""

import re
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel

from serving.config import Autoscaling, GatewaySpec, LogSpec, ModelSpec, ServeConfig, TracingSpec

TEXT = (Path(__file__).parent.parent.parent / "docs/serving.md").read_text()
ROWS = re.findall(r"^\| (`[^|]+`) \|([^|]*)\|", TEXT, re.M)  # the keys of a row, and their defaults


def test_its_example_is_a_serving_file() -> None:
    (example,) = re.findall(r"^```yaml\n(.*?)^```$", TEXT, re.M | re.S)
    config = ServeConfig.parse(yaml.safe_load(example), "docs/serving.md")
    assert [model.name for model in config.models] == ["gla", "gla-large-batch"]


@pytest.mark.parametrize("kind", [ServeConfig, ModelSpec, Autoscaling, GatewaySpec, LogSpec, TracingSpec])
def test_every_key_is_told(kind: type[BaseModel]) -> None:
    for name, field in kind.model_fields.items():
        if any(isinstance(part, type) and issubclass(part, BaseModel) for part in get_args(field.annotation)):
            assert f"`{name}`" in TEXT, name
            continue
        assert any(f"`{name}`" in keys for keys, _ in ROWS), name


@pytest.mark.parametrize("kind", [ModelSpec, GatewaySpec, LogSpec, TracingSpec])
def test_defaults_are_those_of_the_code(kind: type[BaseModel]) -> None:
    """Where they are numbers that the code has, too. `replicas` and `cpus` are in two tables."""
    for name, field in kind.model_fields.items():
        if isinstance(field.default, bool) or not isinstance(field.default, (int, float)):
            continue
        assert any(
            float(value) == field.default for keys, values in ROWS for value in _of(name, keys, values)
        ), f"{name} = {field.default}"


def _of(name: str, keys: str, values: str) -> list[Any]:
    """The default of one key in a row that may have two."""
    names, defaults = re.findall(r"`(\w+)`", keys), values.strip().split(", ")
    found = [default for key, default in zip(names, defaults, strict=False) if key == name]
    return [value for value in found if re.fullmatch(r"[\d.]+", value)]
