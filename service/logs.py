"""Structured logs as JSON lines on stderr. What a person wrote and what an image shows never enters them."""

import logging
import sys
import traceback
from contextvars import ContextVar
from typing import Any

import structlog

_REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="-")


def configure(level: str) -> None:
    """Once per process, by the entry point."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )


def log() -> Any:
    return structlog.get_logger()


def begin_request(identifier: str) -> None:
    _REQUEST_ID.set(identifier)
    structlog.contextvars.bind_contextvars(request_id=identifier)


def request_id() -> str:
    """Of the request this task serves; `-` outside one."""
    return _REQUEST_ID.get()


def where(error: BaseException) -> list[str]:
    """The innermost code places of a failure, without its message, which may quote its input."""
    frames = traceback.extract_tb(error.__traceback__)[-8:]
    return [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames]
