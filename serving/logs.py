"""Structured logs: one JSON object on a line, with the id of the request that it is about."""

import json
import logging
import re
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from logging.handlers import WatchedFileHandler
from typing import Any

from serving.config import LogSpec
from serving.errors import ServeConfigError
from serving.gateway.requests import Record

ROOT = "fathom"
_PLAIN = frozenset(vars(logging.makeLogRecord({})))  # what every record has

log = logging.getLogger("fathom.requests")


class JsonLines(logging.Formatter):
    """What is given as `extra` becomes fields of the object."""

    def format(self, record: logging.LogRecord) -> str:
        told: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        told |= {name: value for name, value in vars(record).items() if name not in _PLAIN}
        if record.exc_info and record.exc_info[0] is not None:
            told["exception"] = self.formatException(record.exc_info)
        return json.dumps(told, ensure_ascii=False, default=str)


def set_up(spec: LogSpec) -> None:
    """All of this process's own logs go to the file, or to standard error. Raises ServeConfigError."""
    try:
        handler = (
            WatchedFileHandler(spec.file, encoding="utf-8")
            if spec.file
            else logging.StreamHandler(sys.stderr)
        )
    except OSError as error:
        raise ServeConfigError(f"gateway.logs.file = {spec.file!r}: {error.strerror}") from None
    handler.setFormatter(JsonLines())
    logger = logging.getLogger(ROOT)
    for old in logger.handlers:
        old.close()
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(spec.level.upper())


QUOTED = re.compile(r"^([\w.]+) = [^\w-].*", re.DOTALL)
"""A refused field whose value is no number: it is what a client wrote, and the reason may quote it, too."""


def log_request(record: Record) -> None:
    """One line for a request that has ended; a listener of `Requests`. Neither prompt nor text is in it."""
    fields: dict[str, Any] = {
        "request_id": record.request_id,
        "model": record.model,
        "replica": record.replica,
        "prompt_tokens": record.prompt_tokens,
        "finish_reason": str(record.finish_reason or ""),
    }
    if record.usage is not None:
        fields |= asdict(record.usage)
    if record.error is not None:
        fields["error"] = type(record.error).__name__
        fields["detail"] = QUOTED.sub(r"\1 is refused", str(record.error))
    log.info("%s %s", record.method, outcome(record), extra=fields)


def outcome(record: Record) -> str:
    """ok, cancelled (its client went) or failed."""
    if record.error is None:
        return "ok"
    return "failed" if isinstance(record.error, Exception) else "cancelled"
