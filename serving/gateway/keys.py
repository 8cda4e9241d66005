"""API keys: who may use which model, and how much of it. A file holds their digests; it is read again when it
changes."""

import hashlib
import hmac
import logging
import secrets
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pydantic
import yaml
from pydantic import Field

from serving.config import Name, Strict
from serving.engine.params import MAX_PRIORITY
from serving.errors import (
    InvalidArgumentError,
    OverloadedError,
    PermissionDeniedError,
    ServeConfigError,
    UnauthenticatedError,
)

log = logging.getLogger("fathom.gateway")

PREFIX = "fathom-"
RELOAD_S = 1.0
MINUTE_S = 60.0


class Key(Strict):
    """One key of the file, without its secret."""

    name: Name
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")  # of the secret, in hexadecimal
    models: tuple[Name, ...] | None = None  # that it may use; all where not given
    max_streams: int | None = Field(None, ge=0)  # at a time, in each gateway
    tokens_per_minute: int | None = Field(None, ge=1)  # of prompts and continuations, in each gateway
    max_priority: int = Field(MAX_PRIORITY, ge=-MAX_PRIORITY, le=MAX_PRIORITY)  # that it may ask for


class KeyFile(Strict):
    keys: tuple[Key, ...]

    @pydantic.model_validator(mode="after")
    def _distinct(self) -> "KeyFile":
        for field in ("name", "sha256"):
            ((value, count),) = Counter(getattr(key, field) for key in self.keys).most_common(1) or [("", 0)]
            if count > 1:
                raise ValueError(f"keys: {field} {value} occurs twice")
        return self


class Caller:
    """Whoever a credential belongs to, and what they use at present."""

    def __init__(self, key: Key | None = None):
        """Without a key: everybody, where no keys are asked for."""
        self.key = key
        self.streams = 0
        self._tokens = 0.0 if key is None else float(key.tokens_per_minute or 0)
        self._filled = time.monotonic()

    @property
    def name(self) -> str:
        """ "" for everybody."""
        return "" if self.key is None else self.key.name

    def may_use(self, model: str) -> bool:
        return self.key is None or self.key.models is None or model in self.key.models

    def check(self, model: str) -> None:
        """Raises PermissionDeniedError."""
        if not self.may_use(model):
            raise PermissionDeniedError(f"model = {model!r}: the key {self.name!r} is not allowed to use it")

    def check_priority(self, priority: int) -> None:
        """Raises InvalidArgumentError."""
        most = MAX_PRIORITY if self.key is None else self.key.max_priority
        if not -MAX_PRIORITY <= priority <= most:
            whose = "" if self.key is None else f" for the key {self.name!r}"
            raise InvalidArgumentError("priority", priority, f"must be from {-MAX_PRIORITY} to {most}{whose}")

    @contextmanager
    def stream(self, prompt_tokens: int) -> Iterator[None]:
        """A request that runs. Raises OverloadedError when a quota is spent."""
        if self.key is not None and self.key.max_streams is not None and self.streams >= self.key.max_streams:
            raise OverloadedError(f"key {self.name!r}: max_streams = {self.key.max_streams} are running")
        self._fill()
        if self.key is not None and self.key.tokens_per_minute is not None and self._tokens <= 0:
            limit = self.key.tokens_per_minute
            raise OverloadedError(f"key {self.name!r}: tokens_per_minute = {limit} are spent; try later")
        self.spend(prompt_tokens)
        self.streams += 1
        try:
            yield
        finally:
            self.streams -= 1

    def spend(self, tokens: int) -> None:
        """Count tokens. What runs goes on when they are spent, and the next request waits for all of them."""
        self._tokens -= tokens

    def _fill(self) -> None:
        now = time.monotonic()
        most = 0.0 if self.key is None else float(self.key.tokens_per_minute or 0)
        self._tokens = min(most, self._tokens + (now - self._filled) / MINUTE_S * most)
        self._filled = now


class Keys:
    """The keys of a file."""

    def __init__(self, file: Path | None):
        """Without a file everybody may do everything. Raises ServeConfigError."""
        self._file = file
        self._everybody = Caller()
        self._callers: dict[str, Caller] = {}  # by digest
        self._stamp: tuple[int, int] | None = None
        self._checked = 0.0
        if file is not None:
            self._read(file)

    def authenticate(self, credential: str) -> Caller:
        """Raises UnauthenticatedError."""
        if self._file is None:
            return self._everybody
        self._reload(self._file)
        if not credential:
            raise UnauthenticatedError("an API key is needed: authorization: Bearer KEY")
        shown = digest(credential)
        found = None
        for known, caller in self._callers.items():  # all of them: the time taken tells nothing
            if hmac.compare_digest(known, shown):
                found = caller
        if found is None:
            raise UnauthenticatedError("the API key is not known")
        return found

    def _reload(self, file: Path) -> None:
        now = time.monotonic()
        if now - self._checked < RELOAD_S:
            return
        self._checked = now
        try:
            if _stamp(file) != self._stamp:
                self._read(file)
        except ServeConfigError as error:
            log.error("%s; the keys stay as they were", error)

    def _read(self, file: Path) -> None:
        try:
            self._stamp = _stamp(file)
            raw = yaml.safe_load(file.read_text("utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ServeConfigError(f"{file}: {error}") from None
        except yaml.YAMLError as error:
            raise ServeConfigError(f"{file}: {_without_text(error)}") from None
        callers = {}
        for key in _checked(raw, file).keys:
            caller = callers[key.sha256] = self._callers.get(key.sha256) or Caller(key)
            caller.key = key  # what it uses at present counts on, whatever it may use from now on
        self._callers = callers


def _checked(raw: object, file: Path) -> KeyFile:
    """Raises ServeConfigError, which names no value: some put the key itself where its digest should be, and errors
    are logged."""
    try:
        return KeyFile.model_validate(raw)
    except pydantic.ValidationError as error:
        first = error.errors(include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "file"
        raise ServeConfigError(f"{file}: {where}: {first['msg']}") from None


def _without_text(error: yaml.YAMLError) -> str:
    """What is wrong with it and where, without the line itself."""
    mark = getattr(error, "problem_mark", None)
    what = getattr(error, "problem", None) or "is not YAML"
    return what if mark is None else f"line {mark.line + 1}: {what}"


def _stamp(file: Path) -> tuple[int, int]:
    """Another after every change. Raises ServeConfigError."""
    try:
        stat = file.stat()
    except OSError as error:
        raise ServeConfigError(f"{file}: {error}") from None
    return stat.st_mtime_ns, stat.st_size


def credential_of(headers: Mapping[str, str]) -> str:
    """The key that came with a call: `authorization: Bearer KEY`, or `x-api-key: KEY`. Names in lower case."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")


def digest(secret: str) -> str:
    """As the file has it. Keys are long and random, so a plain digest tells nothing about them."""
    return hashlib.sha256(secret.encode()).hexdigest()


def new_secret() -> str:
    return PREFIX + secrets.token_urlsafe(32)
