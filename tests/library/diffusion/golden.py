"""The recorded values that this folder's tests compare with."""

import json
from pathlib import Path
from typing import Any


def golden(name: str) -> Any:
    return json.loads((Path(__file__).parents[2] / "golden" / f"{name}.json").read_text())
