"""The house rules that a reader relies on: who imports whom, and that generated code is what its sources say."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "protos": set(),
    "kernels": set(),
    "models": {"kernels"},
    "serving": {"models", "kernels", "protos"},
    "loadtest": {"protos"},
}


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
    return found


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_go_down_only(package: str) -> None:
    for file in (ROOT / package).rglob("*.py"):
        tops = {name.partition(".")[0] for name in imports(file)} & ALLOWED.keys()
        assert tops <= ALLOWED[package] | {package}, (
            f"{file.relative_to(ROOT)} imports {tops - ALLOWED[package]}"
        )


@pytest.mark.parametrize("folder", ["serving/engine", "serving/gateway"])
def test_engine_and_gateway_know_neither_ray_nor_each_others_world(folder: str) -> None:
    forbidden = {"ray"} | ({"grpc", "protos"} if folder == "serving/engine" else {"torch"})
    for file in (ROOT / folder).rglob("*.py"):
        tops = {name.partition(".")[0] for name in imports(file)}
        assert not tops & forbidden, f"{file.relative_to(ROOT)} imports {tops & forbidden}"


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("serving", ["torch", "ray", "grpc"]),
        ("serving.gateway.rpc", ["torch", "ray"]),
        ("serving.engine.engine", ["ray", "grpc", "google.protobuf"]),
        ("serving.engine.scheduler", ["torch"]),
        ("loadtest.run", ["torch", "ray", "serving"]),
    ],
)
def test_importing_a_part_does_not_load_what_it_does_not_need(module: str, absent: list[str]) -> None:
    code = f"import sys, {module}; print([m for m in {absent!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_generated_code_is_what_the_protos_say(tmp_path: Path) -> None:
    from protos.__main__ import generate

    made = generate(tmp_path)
    assert len(made) >= 9
    for path in made:
        checked_in = ROOT / "protos" / path.relative_to(tmp_path)
        assert checked_in.read_text() == path.read_text(), (
            f"{checked_in.relative_to(ROOT)}: run `make protos`"
        )


def test_tracked_files_are_small() -> None:
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    sizes = {
        name: (ROOT / name).stat().st_size for name in listed.stdout.splitlines() if (ROOT / name).is_file()
    }
    assert max(sizes.values()) <= 10_000_000, max(sizes, key=lambda name: sizes[name])
    assert sum(sizes.values()) <= 60_000_000
