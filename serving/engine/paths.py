"""The paths in use, by number."""

import numpy as np
import numpy.typing as npt

from models.paths import NOWHERE, Path
from serving.engine.core import Ints

COLUMNS = ("stage", "depth", "occurrence", "units", "exit_to")


class PathTable:
    """Paths by number, as arrays [path, node], so that a tick moves all its rows at once."""

    def __init__(self) -> None:
        self._paths: list[Path] = []
        self._users: list[int] = []
        self._columns: dict[str, npt.NDArray[np.int64]] = {}
        self._fill()

    def add(self, path: Path) -> int:
        """The number of a path that is about to be used; equal paths share one."""
        if path in self._paths:
            number = self._paths.index(path)
        elif 0 in self._users[1:]:  # number 0 is the model's own and stays
            number = self._users.index(0, 1)
            self._paths[number] = path
        else:
            number = len(self._paths)
            self._paths.append(path)
            self._users.append(0)
        self._users[number] += 1
        self._fill()
        return number

    def release(self, number: int) -> None:
        self._users[number] -= 1

    def __getitem__(self, number: int) -> Path:
        return self._paths[number]

    def widths(self, paths: Ints) -> npt.NDArray[np.float32]:
        """Share of heads and hidden units of each of these paths."""
        return self._widths[paths]

    def look(self, column: str, paths: Ints | int, nodes: Ints | int) -> Ints:
        """A column's values at these nodes of these paths: of COLUMNS, or `leads_to`."""
        return self._columns[column][paths, nodes]

    def _fill(self) -> None:
        longest = max((len(path.nodes) for path in self._paths), default=0)
        self._widths = np.array([path.width for path in self._paths], np.float32)
        for name in COLUMNS:
            column = np.full((len(self._paths), longest), NOWHERE, np.int64)
            for number, path in enumerate(self._paths):
                column[number, : len(path.nodes)] = [getattr(node, name) for node in path.nodes]
            self._columns[name] = column
        self._columns["leads_to"] = _leads_to(self._columns["units"])


def _leads_to(units: Ints) -> Ints:
    """The depth at the next node that adds one, this one or one after it; 0 behind the last."""
    found = np.zeros_like(units)
    for node in reversed(range(units.shape[1])):
        further = found[:, node + 1] if node + 1 < units.shape[1] else 0
        found[:, node] = np.where(units[:, node] > 0, units[:, node], further)
    return found
