"""The paths in use, by number."""

import numpy as np
import numpy.typing as npt

from models.paths import NOWHERE, Path
from serving.engine import columns
from serving.engine.core import Ints

NO_INTS = np.zeros(0, np.int64)


class PathTable:
    """Paths by number, and the nodes of all of them as columns, so that a tick moves all its rows at once. A node of a
    path is at one `place` in each column."""

    def __init__(self) -> None:
        self._paths: list[Path] = []
        self._users: list[int] = []
        self._widths = np.zeros(0, np.float32)
        self.longest = 0  # places of each path
        self.stages = 0  # that are on any of them: the highest number, and one
        self.table = np.zeros((len(columns.FIELDS), 0), np.int64)
        self._name()

    def add(self, path: Path) -> int:
        """The number of a path that is about to be used; equal paths share one."""
        if path in self._paths:
            number = self._paths.index(path)
        else:
            number = self._new(path)
            self._fill()
        self._users[number] += 1
        return number

    def release(self, number: int) -> None:
        self._users[number] -= 1

    def __getitem__(self, number: int) -> Path:
        return self._paths[number]

    def widths(self, paths: Ints) -> npt.NDArray[np.float32]:
        """Share of heads and hidden units of each of these paths."""
        return self._widths[paths]

    def places(self, paths: Ints, nodes: Ints) -> Ints:
        """Where these nodes of these paths are, until the next path is added."""
        return paths * self.longest + nodes

    def place(self, path: int, node: int) -> int:
        return path * self.longest + node

    def _new(self, path: Path) -> int:
        if 0 in self._users[1:]:  # number 0 is the model's own and stays
            number = self._users.index(0, 1)
            self._paths[number] = path
            return number
        self._paths.append(path)
        self._users.append(0)
        return len(self._paths) - 1

    def _fill(self) -> None:
        self.longest = max(len(path.nodes) for path in self._paths)
        self._widths = np.array([path.width for path in self._paths], np.float32)
        fields = [self._column(name) for name in ("stage", "depth", "occurrence", "units", "exit_to")]
        units = fields[columns.DEEP].reshape(-1, self.longest)
        self.table = np.stack([*fields, _leads_to(units).reshape(-1)])
        self._name()
        self.stages = int(self.stage.max()) + 1

    def _name(self) -> None:
        """The fields of the table, of models.paths.Node; and the depth at the next node that adds one, this or a later
        one, 0 behind the last."""
        self.stage, self.depth, self.occurrence, self.units, self.exit_to, self.leads_to = self.table

    def _column(self, name: str) -> Ints:
        """Of all paths, one after the other, each as long as the longest."""
        column = np.full((len(self._paths), self.longest), NOWHERE, np.int64)
        for number, path in enumerate(self._paths):
            column[number, : len(path.nodes)] = [getattr(node, name) for node in path.nodes]
        return column.reshape(-1)


def _leads_to(units: Ints) -> Ints:
    """`leads_to` of units [path, node]."""
    found = np.zeros_like(units)
    for node in reversed(range(units.shape[1])):
        further = found[:, node + 1] if node + 1 < units.shape[1] else 0
        found[:, node] = np.where(units[:, node] > 0, units[:, node], further)
    return found
