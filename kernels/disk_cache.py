"""Where numba keeps what it has compiled, and that it is what runs.

It looks at a function's own file to see whether that is still true. Kernels here call each other, and what they call is
compiled into them: after an upgrade that left a file alone, numba would go on with what another one said before. So
there is a folder for each state of the sources.

A kernel's code holds its own copies of what it calls, optimised once more in its company, so that a sum may have other
last bits than the original's. Numba gives both one name, of which whoever comes first is meant: the original in the
process that compiled them, the copy in those that read the kernel from the disk. A stream that moved from one to the
other could say another token. So copies belong to their kernel alone.
"""

import hashlib
import os
import shutil
from pathlib import Path

import numba
from llvmlite.binding import Linkage
from numba.core.codegen import CPUCodeLibrary

HERE = Path(__file__).parent


def fingerprint(folder: Path) -> str:
    """Of all sources below a folder: their names and contents."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(f"{file.relative_to(folder)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def use_disk_cache() -> None:
    """Below NUMBA_CACHE_DIR if that is set; otherwise beside the sources, where those of earlier ones are removed."""
    chosen, name = os.environ.get("NUMBA_CACHE_DIR"), f"fathom-{fingerprint(HERE)}"
    base = Path(chosen) if chosen else HERE / "__pycache__"
    numba.config.CACHE_DIR = str(base / name)
    if chosen or (base / name).exists():
        return
    for earlier in base.glob("fathom-*"):
        shutil.rmtree(earlier, ignore_errors=True)


def use_own_copies() -> None:
    """Every kernel calls its own copies of others, in the process that compiles it, too."""
    optimise = CPUCodeLibrary._optimize_final_module

    def own(library: CPUCodeLibrary) -> None:
        for function in library._final_module.functions:
            if function.linkage == Linkage.linkonce_odr and not function.is_declaration:
                function.linkage = Linkage.internal
        optimise(library)

    CPUCodeLibrary._optimize_final_module = own
