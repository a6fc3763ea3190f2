"""Pages that are one file each: a template that is filled in, with the pictures inside."""

import base64
import io
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import jinja2
    from PIL.Image import Image

_JPEG_QUALITY: Final = 85


@cache
def page_template(path: Path) -> "jinja2.Template":
    """The template in ``path``: what is filled in is escaped, and what is not there is a mistake."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(path.read_text(encoding="utf-8"))


def data_address(image: "Image") -> str:
    """``image`` as a ``data:`` address."""
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=_JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
