"""Compile Triton kernels for sm_90 on a machine without a GPU, and report what they cost.

The compiler works in a child process, because the interpreter, which the other tests use, replaces it for a
whole process. Starting one takes seconds, so there is one child for all kernels; it ends with its parent.
"""

import functools
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import IO, Any


def compile_ahead(module: str, kernel: str, options: dict[str, Any]) -> dict[str, int]:
    """Compile a kernel with options {"signature": {name: type}, "constexprs": {name: value}, "warps": n} ->
    {"registers" per thread, "spills" in bytes, "shared" memory in bytes, "vector_loads"}.

    Raises AssertionError with the compiler's message where it does not compile.
    """
    child, errors = _child()
    assert child.stdin and child.stdout
    child.stdin.write(json.dumps([module, kernel, options]) + "\n")
    child.stdin.flush()
    answer = child.stdout.readline()
    if not answer:
        _child.cache_clear()
        errors.seek(0)
        raise AssertionError(f"{kernel}: the compiler died:\n{errors.read()[-4000:]}")
    result = json.loads(answer)
    if "error" in result:
        raise AssertionError(f"{kernel} does not compile:\n{result['error'][-4000:]}")
    return result


@functools.cache
def _child() -> tuple[subprocess.Popen[str], IO[str]]:
    """The child, and the file that takes its complaints."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - it lives as long as the child
    command = [sys.executable, "-m", __name__]
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=env
    )
    return child, errors


def _serve() -> None:
    """One line of JSON in, one out, until the parent is gone."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the compiler prints is no answer
    for line in sys.stdin:
        try:
            result: dict[str, Any] = _compile(*json.loads(line))
        except Exception:
            result = {"error": traceback.format_exc()}
        print(json.dumps(result), file=answers, flush=True)


def _compile(module: str, kernel: str, options: dict[str, Any]) -> dict[str, int]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(importlib.import_module(module), kernel)
    names = function.arg_names
    signature = {name: options["signature"].get(name, "constexpr") for name in names}
    constexprs = {(names.index(name),): value for name, value in options["constexprs"].items()}
    # A launch finds the same of the engine's pools: strides are multiples of 16 floats.
    even = [i for i, name in enumerate(names) if signature[name][0] == "*" or name.endswith("_stride")]
    aligned = {(i,): [["tt.divisibility", 16]] for i in even}
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
        "shared": made.metadata.shared,
        "vector_loads": len(re.findall(r"ld\.global[.\w]*\.v[24]", made.asm["ptx"])),
    }


if __name__ == "__main__":
    _serve()
