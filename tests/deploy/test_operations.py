"""What docs/operations.md shows is so: its files exist, its YAML is what the code takes, its commands are there."""

import copy
import re
import shlex
from collections.abc import Callable
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from serving.cli import app
from serving.config import Autoscaling, ServeConfig, validated
from serving.gateway.keys import KeyFile
from tests.deploy.manifests import CRD, DEPLOY, OVERLAYS, ROOT, only, rayservice_schema, rendered

TEXT = (ROOT / "docs" / "operations.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.M | re.S)
YAML = [yaml.safe_load(body) for kind, body in BLOCKS if kind == "yaml"]
COMMANDS = [line for kind, body in BLOCKS if kind == "sh" for line in body.replace("\\\n", " ").splitlines()]


def with_head_memory(raw: dict[str, Any]) -> None:
    service = copy.deepcopy(only(rendered("cpu"), "RayService"))
    service["spec"]["rayClusterConfig"].update(raw)
    rayservice_schema().validate(service)


KINDS: dict[str, Callable[[dict[str, Any]], object]] = {
    "models": lambda raw: validated(ServeConfig, raw, "docs"),
    "keys": lambda raw: validated(KeyFile, raw, "docs"),
    "autoscaling": lambda raw: validated(Autoscaling, raw["autoscaling"], "docs"),
    "gcsFaultToleranceOptions": with_head_memory,
}


@pytest.mark.parametrize("raw", YAML, ids=lambda raw: next(iter(raw)))
def test_yaml_is_what_the_code_takes(raw: dict[str, Any]) -> None:
    first = next(iter(raw))
    if first == "gcsFaultToleranceOptions" and not CRD.exists():
        pytest.skip("the schema of RayService is not there")
    KINDS[first](raw)


def test_files_that_are_named_exist() -> None:
    named = set(re.findall(r"`((?:deploy|serving|tests|docs)/[\w./-]+)`", TEXT))
    named |= {word for command in COMMANDS for word in command.split() if word.startswith("deploy/")}
    assert len(named) > 5
    missing = {name for name in named if not (ROOT / name).exists()}
    assert not missing


def test_overlays_are_the_ones_that_there_are() -> None:
    table = TEXT.partition("| overlay | what |")[2].partition("\n\n")[0]
    assert set(re.findall(r"^\| `([\w-]+)` \|", table, re.M)) == set(OVERLAYS)


def test_commands_of_ours_are_there() -> None:
    ours = [shlex.split(c, comments=True) for c in COMMANDS if c.startswith("fathom ")]
    assert ours
    for words in ours:
        done = CliRunner().invoke(app, [words[1], "--help"])
        assert done.exit_code == 0, words
        for flag in (word for word in words if word.startswith("--")):
            assert flag in done.output, words


def test_a_key_from_the_command_is_one_that_the_file_takes() -> None:
    done = CliRunner().invoke(app, ["keygen", "alice"])
    assert done.exit_code == 0
    keys = validated(KeyFile, {"keys": yaml.safe_load(done.stdout)}, "keygen").keys
    assert [key.name for key in keys] == ["alice"]


def test_the_front_is_given_every_variable_that_it_asks_for() -> None:
    needed = set(re.findall(r"\$\{(FATHOM_\w+)\}", (DEPLOY / "tls" / "haproxy.cfg").read_text()))
    command = next(c for c in COMMANDS if "haproxy -f" in c)
    assert needed == set(re.findall(r"(FATHOM_\w+)=", command))
    front = only(rendered("cpu"), "Deployment", "fathom-front")["spec"]["template"]["spec"]
    given = {entry["name"] for entry in front["containers"][0]["env"]}
    assert needed - {"FATHOM_CLIENT_CA"} <= given
