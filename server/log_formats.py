"""Formats of log records: JSON for programs, text for people."""

from __future__ import annotations

import json
import logging
import re
import time
from typing import Any, Literal

LogFormat = Literal["json", "text"]

_PLAIN = re.compile(r"[A-Za-z0-9_.,:/+@%-]+")  # text that needs no quotes


class JsonFormatter(logging.Formatter):
    """Formatter that writes a record as one JSON object; `extra={"fields": {...}}` adds members to it."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the JSON text of `record`, with the traceback of an exception."""
        line: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class TextFormatter(logging.Formatter):
    """Formatter that writes a record as a line with its fields as key=value, and a traceback as indented lines.

    Control characters are escaped, so that no message can look like several records.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of `record`."""
        parts = [_time(record), record.levelname, f"{record.name}:", _escape(record.getMessage())]
        parts += [f"{name}={_value(value)}" for name, value in _fields(record).items()]
        lines = [" ".join(parts)]
        if record.exc_info:
            lines += [f"    {_escape(line)}" for line in self.formatException(record.exc_info).splitlines()]
        return "\n".join(lines)


FORMATTERS: dict[LogFormat, type[logging.Formatter]] = {"json": JsonFormatter, "text": TextFormatter}


def _time(record: logging.LogRecord) -> str:
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{stamp}.{int(record.msecs):03d}Z"


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    fields: dict[str, Any] = getattr(record, "fields", {})
    return fields


def _escape(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(x if x.isprintable() else x.encode("unicode_escape").decode() for x in text)


def _value(value: object) -> str:
    """Return a value as text without spaces outside quotes, brackets and braces."""
    if isinstance(value, str) and _PLAIN.fullmatch(value):
        return value
    return json.dumps(value, default=str)
