"""Compile Triton kernels for sm_90 on a machine without a GPU, and report what they cost.

Runs as a program of its own (``python -m tests.kernels.compile_ahead MODULE KERNEL JSON``): the interpreter, which
the other tests use, replaces the compiler for a whole process. JSON: {"signature": {name: type}, "constexprs":
{name: value}, "warps": n}; prints {"registers", "spills", "vector_loads"}.
"""

import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def compile_ahead(module: str, kernel: str, options: dict[str, Any]) -> dict[str, int]:
    """As the program above, in a child process."""
    import os

    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", __name__, module, kernel, json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        raise AssertionError(f"{kernel} does not compile:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def _compile(module: str, kernel: str, options: dict[str, Any]) -> dict[str, int]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(importlib.import_module(module), kernel)
    names = function.arg_names
    signature = {name: options["signature"].get(name, "constexpr") for name in names}
    constexprs = {(names.index(name),): value for name, value in options["constexprs"].items()}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    source = ASTSource(fn=function, signature=signature, constexprs=constexprs, attrs=aligned)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": options["warps"]})
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(made.asm["cubin"])
        cubin.flush()
        usage = subprocess.run(
            [str(tools / "cuobjdump"), "-res-usage", cubin.name], capture_output=True, text=True, check=True
        ).stdout
    registers = re.search(r"REG:(\d+)", usage)
    stack = re.search(r"STACK:(\d+)", usage)
    local = re.search(r"LOCAL:(\d+)", usage)
    assert registers and stack and local, usage
    return {
        "registers": int(registers[1]),
        "spills": int(stack[1]) + int(local[1]),
        "vector_loads": len(re.findall(r"ld\.global[.\w]*\.v[24]", made.asm["ptx"])),
    }


if __name__ == "__main__":
    print(json.dumps(_compile(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))))
