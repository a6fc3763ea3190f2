"""Sort images into buckets and encode them ahead: ``.npz`` files beside the images, sizes in the metadata.

Usage, from anywhere:
``python finetune/prepare_buckets_latents.py TRAIN_DATA_DIR IN_JSON OUT_JSON MODEL [--full_path]``, also under
``accelerate launch`` or ``torchrun``, where the processes share the images.
"""

import logging
import sys
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Final

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from finetune.image_search import check_names, find_images, key_of, shared_keys  # noqa: E402
from finetune.merging import recursive_problems  # noqa: E402
from finetune.metadata_files import (  # noqa: E402
    Metadata,
    check_writable,
    entries_to_replace,
    quoted,
    read_entries,
    store,
)
from finetune.vae_loading import check_vae_source, load_vae  # noqa: E402
from library.data.config import bucket_bounds  # noqa: E402
from library.data.options import multiple_of_8  # noqa: E402
from library.data.spec import BucketRules, Size  # noqa: E402
from library.errors import Problem, UserError, run_script  # noqa: E402
from library.option_positions import missing_positions, name_positions, split_positions  # noqa: E402
from library.option_values import to_bool  # noqa: E402
from library.options import option, parse_options, parse_size  # noqa: E402
from library.runtime import Runtime, set_up_logging, start_runtime  # noqa: E402
from library.runtime_options import ConsoleOptions, RuntimeOptions  # noqa: E402

if TYPE_CHECKING:
    from library.data.setup import TrainingData

log = logging.getLogger("prepare_buckets_latents")

DESCRIPTION = (
    "Sort the images of a folder into buckets of similar aspect ratio, write the size that each is trained at into the "
    "metadata, and encode every image with the VAE of the model into a file beside it, which training then uses."
)
ORDER: Final = ("train_data_dir", "in_json", "out_json", "model_name_or_path")
SKIPPED: Final = 1
"""Exit code when images were skipped because they could not be used."""

_ALPHA_FLAG: Final = "--alpha_mask"


@dataclass(frozen=True, kw_only=True, slots=True)
class PlaceOptions:
    """Files."""

    train_data_dir: Path | None = option(None, metavar="DIR", help="Folder of the images.")
    in_json: Path | None = option(None, metavar="FILE", help="Metadata file to read.")
    out_json: Path | None = option(None, metavar="FILE", help="Metadata file to write; may be the same.")
    model_name_or_path: str | None = option(
        None,
        metavar="PATH",
        help="Model whose VAE encodes the images: a checkpoint, a Diffusers folder, a hub id, or a VAE alone. Training "
        "uses the latents if it has the same VAE in the same precision.",
    )
    full_path: bool = option(False, help="The metadata calls images by their paths, written as TRAIN_DATA_DIR is.")
    recursive: bool = option(False, help="Search the folders inside, too; needs --full_path.")

    def problems(self) -> list[Problem]:
        """What is missing, and names that would not be clear."""
        found = missing_positions({name: getattr(self, name) for name in ORDER})
        return found + recursive_problems(recursive=self.recursive, full_path=self.full_path)


@dataclass(frozen=True, kw_only=True, slots=True)
class BucketOptions:
    """Buckets."""

    max_resolution: Size = option(
        (512, 512), metavar="WIDTH,HEIGHT", parse=parse_size, minimum=64, help="Training resolution in pixels."
    )
    min_bucket_reso: int = option(256, minimum=64, help="Shortest side of a bucket, in pixels.")
    max_bucket_reso: int = option(1024, minimum=64, help="Longest side of a bucket, in pixels.")
    bucket_reso_steps: int = option(
        64, minimum=8, check=multiple_of_8, help="Bucket sides are multiples of this many pixels."
    )
    bucket_no_upscale: bool = option(
        False, help="Never enlarge an image: a small one gets a bucket of its own size, rounded down."
    )

    def problems(self) -> list[Problem]:
        """Whether the resolution itself fits into a bucket."""
        rules = self.rules()
        sides = "x".join(map(str, self.max_resolution))
        found = []
        if rules.min_bucket_reso > min(self.max_resolution) and not self.bucket_no_upscale:
            what = f"--max_resolution {sides} fits no bucket: --min_bucket_reso {self.min_bucket_reso} is above it"
            found.append(Problem(what, "--min_bucket_reso", "Lower --min_bucket_reso, or raise --max_resolution."))
        if rules.max_bucket_reso < max(self.max_resolution):
            what = f"--max_resolution {sides} fits no bucket: --max_bucket_reso {self.max_bucket_reso} is below it"
            found.append(Problem(what, "--max_bucket_reso", "Raise --max_bucket_reso, or lower --max_resolution."))
        return found

    def rules(self) -> BucketRules:
        """The rules, with bounds on the grid of the steps as in training."""
        low, high = bucket_bounds(self.min_bucket_reso, self.max_bucket_reso, self.bucket_reso_steps)
        return BucketRules(
            enable_bucket=True,
            min_bucket_reso=max(low, self.bucket_reso_steps),
            max_bucket_reso=high,
            bucket_reso_steps=self.bucket_reso_steps,
            bucket_no_upscale=self.bucket_no_upscale,
        )


def _as_text_switch(raw: object) -> str:
    return "yes" if raw != "" and to_bool(raw) else ""


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentOptions:
    """Latents."""

    v2: bool = option(False, help="Accepted for old command lines: the VAE of every model is read alike.")
    batch_size: int = option(1, minimum=1, metavar="N", help="Images encoded at a time.")
    max_data_loader_n_workers: int | None = option(
        None,
        minimum=0,
        metavar="N",
        help="Threads that decode images ahead of the VAE: a few when absent; one at the least.",
    )
    mixed_precision: str = option(
        "no", choices=("no", "fp16", "bf16"), help="Precision of the VAE; that of the training to come."
    )
    no_half_vae: bool = option(False, help="Keep the VAE in 32 bits, as training does with the same option.")
    flip_aug: bool = option(False, help="Store mirrored latents as well.")
    alpha_mask: str = option(
        "",
        metavar="yes|no",
        parse=_as_text_switch,
        help="Store the transparency of images as masks; alone it means yes.",
    )
    skip_existing: bool = option(
        False,
        help="Keep latents of another program whose sizes fit. Latents made here say what they were made of, and are "
        "never made again while that is still so.",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """The tool's options."""

    place: PlaceOptions
    buckets: BucketOptions
    latents: LatentOptions

    def notices(self) -> list[str]:
        """What training must know."""
        if not self.buckets.bucket_no_upscale:
            return []
        return ["the metadata gets the sizes: train without --bucket_no_upscale, so that they are used"]


def main(argv: list[str]) -> int:
    """Run the tool; returns the exit code."""
    set_up_logging(ConsoleOptions())
    words, rest = split_positions(Options, _with_whole_alpha_mask(argv))
    prog = f"{Path(__file__).name} {' '.join(ORDER)}"
    options = parse_options(Options, [*name_positions(words, ORDER), *rest], prog=prog, description=DESCRIPTION)
    place = options.place
    assert place.train_data_dir is not None, "asked for with the options"
    assert place.in_json is not None, "asked for with the options"
    assert place.out_json is not None, "asked for with the options"
    assert place.model_name_or_path is not None, "asked for with the options"
    check_vae_source(place.model_name_or_path)
    check_writable(place.out_json)
    before = read_entries(place.in_json)
    # Before hours of encoding.
    entries_to_replace(place.out_json, source=place.in_json)
    images = find_images(place.train_data_dir, recursive=place.recursive)
    check_names(images)
    _check_keys(images, full_path=place.full_path)
    runtime, data, bad = _make_latents(images, options, place.model_name_or_path)
    if runtime.is_main:
        sizes = {
            key_of(record.path, full_path=place.full_path): placement.bucket
            for record, placement in zip(data.records, data.placements, strict=True)
            if record.path not in bad
        }
        store(place.out_json, before, _with_sizes(before, sizes), source=place.in_json, dry_run=False)
        print("\n".join(_bucket_table(data)))
        for path, reason in sorted(bad.items()):
            log.error("skipped: %s: %s", path, reason)
        if bad:
            log.error("%d of %d images were skipped", len(bad), len(images))
    return SKIPPED if bad else 0


def _with_whole_alpha_mask(argv: list[str]) -> list[str]:
    """``argv`` with ``--alpha_mask`` alone written as what it means."""
    following = [*argv, "--"][1:]
    return [
        f"{word}=yes" if word == _ALPHA_FLAG and after.startswith("--") else word
        for word, after in zip(argv, following, strict=True)
    ]


def _check_keys(images: Sequence[Path], *, full_path: bool) -> None:
    shared = shared_keys(list(images), full_path=full_path)
    if shared:
        raise UserError(
            f"{len(shared)} names belong to several images: {quoted(shared)}",
            where="train_data_dir",
            remedy="Use --full_path here and when merging captions and tags, or rename the images.",
        )


def _make_latents(
    images: Sequence[Path], options: Options, source: str
) -> tuple[Runtime, "TrainingData", Mapping[Path, str]]:
    """Encode this process's share of ``images``: where it ran, the buckets, and what no process could use."""
    from finetune.bucket_latents import Wanted, fill, prepare

    wanted = Wanted(
        resolution=options.buckets.max_resolution,
        buckets=options.buckets.rules(),
        flip=options.latents.flip_aug,
        mask=bool(options.latents.alpha_mask),
    )
    data, bad = prepare(images, wanted)
    if data is None:
        raise UserError.of(Problem(reason, str(path), "Replace or remove it.") for path, reason in bad.items())

    import torch
    from accelerate.utils import gather_object

    from library.data.disk_cache import DiskLatentCache
    from library.data.latent_encoding import uses_of
    from library.models.latents import encode_images, encoder_digest

    # Nothing is drawn here, so none need be agreed on.
    settings = RuntimeOptions(mixed_precision=options.latents.mixed_precision, seed=0)
    runtime = start_runtime(settings, find_unused_parameters=False)
    dtype = torch.float32 if options.latents.no_half_vae else runtime.weight_dtype
    vae = load_vae(source, dtype).to(runtime.device)
    uses, workers = uses_of(data), options.latents.max_data_loader_n_workers
    found = fill(
        DiskLatentCache(data, vae=encoder_digest(vae)),
        dict(islice(uses.items(), runtime.rank, None, runtime.world)),
        lambda pixels: encode_images(vae, pixels),
        batch_size=options.latents.batch_size,
        threads=None if workers is None else max(workers, 1),
        keep_foreign=options.latents.skip_existing,
        is_main=runtime.is_main,
        is_shared=runtime.world > 1,
    )
    # Also waits for the others.
    bad |= dict(gather_object(list(found.items())))
    return runtime, data, bad


def _with_sizes(before: Metadata, sizes: Mapping[str, Size]) -> Metadata:
    after = deepcopy(before)
    new = [key for key in sizes if key not in before]
    if new:
        log.warning("%d images have no entry yet and get one without a caption: %s", len(new), quoted(new))
    for key, size in sizes.items():
        after.setdefault(key, {})["train_resolution"] = list(size)
    return after


def _bucket_table(data: "TrainingData") -> list[str]:
    lines = [
        f"bucket {number}: resolution {bucket.resolution}, count: {bucket.images}"
        for number, bucket in enumerate(data.buckets)
    ]
    return [*lines, f"mean ar error (without repeats): {data.mean_aspect_error(0)}"]


if __name__ == "__main__":
    run_script(main)
