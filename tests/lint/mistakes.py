"""Mistakes to plant: each spoils a clean data set in one way, and says what must be found.

A function takes the folder of the data set and returns further command line arguments, or None.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from tests.lint.checking import CAPTIONS, noise


@dataclass(frozen=True)
class Mistake:
    """One planted mistake.

    Attributes:
        spoil: Plants it.
        severity: What its finding must be.
        what: Words of the finding.
        where: A part of its place.
        remedy: Words of its remedy.
    """

    spoil: Callable[[Path], object]
    severity: str
    what: tuple[str, ...]
    where: str
    remedy: tuple[str, ...]


MISTAKES: dict[str, Mistake] = {}


def mistake(severity, what, where, remedy):
    """Register the function below as a planted mistake; texts are single words or tuples of them."""

    def register(spoil):
        as_tuple = [(words,) if isinstance(words, str) else tuple(words) for words in (what, remedy)]
        MISTAKES[spoil.__name__] = Mistake(spoil, severity, as_tuple[0], where, as_tuple[1])
        return spoil

    return register


def change(folder, old, new):
    """Replace text in the dataset file."""
    path = folder / "dataset.toml"
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, (old, text)
    path.write_text(text.replace(old, new), encoding="utf-8")


def general(folder, line):
    """Add a line to [general]."""
    change(folder, "[general]\n", f"[general]\n{line}\n")


def subset(folder, line):
    """Add a line to the subset."""
    change(folder, 'image_dir = "images"\n', f'image_dir = "images"\n{line}\n')


def caption(folder, number, text):
    (folder / "images" / f"{number}.txt").write_text(text, encoding="utf-8")


def captions(folder, texts):
    for number, text in enumerate(texts):
        caption(folder, number, text)


def add_regularisation(folder, count, line=""):
    (folder / "reg").mkdir()
    for number in range(count):
        noise(100 + number).save(folder / "reg" / f"{number}.png")
    path = folder / "dataset.toml"
    text = f'\n[[datasets.subsets]]\nimage_dir = "reg"\nis_reg = true\nclass_tokens = "dog"\n{line}\n'
    path.write_text(path.read_text(encoding="utf-8") + text, encoding="utf-8")


# --- folders


@mistake("error", "no files", "dataset.toml:", "Put")
def empty_folder(folder):
    for path in (folder / "images").iterdir():
        path.unlink()


@mistake("error", "folder not found", "dataset.toml:", ("Did you mean", "images"))
def misspelt_folder(folder):
    change(folder, '"images"', f"'{(folder / 'imagess').as_posix()}'")


@mistake("error", ("in the folders inside it", "inner (6)"), "dataset.toml:", "inner")
def images_one_level_lower(folder):
    inner = folder / "inner"
    inner.mkdir()
    for path in (folder / "images").iterdir():
        path.rename(inner / path.name)
    inner.rename(folder / "images" / "inner")


@mistake("error", "folder not found", "dataset.toml:", "The folder above it exists and fits")
def images_one_level_higher(folder):
    change(folder, '"images"', f"'{(folder / 'images' / 'raw').as_posix()}'")


@mistake("error", "is a file, not a folder", "dataset.toml:", "Give the folder")
def image_instead_of_folder(folder):
    change(folder, '"images"', '"images/0.png"')


@mistake("error", "folder not found", "dataset.toml:", "Write it with forward slashes")
def backslash_path(folder):
    shutil.copytree(folder / "images", folder / "sets" / "dog")
    change(folder, '"images"', f"'{folder.as_posix()}\\sets\\dog'")


@mistake("error", "is given twice", "dataset.toml:", "raise num_repeats")
def folder_twice(folder):
    path = folder / "dataset.toml"
    path.write_text(path.read_text() + '\n[[datasets.subsets]]\nimage_dir = "images"\n')


@mistake("error", "holds only", "dataset.toml:", "convert them")
def only_formats_that_are_not_read(folder):
    for path in (folder / "images").glob("*.png"):
        path.with_suffix(".heic").write_bytes(b"heic")
        path.unlink()


@mistake("warning", ".svg files", "dataset.toml:", "Convert them")
def some_formats_that_are_not_read(folder):
    (folder / "images" / "6.svg").write_bytes(b"vector")


@mistake("error", "images itself", "--train_data_dir", "Give the folder above it")
def named_folder_itself_given(folder):
    (folder / "images").rename(folder / "5_sks dog")
    return folders_at(folder / "5_sks dog")


@mistake("error", "are not called '<repeats>_<class>'", "--train_data_dir", "10_images")
def folder_without_repeats(folder):
    (folder / "base").mkdir()
    (folder / "images").rename(folder / "base" / "images")
    return folders_at(folder / "base")


@mistake("warning", "is ignored", "--train_data_dir", "10_other")
def one_folder_without_repeats(folder):
    (folder / "base").mkdir()
    shutil.copytree(folder / "images", folder / "base" / "other")
    (folder / "images").rename(folder / "base" / "5_sks dog")
    return folders_at(folder / "base")


@mistake("error", "no training images are given", "command line", "--train_data_dir")
def no_data_at_all(folder):
    (folder / "dataset.toml").unlink()
    return ["--resolution=128"]


@mistake("warning", "are ignored", "--dataset_config", "Leave them out")
def folders_beside_a_dataset_file(folder):
    return [f"--dataset_config={folder / 'dataset.toml'}", f"--train_data_dir={folder}"]


def folders_at(base):
    return [
        f"--train_data_dir={base}",
        "--resolution=128",
        "--caption_extension=.txt",
        "--enable_bucket",
        "--min_bucket_reso=64",
    ]


# --- image files


@mistake("error", "the image cannot be read", "3.png", "Replace the file")
def not_an_image(folder):
    (folder / "images" / "3.png").write_bytes(b"not an image")


@mistake("error", "the file is empty", "3.png", "Replace the file")
def empty_image(folder):
    (folder / "images" / "3.png").write_bytes(b"")


@mistake("error", "web page", "3.png", "Replace the file")
def web_page_as_image(folder):
    (folder / "images" / "3.png").write_text("<html><body>404</body></html>")


@mistake("error", "the image cannot be read", "3.png", "Replace the file")
def truncated_png(folder):
    path = folder / "images" / "3.png"
    path.write_bytes(path.read_bytes()[:-5000])


@mistake("error", "the image cannot be read", "6.jpg", "Replace the file")
def truncated_jpeg(folder):
    path = folder / "images" / "6.jpg"
    noise(6).save(path)
    path.write_bytes(path.read_bytes()[:-2000])
    caption(folder, 6, "sks dog, a picture that is cut off")


@mistake("error", "the image cannot be decoded", "3.png", "Replace the file")
def damage_in_the_middle(folder):
    path = folder / "images" / "3.png"
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 40] = bytes(40)
    path.write_bytes(bytes(content))


@mistake("warning", ("transparent", "3.png"), "dataset.toml:", "background")
def transparent_image(folder):
    image = noise(3).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    image.save(folder / "images" / "3.png")


@mistake("warning", ("EXIF orientation", "3.jpg"), "dataset.toml:", "Nothing needs to be done")
def turned_photo(folder):
    (folder / "images" / "3.png").unlink()
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(3).save(folder / "images" / "3.jpg", exif=exif)


@mistake("warning", ("animations", "3.webp"), "dataset.toml:", "images of their own")
def animation(folder):
    (folder / "images" / "3.png").unlink()
    noise(3).save(folder / "images" / "3.webp", save_all=True, append_images=[noise(30)], lossless=True)


@mistake("warning", ("nothing but one colour", "3.png"), "dataset.toml:", "Remove them")
def blank_image(folder):
    Image.new("RGB", (128, 128), "navy").save(folder / "images" / "3.png")


@mistake("warning", ("the same image is there 2 times", "images/0.png", "images/9.png"), "dataset.toml:", "repeats")
def copy_of_an_image(folder):
    shutil.copy(folder / "images" / "0.png", folder / "images" / "9.png")
    caption(folder, 9, "sks dog, once again")


@mistake("warning", ("look the same", "0.png and 9.jpg"), "dataset.toml:", "Keep the better one")
def recompressed_copy(folder):
    smooth = noise(50, (4, 4)).resize((128, 128), Image.Resampling.BICUBIC)
    smooth.save(folder / "images" / "0.png")
    smooth.resize((160, 160)).save(folder / "images" / "9.jpg", quality=80)
    caption(folder, 9, "sks dog, once again")


@mistake("warning", ("for training and for regularisation", "reg/0.png"), "dataset.toml:", "Remove the copies")
def training_image_as_regularisation(folder):
    add_regularisation(folder, 12)
    shutil.copy(folder / "images" / "0.png", folder / "reg" / "0.png")


# --- sizes and buckets


@mistake("warning", ("enlarged more than twice", "3.png 40x40"), "dataset.toml:", "larger images")
def tiny_image(folder):
    noise(3, (40, 40)).save(folder / "images" / "3.png")


@mistake("warning", ("huge", "3.jpg 4200x2000"), "dataset.toml:", "Shrink")
def huge_image(folder):
    Image.effect_noise((4200, 2000), 80).convert("RGB").resize((4200, 2000)).save(folder / "images" / "3.jpg")
    (folder / "images" / "3.png").unlink()


@mistake("warning", ("lose more than 30%", "3.png 1200x128"), "dataset.toml:", "min_bucket_reso")
def extreme_shape(folder):
    noise(3, (1200, 128)).save(folder / "images" / "3.png")


@mistake("error", "fits no bucket", "3.png", "bucket_no_upscale")
def too_small_without_enlarging(folder):
    noise(3, (40, 128)).save(folder / "images" / "3.png")
    general(folder, "bucket_no_upscale = true")


@mistake("warning", ("are not 128x128", "3.png 128x160"), "dataset.toml:", "--enable_bucket")
def other_sizes_without_buckets(folder):
    change(folder, "enable_bucket = true", "enable_bucket = false")
    noise(3, (128, 160)).save(folder / "images" / "3.png")


@mistake("warning", ("buckets hold fewer images", "64x256 (2)"), "dataset.toml:", "crop images to common shapes")
def bucket_smaller_than_a_batch(folder):
    change(folder, "batch_size = 2", "batch_size = 4")
    noise(3, (64, 256)).save(folder / "images" / "3.png")


@mistake("warning", "batch_size 64 is never reached", "dataset.toml:", "Lower batch_size to 12")
def batch_larger_than_the_set(folder):
    change(folder, "batch_size = 2", "batch_size = 64")


@mistake("error", "no training resolution", "dataset.toml:", "--resolution")
def no_resolution(folder):
    change(folder, "resolution = 128\n", "")


@mistake("error", ("min_bucket_reso 512", "fits no bucket"), "dataset.toml:", "min_bucket_reso = 128 or less")
def lowest_side_above_the_resolution(folder):
    change(folder, "min_bucket_reso = 64", "min_bucket_reso = 512")


@mistake("error", ("max_bucket_reso 64", "fits no bucket"), "dataset.toml:", "max_bucket_reso = 128 or more")
def longest_side_below_the_resolution(folder):
    general(folder, "max_bucket_reso = 64")


@mistake("error", "min_bucket_reso 32 is below bucket_reso_steps 64", "dataset.toml:", "min_bucket_reso = 64")
def lowest_side_below_the_step(folder):
    change(folder, "min_bucket_reso = 64", "min_bucket_reso = 32")


@mistake("warning", "min_bucket_reso 100 is rounded to 64", "dataset.toml:", "min_bucket_reso = 64")
def lowest_side_off_the_grid(folder):
    change(folder, "min_bucket_reso = 64", "min_bucket_reso = 100")


@mistake("error", "bucket_reso_steps 60 is not a multiple of 8", "dataset.toml:", "64")
def step_off_the_vae_grid(folder):
    general(folder, "bucket_reso_steps = 60")


@mistake("warning", "bucket_reso_steps 32 is not a multiple of 64", "dataset.toml:", "64")
def step_off_the_unet_grid(folder):
    general(folder, "bucket_reso_steps = 32")


@mistake("error", "not multiples of 8", "dataset.toml:", "128x128")
def resolution_off_the_grid(folder):
    change(folder, "enable_bucket = true", "enable_bucket = false")
    change(folder, "resolution = 128", "resolution = 130")
    for number in range(6):
        noise(number, (130, 130)).save(folder / "images" / f"{number}.png")


# --- captions


@mistake("error", ("the caption cannot be read", "Windows-1252"), "3.txt", "UTF-8")
def caption_in_a_code_page(folder):
    (folder / "images" / "3.txt").write_bytes("sks dog in a café".encode("cp1252"))


@mistake("error", ("the caption cannot be read", "UTF-16"), "3.txt", "UTF-8")
def caption_in_utf16(folder):
    (folder / "images" / "3.txt").write_bytes("sks dog".encode("utf-16"))


@mistake("error", ("no .caption files", ".txt files beside 6 of 6"), "dataset.toml:", "caption_extension = '.txt'")
def wrong_caption_extension(folder):
    change(folder, 'caption_extension = ".txt"\n', "")


@mistake("warning", "no captions in 'images' and no class tokens", "dataset.toml:", "class_tokens")
def no_captions_and_no_class(folder):
    for path in (folder / "images").glob("*.txt"):
        path.unlink()
    change(folder, 'class_tokens = "sks dog"\n', "")


@mistake("warning", ("1 of 6 images", "3.png"), "dataset.toml:", "missing captions")
def one_caption_missing(folder):
    (folder / "images" / "3.txt").unlink()


@mistake("warning", ("are empty", "3.png"), "dataset.toml:", "Write a caption")
def empty_caption(folder):
    caption(folder, 3, "")


@mistake("warning", ("several lines", "3.png"), "dataset.toml:", "enable_wildcard")
def caption_of_several_lines(folder):
    caption(folder, 3, "sks dog, sitting\nsks dog, running")


@mistake("warning", "all 6 captions in 'images' are the same", "dataset.toml:", "Describe")
def captions_all_alike(folder):
    captions(folder, ["sks dog, a photo"] * 6)


@mistake("warning", "5 of 6 captions in 'images' are the same: 'sks dog, a photo'", "dataset.toml:", "Describe")
def captions_mostly_alike(folder):
    captions(folder, ["sks dog, a photo"] * 5)


@mistake("warning", "look like wildcards", "dataset.toml:", "enable_wildcard = true")
def wildcards_that_are_off(folder):
    caption(folder, 3, "sks dog, a {red|blue} collar")


@mistake("warning", ("'sks' of the class tokens", "none of the 6 captions"), "dataset.toml:", "caption_prefix")
def token_absent(folder):
    captions(folder, [text.replace("sks ", "") for text in CAPTIONS])


@mistake("warning", ("longer than 75 tokens", "lost", "the very end"), "3.png", "--max_token_length")
def caption_too_long(folder):
    caption(folder, 3, "sks dog, " + "a long story of a dog and a cat, " * 9 + "the very end")


@mistake(
    "warning",
    ("longer than 75 tokens", "lost"),
    "3.png",
    ("--max_token_length=225", "the most there is", "306 tokens"),
)
def caption_of_three_hundred_tokens(folder):
    caption(folder, 3, "sks dog, " + "a dog, " * 101)


@mistake("warning", ("is in no caption", "|||"), "dataset.toml:", "'|||'")
def keep_mark_absent(folder):
    general(folder, 'keep_tokens_separator = "|||"')


@mistake("warning", ("stays in the captions", "|||"), "dataset.toml:", "shuffle_caption")
def keep_mark_without_shuffling(folder):
    general(folder, 'keep_tokens_separator = "|||"')
    change(folder, "shuffle_caption = true\n", "")
    change(folder, "keep_tokens = 1\n", "")
    captions(folder, [text.replace(", ", " ||| ", 1) for text in CAPTIONS])


@mistake("warning", ("markup or JSON", "3.png"), "dataset.toml:", "plain text")
def caption_is_markup(folder):
    caption(folder, 3, '<div class="sks">sks dog, sitting</div>')


@mistake("warning", ("garbled", "3.png"), "dataset.toml:", "UTF-8")
def caption_is_garbled(folder):
    caption(folder, 3, "sks dog, in a cafÃ©")


@mistake("warning", ("left or right", "3.png"), "dataset.toml:", "flip_aug = false")
def sides_with_mirroring(folder):
    caption(folder, 3, "sks dog, looking to the left")
    general(folder, "flip_aug = true")


@mistake("warning", "has the separator ','", "dataset.toml:", "caption_separator")
def tags_with_another_separator(folder):
    captions(folder, [text.replace(",", ";") for text in CAPTIONS])


@mistake("warning", "keeps every tag", "dataset.toml:", "Lower keep_tokens")
def all_tags_kept(folder):
    change(folder, "keep_tokens = 1", "keep_tokens = 5")


@mistake("warning", "keep_tokens 1 has no effect", "dataset.toml:", "shuffle_caption = true")
def keep_tokens_without_shuffling(folder):
    change(folder, "shuffle_caption = true\n", "")


@mistake("warning", ("each used for several images", "3.jpg"), "dataset.toml:", "different names")
def two_images_of_one_name(folder):
    noise(33).save(folder / "images" / "3.jpg")


@mistake("warning", ("belong to no image", "77.txt"), "dataset.toml:", "Name them")
def caption_without_image(folder):
    caption(folder, 77, "sks dog, where is it")


# --- rules


@mistake("warning", "leaves out every caption", "dataset.toml:", "small rate")
def every_caption_dropped(folder):
    general(folder, "caption_dropout_rate = 1.0")


@mistake("warning", "caption_dropout_every_n_epochs 1", "dataset.toml:", "larger number of epochs")
def captions_dropped_in_every_epoch(folder):
    general(folder, "caption_dropout_every_n_epochs = 1")


@mistake("warning", "leaves out every tag", "dataset.toml:", "small rate")
def every_tag_dropped(folder):
    general(folder, "caption_tag_dropout_rate = 1")


@mistake("warning", "token_warmup_min 3 has no effect", "dataset.toml:", "token_warmup_step")
def warmup_without_steps(folder):
    general(folder, "token_warmup_min = 3")


@mistake("warning", "secondary_separator and caption_separator are both", "dataset.toml:", ";;;")
def separators_alike(folder):
    general(folder, 'secondary_separator = ","')


@mistake("warning", "num_repeats 5000", "dataset.toml:", "number of steps or epochs")
def very_many_repeats(folder):
    change(folder, "num_repeats = 2", "num_repeats = 5000")


@mistake("error", ("color_aug", "cannot be cached"), "dataset.toml:", ("--cache_latents", "color_aug"))
def colour_changes_with_cached_latents(folder):
    general(folder, "color_aug = true")
    return [f"--dataset_config={folder / 'dataset.toml'}", "--cache_latents"]


@mistake("error", ("random_crop", "cannot be cached"), "dataset.toml:", ("--cache_latents", "random_crop"))
def random_crops_with_cached_latents(folder):
    general(folder, "random_crop = true")
    return [f"--dataset_config={folder / 'dataset.toml'}", "--cache_latents"]


# --- regularisation


@mistake("error", "only regularisation images", "dataset.toml:", "Add the images to train on")
def only_regularisation(folder):
    subset(folder, "is_reg = true")


@mistake("warning", ("regularisation images are repeated up to", "balance 240"), "dataset.toml:", "fewer repeats")
def few_regularisation_images(folder):
    change(folder, "num_repeats = 2", "num_repeats = 40")
    add_regularisation(folder, 2)


@mistake("warning", "regularisation images are not used", "dataset.toml:", "Raise num_repeats")
def unused_regularisation_images(folder):
    add_regularisation(folder, 20)


@mistake("warning", "40 regularisation images and only 12 training images", "dataset.toml:", "Lower num_repeats")
def regularisation_outweighs(folder):
    add_regularisation(folder, 2, "num_repeats = 40")


# --- the dataset file


@mistake("error", "num_repeats", "dataset.toml:", "num_repeats = 1")
def repeats_of_zero(folder):
    change(folder, "num_repeats = 2", "num_repeats = 0")


@mistake("error", "num_repeat", "dataset.toml:16", "num_repeats")
def misspelt_key(folder):
    change(folder, "num_repeats = 2", "num_repeat = 2")


@mistake("error", ("batch_size", "two"), "dataset.toml:", "batch_size = 1")
def wrong_type(folder):
    change(folder, "batch_size = 2", 'batch_size = "two"')


@mistake("error", "batch_size", "dataset.toml:", "batch_size = 1")
def batch_of_zero(folder):
    change(folder, "batch_size = 2", "batch_size = 0")


@mistake("error", ("caption_dropout_rate", "7"), "dataset.toml:", "0.1")
def rate_above_one(folder):
    general(folder, "caption_dropout_rate = 7.0")


@mistake("error", ("caption_tag_dropout_rate", "-0.5"), "dataset.toml:", "0.1")
def rate_below_zero(folder):
    general(folder, "caption_tag_dropout_rate = -0.5")


@mistake("error", ("keep_tokens", "-1"), "dataset.toml:", "keep_tokens")
def negative_count(folder):
    change(folder, "keep_tokens = 1", "keep_tokens = -1")


@mistake("error", "unknown section or key: dataset", "dataset.toml", "[[datasets]]")
def misspelt_section(folder):
    change(folder, "[general]", "[[dataset]]\nresolution = 64\n\n[general]")


@mistake("error", "train_batch_size", "dataset.toml:", "batch_size")
def name_of_the_command_line(folder):
    change(folder, "batch_size = 2", "train_batch_size = 2")


@mistake("error", "batch_size", "dataset.toml:", "[[datasets]]")
def key_in_the_wrong_section(folder):
    subset(folder, "batch_size = 4")


@mistake("error", "outside of every section", "dataset.toml:", "Move it")
def key_outside_of_sections(folder):
    path = folder / "dataset.toml"
    path.write_text("shuffle_caption = true\n" + path.read_text().replace("shuffle_caption = true\n", ""))


@mistake("error", "no image_dir", "dataset.toml:", "image_dir")
def subset_without_folder(folder):
    change(folder, 'image_dir = "images"\n', "")


@mistake("error", "has no subsets", "dataset.toml:", "[[datasets.subsets]]")
def data_set_without_subsets(folder):
    path = folder / "dataset.toml"
    path.write_text(path.read_text().split("[[datasets.subsets]]")[0])


@mistake("error", "describes no data set", "dataset.toml", "[[datasets]]")
def file_without_data_sets(folder):
    path = folder / "dataset.toml"
    path.write_text(path.read_text().split("[[datasets]]")[0])


@mistake("error", "cannot be read", "dataset.toml", "Mend that line")
def broken_toml(folder):
    change(folder, "[[datasets]]", "[[datasets]")


@mistake("error", "datasets must be a list of tables", "dataset.toml:", "[[datasets]]")
def single_brackets(folder):
    change(folder, "[[datasets]]", "[datasets]")


@mistake("error", "is_reg does not belong under [general]", "dataset.toml:", "[[datasets.subsets]]")
def regularisation_for_all(folder):
    general(folder, "is_reg = true")


@mistake("error", "not UTF-8", "dataset.toml", "encoding UTF-8")
def dataset_file_in_utf16(folder):
    path = folder / "dataset.toml"
    path.write_bytes(path.read_text(encoding="utf-8").encode("utf-16"))


@mistake("error", "cannot be read", "dataset.toml", "single quotes")
def windows_path_in_double_quotes(folder):
    change(folder, '"images"', '"C:\\users\\images"')


@mistake("error", "dataset file not found", "--dataset_config", "dataset.toml")
def misspelt_dataset_file(folder):
    return [f"--dataset_config={folder / 'datasets.toml'}"]


@mistake("error", ".toml or .json", "--dataset_config", "Rename")
def dataset_file_of_another_kind(folder):
    (folder / "dataset.toml").rename(folder / "dataset.yaml")
    return [f"--dataset_config={folder / 'dataset.yaml'}"]


# --- masks


def masked(folder):
    """Ask for masks of the folder ``masks``, all of them half white."""
    (folder / "masks").mkdir()
    subset(folder, 'conditioning_data_dir = "masks"')
    mask = Image.new("L", (128, 128))
    mask.paste(255, (0, 0, 64, 128))
    for number in range(6):
        mask.save(folder / "masks" / f"{number}.png")
    return [f"--dataset_config={folder / 'dataset.toml'}", "--masked_loss"]


@mistake("error", "masks are not switched on", "dataset.toml:", "--masked_loss")
def masks_without_masked_loss(folder):
    return masked(folder)[:1]


@mistake("error", "but no masks", "--masked_loss", "conditioning_data_dir")
def masked_loss_without_masks(folder):
    return [f"--dataset_config={folder / 'dataset.toml'}", "--masked_loss"]


@mistake("error", ("have no mask", "3.png"), "dataset.toml:", "Save a mask")
def one_mask_missing(folder):
    arguments = masked(folder)
    (folder / "masks" / "3.png").unlink()
    return arguments


@mistake("warning", ("belong to no image", "9.png"), "dataset.toml:", "names of their images")
def mask_without_image(folder):
    arguments = masked(folder)
    shutil.copy(folder / "masks" / "3.png", folder / "masks" / "9.png")
    return arguments


@mistake("error", "are black", "dataset.toml:", "Paint white")
def black_masks(folder):
    arguments = masked(folder)
    for path in (folder / "masks").iterdir():
        Image.new("L", (128, 128)).save(path)
    return arguments


# --- metadata files


def described(folder, text=None, **entries):
    """Describe the images by a metadata file instead of caption files."""
    content = {f"{number}.png": {"caption": caption} for number, caption in enumerate(CAPTIONS)} | entries
    (folder / "meta.json").write_text(text or json.dumps(content), encoding="utf-8")
    subset(folder, 'metadata_file = "meta.json"')
    change(folder, 'class_tokens = "sks dog"\n', "")
    change(folder, 'caption_extension = ".txt"\n', "")


@mistake("error", ("1 of 7 entries match no image", "77.png"), "meta.json", "remove the keys")
def entry_without_image(folder):
    described(folder, **{"77.png": {"caption": "sks dog, where is it"}})


@mistake("error", "names no image", "meta.json", "Fill it")
def empty_metadata(folder):
    described(folder, text="{}")


@mistake("warning", ("neither caption nor tags", "3.png"), "meta.json", "Write captions or tags")
def silent_entry(folder):
    described(folder, **{"3.png": {}})


@mistake("error", "metadata file not found", "dataset.toml:", "Did you mean")
def misspelt_metadata(folder):
    described(folder)
    (folder / "meta.json").rename(folder / "metas.json")
    change(folder, '"meta.json"', f"'{(folder / 'meta.json').as_posix()}'")


@mistake("error", "holds no JSON object", "meta.json:1", '{"image.png"')
def metadata_is_a_list(folder):
    described(folder, text='[{"file_name": "0.png", "caption": "sks dog"}]')


@mistake("error", "is no JSON", "meta.json:1", "Mend that line")
def metadata_with_a_comma_too_many(folder):
    described(folder, text='{"0.png": {"caption": "sks dog",}}')


@mistake("error", ("must be an object", "3.png"), "meta.json", '{"caption": "..."}')
def metadata_entry_without_keys(folder):
    described(folder, **{"3.png": "sks dog, in the snow"})


@mistake("error", ("tags must be text", "3.png"), "meta.json", '"tags": "..."')
def metadata_tags_as_a_list(folder):
    described(folder, **{"3.png": {"tags": ["sks dog", "snow"]}})
