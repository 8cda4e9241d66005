"""Where states are kept: named blobs at any fsspec URL, written whole or not at all."""

import contextlib
import logging
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem

from serving.errors import UnavailableError

log = logging.getLogger("fathom.gateway")

PARTIAL = ".partial"


class StateStore:
    """Blobs by path. Safe for any number of processes; the last writer of a path wins, or (`create`) the first.

    Each method raises UnavailableError where the store is full, read-only, or out of reach."""

    def __init__(self, url: str):
        """`url`: of fsspec, or a local folder."""
        self._fs, self._root = fsspec.core.url_to_fs(url if "://" in url else str(Path(url).expanduser()))
        self._folder = Path(self._root) if isinstance(self._fs, LocalFileSystem) else None

    def put(self, path: str, data: bytes) -> None:
        """Keep a blob under a path, in place of what may be there."""
        target = f"{self._root}/{path}"
        with _told("written to"):
            if self._folder is None:  # an object store writes an object whole
                self._fs.makedirs(target.rpartition("/")[0], exist_ok=True)
                self._fs.pipe_file(target, data)
                return
            with self._partial(target, data) as partial:
                os.replace(partial, target)

    def create(self, path: str, data: bytes) -> bool:
        """Keep a blob under a path where there is none; whether it was so. Of several who try, one succeeds: in a
        folder, and in any store whose fsspec knows `mode="create"`."""
        target = f"{self._root}/{path}"
        with _told("written to"):
            try:
                if self._folder is None:
                    self._fs.makedirs(target.rpartition("/")[0], exist_ok=True)
                    self._fs.pipe_file(target, data, mode="create")
                else:
                    with self._partial(target, data) as partial:
                        os.link(partial, target)
            except FileExistsError:
                return False
        return True

    @contextlib.contextmanager
    def _partial(self, target: str, data: bytes) -> Iterator[str]:
        """A file beside the target, to take its place. Only a writer that is killed leaves anything of it."""
        # States tell what was said. Another writer may make the folder at the same time.
        assert self._folder is not None
        self._folder.mkdir(parents=True, mode=0o700, exist_ok=True)
        self._fs.makedirs(target.rpartition("/")[0], exist_ok=True)
        partial = f"{target}.{secrets.token_hex(4)}{PARTIAL}"
        try:
            self._fs.pipe_file(partial, data)
            yield partial
        finally:
            with contextlib.suppress(OSError):
                self._fs.rm_file(partial)

    def get(self, path: str) -> bytes:
        """Raises KeyError where there is none."""
        with _told("read"):
            try:
                return bytes(self._fs.cat_file(f"{self._root}/{path}"))
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                raise KeyError(path) from None

    def delete(self, path: str) -> None:
        """Unknown paths are ignored."""
        with _told("written to"), contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(f"{self._root}/{path}")

    def list(self, folder: str, *, partial: bool = False) -> list[str]:
        """Names of the blobs (and folders) in a folder; or of what is, or was, being written there."""
        with _told("read"):
            try:
                entries = self._fs.ls(f"{self._root}/{folder}", detail=False, refresh=True)
            except (FileNotFoundError, NotADirectoryError):
                return []
        names = [str(entry).rpartition("/")[2] for entry in entries]
        return sorted(name for name in names if name.endswith(PARTIAL) is partial)


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    """Failures are told without the store's paths, which are for the log."""
    try:
        yield
    except KeyError:
        raise
    except Exception as error:
        log.error("the state store cannot be %s: %s", what, error)
        reason = (error.strerror if isinstance(error, OSError) else "") or type(error).__name__
        raise UnavailableError(f"the state store cannot be {what}: {reason}") from None
