"""Stands where other programs have a tool that writes encoded captions to disk; says what to do here instead.

Encoded captions are not kept on disk: training encodes each once at its start, and a file would be stale as soon as a
caption, the text encoder or an option of encoding changed.
"""

import sys
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from library.errors import UserError, run_script  # noqa: E402

HELP = """\
usage: cache_text_encoder_outputs.py [options of training]

Writes nothing. Stable Diffusion 1.x and 2.x have one small text encoder, and its outputs are not kept on disk: training
with --cache_text_encoder_outputs encodes every caption once, at its start, and keeps the results in memory. That option
of the training scripts needs nothing prepared. To fill the cache of latents ahead, use tools/cache_latents.py.
"""


def main(argv: list[str]) -> NoReturn:
    """Show the help, or say why nothing is done.

    Raises:
        UserError: Always, but for ``--help``.
    """
    if any(word in ("-h", "--help") for word in argv):
        print(HELP, end="")
        raise SystemExit(0)
    raise UserError(
        "outputs of the text encoder are not kept on disk",
        where="tools/cache_text_encoder_outputs.py",
        remedy="Train with --cache_text_encoder_outputs: every caption is then encoded once at the start, and kept in "
        "memory. For latents, use tools/cache_latents.py.",
    )


if __name__ == "__main__":
    run_script(main)
