"""Keeps the warnings and errors of the log, so that they can be told again at the end of a run."""

import logging
import time
from dataclasses import dataclass
from typing import Final

_MOST: Final = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class KeptMessage:
    """A line of the log.

    Attributes:
        level: "warning", "error" or "critical".
        time: As the console shows it, ``22:13:20``.
        text: What it says.
    """

    level: str
    time: str
    text: str


class KeepMessages(logging.Handler):
    """Keeps the first 200 lines of level WARNING and above."""

    def __init__(self) -> None:
        super().__init__(level=logging.WARNING)
        self.messages: list[KeptMessage] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep ``record``."""
        if len(self.messages) < _MOST:
            at = time.strftime("%H:%M:%S", time.localtime(record.created))
            self.messages.append(KeptMessage(level=record.levelname.lower(), time=at, text=record.getMessage()))


def kept_messages() -> list[KeptMessage]:
    """What the handlers of the root logger have kept; nothing where none keeps messages."""
    keepers = [handler for handler in logging.getLogger().handlers if isinstance(handler, KeepMessages)]
    return [message for keeper in keepers for message in keeper.messages]
