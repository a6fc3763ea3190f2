"""Fill the latent cache of a training run ahead, or look after it.

Usage, from anywhere: ``python tools/cache_latents.py [COMMAND] OPTIONS`` with the options of the training itself; those
that mean nothing here are taken and not used. Commands:

- ``fill`` (or none): make what is missing, as training with ``--cache_latents_to_disk`` would;
- ``verify``: read every entry and every image and say what is not valid (exit code 1), changing nothing;
- ``explain IMAGE``: say what is known of one image's entry, and why it is used or made anew;
- ``clean``: remove the entries beside the images that these options do not use.
"""

import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from library.data.options import CacheOptions, CaptionOptions, CheckOptions, ImageOptions, SourceOptions  # noqa: E402
from library.errors import UserError, raise_if_any, run_script  # noqa: E402
from library.inputs import read_data  # noqa: E402
from library.models.detect import check_model_source  # noqa: E402
from library.models.options import AttentionOptions, ModelOptions, PromptOptions  # noqa: E402
from library.options import option, parse_options  # noqa: E402
from library.runtime import Runtime, set_up_logging, start_runtime  # noqa: E402
from library.runtime_options import ConsoleOptions, RuntimeOptions  # noqa: E402

if TYPE_CHECKING:
    from library.data.disk_cache import DiskLatentCache
    from library.data.images import ImageView
    from library.data.latent_encoding import Encode, Use
    from library.data.setup import TrainingData

log = logging.getLogger("cache_latents")

DESCRIPTION = (
    "Fill the latent cache of a training run ahead, or look after it. The first word may be a command: fill (what is "
    "done without one), verify (say what is not valid), explain IMAGE (say why it is used or made anew), clean (remove "
    "entries that these options do not use). Takes the options of training; those that mean nothing here are not used."
)
INVALID = 1
"""Exit code of ``verify`` when entries are not valid."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FillOptions:
    """Filling the cache."""

    skip_existing: bool = option(
        False, help="Accepted for old command lines: entries that are valid are never made again."
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What decides which images are encoded, and how."""

    model: ModelOptions
    source: SourceOptions
    image: ImageOptions
    cache: CacheOptions
    fill: FillOptions
    runtime: RuntimeOptions
    attention: AttentionOptions
    captions: CaptionOptions
    prompts: PromptOptions
    check: CheckOptions
    console: ConsoleOptions


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What every command works on.

    Attributes:
        data: The training set.
        uses: What is encoded of it.
        encode: The VAE's encoder.
        vae: Its digest.
        options: The options.
        runtime: Where it runs.
    """

    data: "TrainingData"
    uses: "Mapping[ImageView, Use]"
    encode: "Encode"
    vae: str
    options: Options
    runtime: Runtime

    def cache(self) -> "DiskLatentCache":
        """The cache as it is."""
        from library.data.disk_cache import DiskLatentCache

        return DiskLatentCache(self.data, vae=self.vae)


def main(argv: list[str]) -> int:
    """Run a command; returns the exit code."""
    command, image, rest = _command(argv)
    notices: list[str] = []
    options = parse_options(
        Options,
        rest,
        prog="cache_latents.py [command]",
        description=DESCRIPTION,
        announce=notices.append,
        skips_others=True,
    )
    options = replace(options, cache=replace(options.cache, cache_latents=True, cache_latents_to_disk=True))
    set_up_logging(options.console)
    for notice in notices:
        log.warning(notice)
    work = _prepared(options)
    if image is not None:
        return explain(work, image)
    commands: Mapping[str, Callable[[Work], int]] = {"fill": fill, "verify": verify, "clean": clean}
    return commands[command](work)


def fill(work: Work) -> int:
    """Make what is missing."""
    from library.data.disk_cache import DiskLatentCache, Share

    runtime, cache = work.runtime, work.options.cache
    DiskLatentCache.fill(
        work.data,
        work.encode,
        vae=work.vae,
        batch_size=cache.vae_batch_size,
        trust_names=cache.skip_cache_check,
        share=Share(rank=runtime.rank, world=runtime.world, wait=runtime.accelerator.wait_for_everyone),
        progress=runtime.is_main,
    )
    return 0


def verify(work: Work) -> int:
    """Say which entries are not valid."""
    from library.data.cache_upkeep import summary

    verdicts = work.cache().judge_all(work.uses, reads_image=True)
    invalid = {view: verdict.reason for view, verdict in verdicts.items() if verdict.reason is not None}
    for view, reason in invalid.items():
        print(f"{view.path}: {reason}")
    foreign = sum(verdict.is_foreign for verdict in verdicts.values())
    if foreign:
        print(f"{foreign} entries were written by another program: only their sizes can be verified")
    for kind, count in summary(invalid.values()).items():
        print(f"{count} to be made: {kind}")
    print(f"{len(verdicts) - len(invalid)} of {len(verdicts)} entries are valid")
    return INVALID if invalid else 0


def explain(work: Work, image: Path) -> int:
    """Say what is known of the entry of ``image``."""
    from library.data import cache_upkeep

    views = [view for view in work.uses if view.path.resolve() == image.resolve()]
    if not views:
        raise UserError(
            "the image is not in the data set", where=str(image), remedy="Give a file that these options train on."
        )
    for view in views:
        use = work.uses[view]
        print("\n".join(cache_upkeep.explain(work.cache(), view, flip=use.flip, mask=use.mask)))
    return 0


def clean(work: Work) -> int:
    """Remove what these options do not use."""
    from library.data.cache_upkeep import unused_files

    unused = unused_files(work.cache(), work.uses, progress=True)
    freed = sum(path.stat().st_size for path in unused)
    for path in unused:
        path.unlink()
        print(f"removed {path}")
    print(f"{len(unused)} files removed, {freed / 2**20:.1f} MiB freed")
    return 0


def _command(argv: list[str]) -> tuple[str, Path | None, list[str]]:
    """The command, the image of ``explain``, and what remains of the command line."""
    if not argv or argv[0].startswith("-"):
        return "fill", None, argv
    command, *rest = argv
    if command not in ("fill", "verify", "explain", "clean"):
        raise UserError(
            f"no such command: {command}", where="tools/cache_latents.py", remedy="Use fill, verify, explain or clean."
        )
    if command != "explain":
        return command, None, rest
    if not rest or rest[0].startswith("-"):
        raise UserError("explain needs an image", where="explain", remedy="Write: explain IMAGE OPTIONS.")
    return command, Path(rest[0]), rest[1:]


def _prepared(options: Options) -> Work:
    source = check_model_source(options.model, options.prompts)
    raise_if_any(source.problems)
    spec, records = read_data(options)

    from library.data.latent_encoding import uses_of
    from library.data.setup import prepare_data
    from library.models.attention import use_attention
    from library.models.latents import encode_images, encoder_digest
    from library.models.stable_diffusion import load_stable_diffusion

    # Nothing is drawn here, so none need be agreed on.
    runtime = start_runtime(replace(options.runtime, seed=0), find_unused_parameters=False)
    data = prepare_data(spec, records)
    model = load_stable_diffusion(options.model, options.prompts, dtype=runtime.weight_dtype)
    use_attention(model.unet, model.deferred_vae, options.attention, dtype=runtime.weight_dtype)
    vae = model.vae.to(runtime.device)
    return Work(
        data=data,
        uses=uses_of(data),
        encode=lambda pixels: encode_images(vae, pixels),
        vae=encoder_digest(vae),
        options=options,
        runtime=runtime,
    )


if __name__ == "__main__":
    run_script(main)
