"""Log lines: JSON for machines, one plain line for people on a terminal."""

from __future__ import annotations

import json
import logging
import logging.config
import sys
import time
from functools import lru_cache
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
        try:
            return orjson.dumps(line, default=str, option=orjson.OPT_NON_STR_KEYS).decode()
        except TypeError:  # a lone surrogate, as in an odd file name, or a number past 64 bits
            return json.dumps(line, default=str)


class ConsoleFormatter(logging.Formatter):
    """``time level message key=value …``, so that no text in it can pass for another line or pair.

    What is not printable is escaped, a value with more than a word in it is quoted, and the lines
    of a traceback are indented.
    """

    def format(self, record: logging.LogRecord) -> str:
        pairs = "".join(
            f" {name}={_quoted(value)}"
            for name, value in getattr(record, "fields", {}).items()
            if value is not None
        )
        line = _printable(f"{_utc(record)} {record.levelname:<7} {record.getMessage()}{pairs}")
        if record.exc_info:
            traceback = self.formatException(record.exc_info)
            line += "".join(f"\n    {_printable(part)}" for part in traceback.split("\n"))
        return line


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _quoted(value: Any) -> str:
    text = str(value)
    if type(value) is str and (not text or set(text) & set(" \"'=")):
        return json.dumps(text, ensure_ascii=False)
    return text


def _utc(record: logging.LogRecord) -> str:
    return f"{_second(int(record.created))}.{int(record.msecs):03d}Z"


@lru_cache(16)  # of one second there are many lines
def _second(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))


def set_up(level: str, format_: str) -> None:
    """Log this process's lines, Python's warnings among them."""
    logging.config.dictConfig(logging_config(level, format_))
    logging.captureWarnings(True)
    # A line does not say which line of code wrote it, so nothing has to find that out: see
    # "Optimization" in Python's Logging HOWTO.
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False


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
        },
    }
