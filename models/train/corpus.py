"""The corpus: the source text of the standard library of the Python that runs this."""

import sysconfig
from dataclasses import dataclass
from pathlib import Path

HELD_OUT = (
    "argparse.py", "asyncio/queues.py", "bisect.py", "calendar.py", "configparser.py", "csv.py", "email/policy.py",
    "fractions.py", "graphlib.py", "heapq.py", "http/cookies.py", "ipaddress.py", "json/decoder.py",
    "logging/config.py",
    "netrc.py", "pathlib.py", "pprint.py", "queue.py", "random.py", "shelve.py", "statistics.py", "string.py",
    "textwrap.py", "tokenize.py", "unittest/suite.py", "urllib/robotparser.py", "wave.py", "xml/dom/minidom.py",
    "zipfile.py",
)  # fmt: skip
"""Modules that no model of the zoo has seen, relative to the standard library's folder."""

TESTS_OF_HELD_OUT = frozenset("test_" + Path(name).stem.split("/")[-1] + ".py" for name in HELD_OUT)


@dataclass(frozen=True, slots=True)
class Corpus:
    training: tuple[str, ...]
    held_out: tuple[str, ...]

    @property
    def held_out_bytes(self) -> int:
        return sum(len(text.encode()) for text in self.held_out)


def read() -> Corpus:
    """Every module, its tests included where they are installed; the tests of held-out modules are left out too."""
    root = Path(sysconfig.get_paths()["stdlib"])
    training: list[str] = []
    held_out: list[str] = []
    for file in sorted(root.rglob("*.py")):
        name = file.relative_to(root).as_posix()
        if "site-packages" in name or "dist-packages" in name or file.name in TESTS_OF_HELD_OUT:
            continue
        try:
            text = file.read_text("utf-8")
        except UnicodeDecodeError:
            continue
        if not text.strip():
            continue
        (held_out if name in HELD_OUT else training).append(text)
    return Corpus(tuple(training), tuple(held_out))
