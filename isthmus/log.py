"""Structured logs: one JSON object a line on stderr, one event per state change, never inside the per-token loop."""

import json
import logging
import sys
import time
from typing import TextIO

_ROOT = "isthmus"


class EventLogger:
    """Writes events with fields; `request_id` is a field like any other. Any thread may write."""

    def __init__(self, logger: logging.Logger):
        self._logger = logger

    def debug(self, event: str, **fields: object) -> None:
        self._write(logging.DEBUG, event, fields)

    def info(self, event: str, **fields: object) -> None:
        self._write(logging.INFO, event, fields)

    def warning(self, event: str, **fields: object) -> None:
        self._write(logging.WARNING, event, fields)

    def exception(self, event: str, error: BaseException, **fields: object) -> None:
        """An event with the traceback of `error`."""
        self._logger.error(event, extra={"fields": fields}, exc_info=error)

    def _write(self, level: int, event: str, fields: dict[str, object]) -> None:
        if self._logger.isEnabledFor(level):
            self._logger.log(level, event, extra={"fields": fields})


def get_logger(name: str) -> EventLogger:
    return EventLogger(logging.getLogger(f"{_ROOT}.{name}"))


def configure(service: str, level: str = "info", stream: TextIO | None = None) -> None:
    """Once per process, in its entry point. `service` is the process's name in every line."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(_JsonFormatter(service))
    root = logging.getLogger(_ROOT)
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    root.propagate = False


class _JsonFormatter(logging.Formatter):
    def __init__(self, service: str):
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, object] = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "service": self._service,
            "logger": record.name.removeprefix(f"{_ROOT}."),
            "event": record.getMessage(),
        }
        fields: dict[str, object] = getattr(record, "fields", {})
        line.update({name: value for name, value in fields.items() if name not in line})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)
