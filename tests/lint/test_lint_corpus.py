"""Every planted mistake is found with its own message and remedy, and clean data sets have no errors."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from tests.lint.checking import CAPTIONS, findings_of, noise, write_clean
from tests.lint.mistakes import MISTAKES, add_regularisation, change, folders_at, general


def test_the_corpus_is_large_enough():
    assert len(MISTAKES) >= 60


@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_is_found(name, tmp_path, capsys):
    planted = MISTAKES[name]
    config = write_clean(tmp_path / "data")
    arguments = planted.spoil(tmp_path / "data") or [f"--dataset_config={config}"]
    findings, code = findings_of(capsys, *arguments)
    own = [finding for finding in findings if fits(finding, planted)]
    assert own, findings
    # What is planted is all that is wrong.
    assert [finding for finding in findings if finding["severity"] == "error" and finding not in own] == []
    assert code == (2 if planted.severity == "error" else 0)
    for finding in findings:
        assert finding["what"]
        assert finding["where"]
        assert finding["remedy"]


def fits(finding, planted):
    return (
        finding["severity"] == planted.severity
        and all(words in finding["what"] for words in planted.what)
        and planted.where in finding["where"]
        and all(words in finding["remedy"] for words in planted.remedy)
    )


# --- clean data sets: no error, and where nothing is remarkable not a word


def plain(folder):
    return None


def with_regularisation(folder):
    add_regularisation(folder, 12)


def several_shapes(folder):
    for number, size in enumerate([(128, 128), (256, 64), (64, 256), (144, 128), (128, 128), (250, 64)]):
        noise(number, size).save(folder / "images" / f"{number}.png")
    change(folder, "batch_size = 2", "batch_size = 1")


def several_formats(folder):
    for number, suffix in enumerate((".jpg", ".webp", ".bmp")):
        (folder / "images" / f"{number}.png").unlink()
        noise(number).save(folder / "images" / f"{number}{suffix}")


def wildcards(folder):
    general(folder, "enable_wildcard = true")
    (folder / "images" / "3.txt").write_text("sks dog, a {red|blue} ball\nsks dog, playing\n", encoding="utf-8")


def class_tokens_only(folder):
    for path in (folder / "images").glob("*.txt"):
        path.unlink()


def named_folders(folder):
    (folder / "base").mkdir()
    (folder / "images").rename(folder / "base" / "5_sks dog")
    return folders_at(folder / "base")


def as_json(folder):
    content = {
        "general": {"enable_bucket": True, "caption_extension": ".txt"},
        "datasets": [
            {
                "resolution": [128, 128],
                "min_bucket_reso": 64,
                "batch_size": 2,
                "subsets": [{"image_dir": str(folder / "images"), "num_repeats": 3}],
            }
        ],
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    return [f"--dataset_config={folder / 'dataset.json'}"]


def strange_names(folder):
    for number, name in enumerate(("日本語", "a.b.c", "with space", "<b>", "ümlaut", "x;y")):
        (folder / "images" / f"{number}.png").rename(folder / "images" / f"{name}.png")
        (folder / "images" / f"{number}.txt").rename(folder / "images" / f"{name}.txt")


def two_resolutions(folder):
    path = folder / "dataset.toml"
    again = '\n[[datasets]]\nresolution = 64\nmin_bucket_reso = 64\n[[datasets.subsets]]\nimage_dir = "images"\n'
    path.write_text(path.read_text() + again)


def byte_order_marks(folder):
    for number, text in enumerate(CAPTIONS):
        (folder / "images" / f"{number}.txt").write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\r\n")


def grey_and_palette(folder):
    noise(0).convert("L").save(folder / "images" / "0.png")
    noise(1).convert("P").save(folder / "images" / "1.png")
    noise(2).convert("CMYK").save(folder / "images" / "2.jpg")
    (folder / "images" / "2.png").unlink()
    deep = np.random.default_rng(3).integers(0, 65536, (128, 128)).astype(np.uint16)
    Image.fromarray(deep).save(folder / "images" / "3.png")


def suffixes_in_capitals(folder):
    for path in [*(folder / "images").iterdir()]:
        path.rename(path.with_suffix(path.suffix.upper()))


CLEAN = (
    plain,
    with_regularisation,
    several_shapes,
    several_formats,
    wildcards,
    class_tokens_only,
    named_folders,
    as_json,
    strange_names,
    two_resolutions,
    byte_order_marks,
    grey_and_palette,
    suffixes_in_capitals,
)


@pytest.mark.parametrize("arrange", CLEAN, ids=lambda arrange: arrange.__name__)
def test_a_clean_set_has_no_findings(arrange, tmp_path, capsys):
    config = write_clean(tmp_path / "data")
    arguments = arrange(tmp_path / "data") or [f"--dataset_config={config}"]
    findings, code = findings_of(capsys, *arguments)
    assert findings == []
    assert code == 0


def test_all_planted_at_once_are_all_found(tmp_path, capsys):
    config = write_clean(tmp_path / "data")
    names = ("not_an_image", "caption_in_a_code_page", "rate_above_one", "transparent_image")
    shutil.copy(tmp_path / "data" / "images" / "3.png", tmp_path / "data" / "images" / "4.png")
    MISTAKES["caption_in_a_code_page"].spoil(tmp_path / "data")
    MISTAKES["rate_above_one"].spoil(tmp_path / "data")
    MISTAKES["not_an_image"].spoil(tmp_path / "data")
    findings, code = findings_of(capsys, f"--dataset_config={config}")
    for name in names[:3]:
        assert any(fits(finding, MISTAKES[name]) for finding in findings)
    assert code == 2
