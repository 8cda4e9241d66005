"""``python -m protos [FOLDER]``: generate the Python code of every .proto file, beside it or under FOLDER."""

import re
import sys
from pathlib import Path

HERE = Path(__file__).parent


def generate(target: Path) -> list[Path]:
    """Write *_pb2.py, *_pb2.pyi and *_pb2_grpc.py under `target`, and return their paths."""
    import grpc_tools
    from grpc_tools import protoc

    sources = [str(p.relative_to(HERE)) for p in sorted(HERE.rglob("*.proto"))]
    well_known = Path(grpc_tools.__file__).parent / "_proto"
    outputs = [f"--{kind}={target}" for kind in ("python_out", "pyi_out", "grpc_python_out")]
    if protoc.main(["protoc", f"-I{HERE}", f"-I{well_known}", *outputs, *sources]):
        raise SystemExit("protoc failed")
    packages = "|".join(sorted({Path(source).parts[0] for source in sources}))
    made = [p for p in sorted(target.rglob("*_pb2*.py*")) if p.suffix in (".py", ".pyi")]
    for path in made:
        # protoc imports from the root of the .proto files; in this house that root is a package.
        text = path.read_text()
        text = re.sub(rf"^from ({packages})\b", r"from protos.\1", text, flags=re.MULTILINE)
        path.write_text(text)
    return made


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
