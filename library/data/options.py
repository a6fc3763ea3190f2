"""Options of the data: where it is, images, captions, caching, loading. Imports nothing heavy."""

from dataclasses import dataclass, replace
from pathlib import Path

from library.data.schema import LONGEST_SIDE, MOST_REPEATS
from library.errors import Problem
from library.options import option, parse_range, parse_size


def caption_suffix(extension: str, misspelt: str | None) -> str:
    """The one suffix of caption files, with its dot; that of the option's ``misspelt`` name wins."""
    chosen = misspelt or extension
    return chosen if chosen.startswith(".") else f".{chosen}"


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceOptions:
    """Data set."""

    dataset_config: Path | None = option(
        None,
        metavar="FILE",
        help="TOML or JSON file that describes the data set; takes the place of --train_data_dir, --reg_data_dir "
        "and --in_json.",
    )
    train_data_dir: Path | None = option(
        None,
        metavar="DIR",
        help="Folder that holds the image folders, each named 'repeats_identifier class' (for example '10_sks dog').",
    )
    reg_data_dir: Path | None = option(
        None, metavar="DIR", help="Folder that holds the folders of regularisation images, each named 'repeats_class'."
    )
    in_json: Path | None = option(
        None,
        metavar="FILE",
        help="Metadata file (.json or .jsonl) with the captions of the images in --train_data_dir, which then is the "
        "folder of the images themselves.",
    )
    dataset_class: str | None = option(
        None,
        metavar="MODULE.CLASS",
        help="Refused: a data set is described here (--dataset_config, --in_json), not programmed.",
    )
    dataset_repeats: int = option(
        1,
        minimum=1,
        maximum=MOST_REPEATS,
        help="How often each image is used in an epoch where the data set does not say it itself.",
    )
    cache_info: bool = option(
        False,
        help="Keep captions and image sizes in metadata_cache.json in each image folder, for programs that read it; "
        "checked at every start. The next start is as quick without it.",
    )
    conditioning_data_dir: Path | None = option(
        None,
        metavar="DIR",
        help="With --masked_loss: folder of mask images named like the training images, or of folders named like "
        "theirs; white is learnt, black is not.",
    )
    masked_loss: bool = option(
        False, help="Multiply the loss by masks, from --conditioning_data_dir or with --alpha_mask."
    )
    prior_loss_weight: float = option(1.0, minimum=0, help="Weight of the loss of regularisation images.")
    debug_dataset: bool = option(
        False,
        help="Write a page and pictures that show what would be trained on, batch by batch, to the folder "
        "dataset_preview in --output_dir, then end without training.",
    )

    def problems(self) -> list[Problem]:
        """Data sets are described, not programmed."""
        if self.dataset_class is None:
            return []
        return [
            Problem(
                f"--dataset_class {self.dataset_class} is not supported: a class written for another program cannot "
                "give the exact epochs, repeatable draws and resuming of a run here",
                "--dataset_class",
                "Let it write its images and captions to a folder once, or list them in a metadata file, and give "
                "--dataset_config or --in_json.",
            )
        ]


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckOptions:
    """Checking without training."""

    dry_run: bool = option(
        False, help="Check everything, show on one screen what a run would do, and end before the models are loaded."
    )
    validate_dataset: str | None = option(
        None,
        choices=("text", "json"),
        help="Look into every image and caption of the data set, say what is wrong with it as text or as JSON, and "
        "end: with exit code 2 where there are errors.",
    )


def multiple_of_8(value: int) -> str | None:
    """Why ``value`` is no side of an image; None where it is one."""
    return None if value % 8 == 0 else "must be a multiple of 8, such as 64 (the VAE shrinks images by 8)"


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageOptions:
    """Images."""

    resolution: tuple[int, int] | None = option(
        None,
        metavar="SIZE",
        parse=parse_size,
        minimum=8,
        maximum=LONGEST_SIDE,
        help="Training resolution: 'side' or 'width,height' in pixels. With buckets it gives the area.",
    )
    train_batch_size: int = option(1, minimum=1, maximum=MOST_REPEATS, help="Images per step on each device.")
    enable_bucket: bool = option(
        False, help="Sort images into buckets of similar aspect ratio, so that little is cropped."
    )
    min_bucket_reso: int = option(256, minimum=8, maximum=LONGEST_SIDE, help="Shortest side of a bucket, in pixels.")
    max_bucket_reso: int = option(1024, minimum=8, maximum=LONGEST_SIDE, help="Longest side of a bucket, in pixels.")
    bucket_reso_steps: int = option(
        64,
        minimum=8,
        maximum=LONGEST_SIDE,
        check=multiple_of_8,
        help="Bucket sides are multiples of this many pixels.",
    )
    bucket_no_upscale: bool = option(
        False, help="Never enlarge an image: a small one gets a bucket of its own size, rounded down."
    )
    resize_interpolation: str | None = option(
        None,
        choices=("lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area"),
        help="Interpolation when resizing; area for shrinking and lanczos for enlarging when absent.",
    )
    flip_aug: bool = option(False, help="Mirror half of the images, drawn anew each time. Not for faces or text.")
    color_aug: bool = option(
        False, help="Shift hue or gamma a little in a third of the cases; not together with cached latents."
    )
    random_crop: bool = option(
        False, help="Crop at a random place instead of the centre; not together with cached latents."
    )
    face_crop_aug_range: tuple[float, float] | None = option(
        None,
        metavar="MIN,MAX",
        parse=parse_range,
        above=0,
        help="Crop around the face whose place the file name gives (name_cx_cy_w_h), to between MIN and MAX times its "
        "size; only without buckets.",
    )
    alpha_mask: bool = option(False, help="Use an image's transparency as its mask for the loss.")

    def problems(self) -> list[Problem]:
        """Relations inside the group."""
        if self.min_bucket_reso <= self.max_bucket_reso:
            return []
        return [
            Problem(
                f"--min_bucket_reso {self.min_bucket_reso} is larger than --max_bucket_reso {self.max_bucket_reso}",
                "--min_bucket_reso",
                "Exchange the two, or raise --max_bucket_reso.",
            )
        ]


def _not_empty(value: str) -> str | None:
    return None if value else "must not be empty"


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionOptions:
    """Captions."""

    caption_extension: str = option(
        ".caption",
        metavar="EXT",
        check=_not_empty,
        help="Suffix of the caption file beside each image; many collections use .txt.",
    )
    caption_extention: str | None = option(
        None, metavar="EXT", help="Old, misspelt name of --caption_extension; wins when given."
    )
    caption_separator: str = option(
        ",", metavar="TEXT", check=_not_empty, help="What separates the parts (tags) of a caption."
    )
    shuffle_caption: bool = option(False, help="Shuffle the parts of a caption each time it is used.")
    keep_tokens: int = option(
        0, minimum=0, metavar="N", help="The first N parts of a caption stay in front: not shuffled, not dropped."
    )
    keep_tokens_separator: str = option(
        "",
        metavar="TEXT",
        help="Mark inside captions, for example '|||': parts before it are kept in front, parts after a second one "
        "at the end.",
    )
    secondary_separator: str | None = option(
        None,
        metavar="TEXT",
        help="Joins parts that stay together when shuffled or dropped, for example ';;;'; becomes the separator "
        "afterwards.",
    )
    enable_wildcard: bool = option(
        False, help="Choose one of {a|b|c} in captions, and one line of a caption file of several lines."
    )
    caption_prefix: str | None = option(None, metavar="TEXT", help="Put this text and a space before every caption.")
    caption_suffix: str | None = option(None, metavar="TEXT", help="Put a space and this text after every caption.")
    token_warmup_min: int = option(
        1,
        minimum=0,
        metavar="N",
        help="Number of caption parts used at the first step when --token_warmup_step is set.",
    )
    token_warmup_step: float = option(
        0,
        minimum=0,
        metavar="N",
        help="Step from which all parts of a caption are used; below 1 a fraction of all steps. 0 is off.",
    )
    caption_dropout_rate: float = option(
        0.0, minimum=0, maximum=1, metavar="RATE", help="How often (0 to 1) a caption is left out altogether."
    )
    caption_dropout_every_n_epochs: int = option(
        0, minimum=0, metavar="N", help="Leave out all captions in every N-th epoch. 0 is off."
    )
    caption_tag_dropout_rate: float = option(
        0.0, minimum=0, maximum=1, metavar="RATE", help="How often (0 to 1) each part of a caption is left out."
    )

    def settled(self) -> "CaptionOptions":
        """The same, with one caption suffix that starts with a dot."""
        extension = caption_suffix(self.caption_extension, self.caption_extention)
        return replace(self, caption_extension=extension, caption_extention=None)


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheOptions:
    """Latent cache."""

    cache_latents: bool = option(
        False, help="Encode every image once before training and keep the latents in memory: faster, less GPU memory."
    )
    vae_batch_size: int = option(
        1, minimum=1, synonyms={0: 1}, metavar="N", help="Images encoded at a time by the VAE."
    )
    cache_latents_to_disk: bool = option(
        False, help="Keep the latents in files beside the images; switches --cache_latents on."
    )
    skip_cache_check: bool = option(
        False, help="Use cache files by their names alone, without asking which images and settings they come from."
    )
    cache_text_encoder_outputs: bool = option(
        False,
        help="Encode every caption once before training, where the text encoder is not trained: faster, and the text "
        "encoder leaves the GPU. Captions must not change from use to use.",
    )

    def notices(self) -> list[str]:
        """What is switched on along with another option."""
        found = []
        if self.cache_latents_to_disk and not self.cache_latents:
            found.append("--cache_latents_to_disk switches --cache_latents on")
        if self.skip_cache_check and self.cache_latents_to_disk:
            found.append("--skip_cache_check: cache files made of other images or settings would go unnoticed")
        elif self.skip_cache_check:
            found.append("--skip_cache_check has no effect without --cache_latents_to_disk")
        return found

    def settled(self) -> "CacheOptions":
        """The same, with ``cache_latents`` on wherever latents are cached to disk."""
        return replace(self, cache_latents=self.cache_latents or self.cache_latents_to_disk)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoaderOptions:
    """Data loading."""

    max_data_loader_n_workers: int = option(
        8, minimum=0, metavar="N", help="Processes that prepare images, at most one per CPU; 0 prepares them in turn."
    )
    persistent_data_loader_workers: bool = option(
        False, help="Accepted for old command lines: the workers always stay for the whole run."
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationOptions:
    """Validation."""

    validation_seed: int | None = option(
        None,
        minimum=0,
        metavar="N",
        help="Seed of the choice of validation images and of their noise; 0 when absent, whatever --seed is.",
    )
    validation_split: float = option(
        0.0,
        minimum=0,
        maximum=1,
        metavar="PART",
        help="Part (0 to 1) of the images that is held out and measured instead of trained on; regularisation images "
        "never are. 0 is off.",
    )
    validate_every_n_steps: int | None = option(
        None, minimum=1, synonyms={0: None}, metavar="N", help="Validate after every N steps, too. 0 is off."
    )
    validate_every_n_epochs: int | None = option(
        None,
        minimum=1,
        synonyms={0: None},
        metavar="N",
        help="Validate after every N epochs; 1 when absent or 0. A saved model is validated in any case.",
    )
    max_validation_steps: int | None = option(
        None,
        minimum=1,
        synonyms={0: None},
        metavar="N",
        help="Most batches, over all processes, of one validation. 0 is no limit.",
    )
