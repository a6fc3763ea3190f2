"""The time, as file names and metadata tell it; ``SOURCE_DATE_EPOCH`` in the environment fixes it."""

import os
import secrets
import time
from datetime import UTC, datetime
from typing import Final

from library.errors import UserError
from library.randomness import key

_VARIABLE: Final = "SOURCE_DATE_EPOCH"


def now() -> float:
    """Seconds since 1970, or the fixed time.

    Raises:
        UserError: The variable holds no number, or one that no date has.
    """
    fixed = os.environ.get(_VARIABLE)
    if fixed is None:
        return time.time()
    try:
        seconds = float(int(fixed))
        local_time(seconds)
    except (ValueError, OverflowError, OSError) as error:
        raise UserError(
            f"{fixed!r} is no time", where=f"environment variable {_VARIABLE}", remedy="Give whole seconds since 1970."
        ) from error
    return seconds


def local_time(timestamp: float) -> datetime:
    """``timestamp`` in the zone of this machine; in UTC when the time is fixed, so that no machine changes a file."""
    return datetime.fromtimestamp(int(timestamp), UTC if _VARIABLE in os.environ else None)


def iso_date(timestamp: float) -> str:
    """``2023-11-14T22:13:20``."""
    return local_time(timestamp).replace(tzinfo=None).isoformat()


def stamp(timestamp: float) -> str:
    """``20231114221320``, for names of files and folders."""
    return local_time(timestamp).strftime("%Y%m%d%H%M%S")


def session_id(seed: int) -> int:
    """A number for this session in [0, 2^32), drawn outside the run's keys; from the seed when the time is fixed."""
    return key(seed, "session") % 2**32 if _VARIABLE in os.environ else secrets.randbelow(2**32)
