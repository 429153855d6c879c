"""Log lines: JSON for machines, one coloured-free line for people on a terminal."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

import orjson


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, and the record's ``fields``."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": _utc(record),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(line, default=str, option=orjson.OPT_NON_STR_KEYS).decode()


class ConsoleFormatter(logging.Formatter):
    """``time level message key=value …``; control characters are escaped, so a line is a line."""

    def format(self, record: logging.LogRecord) -> str:
        pairs = "".join(
            f" {k}={v}" for k, v in getattr(record, "fields", {}).items() if v is not None
        )
        line = f"{_utc(record)} {record.levelname:<7} {record.getMessage()}{pairs}"
        line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


def _utc(record: logging.LogRecord) -> str:
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{stamp}.{int(record.msecs):03d}Z"


def logging_config(level: str, format_: str) -> dict[str, Any]:
    """``dictConfig`` for the whole process, gunicorn's loggers included; lines go to stderr."""
    if format_ == "auto":
        format_ = "console" if sys.stderr.isatty() else "json"
    formatter = {"json": JsonFormatter, "console": ConsoleFormatter}[format_]
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"crane": {"()": formatter}},
        "handlers": {
            "stderr": {
                "class": "logging.StreamHandler",
                "formatter": "crane",
                "stream": "ext://sys.stderr",
            }
        },
        # Libraries speak up from WARNING on; CRANE_LOG_LEVEL is for our own lines.
        "root": {"level": "WARNING", "handlers": ["stderr"]},
        "loggers": {
            "crane": {"level": level},
            "gunicorn.error": {"level": level, "propagate": True, "handlers": []},
            "gunicorn.access": {"level": "WARNING", "propagate": True, "handlers": []},
        },
    }
