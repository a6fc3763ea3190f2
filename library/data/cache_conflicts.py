"""What excludes caching latents, and when they are cached without having been asked for."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from library.data.findings import Finding, error, warning
from library.data.latent_files import is_latent_file
from library.data.options import CacheOptions
from library.data.spec import DataSpec

if TYPE_CHECKING:
    from library.data.records import ImageRecord

_NOT_CACHED: Final = "Leave out --cache_latents, or {} for these images."
_WITH_IMAGES: Final = "Leave out {}, or put back the images of which there are latents alone."


def cache_conflicts(spec: DataSpec, remedy: str = _NOT_CACHED) -> Iterator[Finding]:
    """What changes the pixels from use to use, so that their latents cannot be kept.

    Args:
        spec: The data sets.
        remedy: The way out, with ``{}`` for the name of the option.
    """
    for dataset in spec.datasets:
        for subset in dataset.subsets:
            changes: Mapping[str, bool] = {
                "color_aug": subset.augment.color_aug,
                "random_crop": subset.augment.random_crop,
                "face_crop_aug_range": subset.augment.face_crop_aug_range is not None
                and not dataset.buckets.enable_bucket,
            }
            for name in (name for name, is_on in changes.items() if is_on):
                yield error(
                    f"{name} changes the pixels each time, so latents cannot be cached (images '{subset.name}')",
                    subset.where,
                    remedy.format(name),
                )


def check_latents_alone(spec: DataSpec, records: Sequence["ImageRecord"], cache: CacheOptions) -> Iterator[Finding]:
    """Latents without images, which a run can use only if it caches those of the other images too."""
    if cache.settled().cache_latents or not any(is_latent_file(record.name) for record in records):
        return
    yield warning(
        "some latents have no image, so the latents of all images are cached in memory, as by --cache_latents",
        "--cache_latents",
        "Give it to be clear, or put the images back.",
    )
    yield from cache_conflicts(spec, _WITH_IMAGES)
