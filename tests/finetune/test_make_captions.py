"""Both captioning tools end to end, with tiny models."""

import json
from pathlib import Path

import pytest

from finetune import make_captions, make_captions_by_git
from finetune.git_captions import without_visible_text
from tests.finetune.runs import ROOT, TORCHRUN, mistake, start, texts
from tests.finetune.tiny_models import PLACES, write_images

GOLDEN = json.loads((ROOT / "tests/golden/git_remove_words.json").read_text())


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    write_images(folder, 5)
    write_images(folder / "inner", 2, seed=1)
    return folder


@pytest.fixture
def blip(blip_folder, images):
    """Runs BLIP over the images; returns the exit code and the captions."""

    def run(*argv):
        code = make_captions.main(
            [str(images), "--caption_weights", str(blip_folder), "--max_length", "16", *map(str, argv)]
        )
        return code, texts(images, ".caption")

    return run


def test_a_caption_an_image_and_nothing_else(blip, images):
    before = {path.name for path in images.iterdir()}
    code, captions = blip()
    assert code == 0
    assert sorted(captions) == [f"{number:03d}.caption" for number in range(5)]
    assert {path.name for path in images.iterdir()} == before | set(captions)
    assert len(set(captions.values())) == 5
    for text in captions.values():
        assert text.endswith(b"\n")
        assert text.count(b"\n") == 1
        assert not text.startswith(b"a picture of")


@pytest.mark.parametrize("search", [(), ("--beam_search",), ("--beam_search", "--num_beams", 3)])
def test_neither_batches_nor_threads_nor_other_images_change_a_caption(blip, images, search):
    _, alone = blip(*search)
    for further in (("--batch_size", 2), ("--batch_size", 8, "--max_data_loader_n_workers", 3)):
        assert blip(*search, *further)[1] == alone
    (images / "001.png").unlink()
    (images / "001.caption").unlink()
    _, without = blip(*search, "--batch_size", 3, "--max_data_loader_n_workers", 0)
    assert without == {name: text for name, text in alone.items() if name != "001.caption"}


def test_the_seed_decides_what_is_drawn(blip):
    first = blip("--seed", 1)[1]
    assert blip("--seed", 2)[1] != first
    assert blip("--seed", 1)[1] == first


def test_options_reach_the_model(blip):
    assert blip("--top_p", 0.0001)[1] != blip("--top_p", 1)[1]
    lengths = [len(text.split()) for text in blip("--min_length", 14, "--max_length", 16)[1].values()]
    assert min(lengths) >= 10
    assert max(len(text.split()) for text in blip("--max_length", 8)[1].values()) <= 4


def test_recursive_with_another_suffix(blip, images):
    code, _ = blip("--recursive", "--caption_extention", "txt")
    assert code == 0
    names = [f"{number:03d}.txt" for number in range(5)] + ["inner/000.txt", "inner/001.txt"]
    assert sorted(texts(images, ".txt")) == names


def test_existing_captions_are_replaced_unless_skipped(blip, images, capsys):
    _, expected = blip()
    (images / "002.caption").write_text("mine\n")
    (images / "004.caption").unlink()
    capsys.readouterr()
    _, kept = blip("--skip_existing")
    assert kept == expected | {"002.caption": b"mine\n"}
    assert "4 of 5 images have a .caption file already and are left out" in capsys.readouterr().err
    assert blip()[1] == expected
    assert "5 .caption files exist and are made anew" in capsys.readouterr().err
    assert blip("--skip_existing") == (0, expected)


def test_a_bad_image_is_named_and_the_others_are_done(blip, images, capsys):
    _, expected = blip()
    (images / "001.png").write_bytes((images / "001.png").read_bytes()[:60])
    (images / "001.caption").unlink()
    code, captions = blip("--batch_size", 2)
    assert code == 1
    assert captions == {name: text for name, text in expected.items() if name != "001.caption"}
    told = capsys.readouterr().err
    assert "left out" in told
    assert "1 images could not be read" in told
    assert told.count("001.png: cannot read the image") == 2


def test_odd_names(blip, images):
    long = "x" * 240
    for name in ("猫 & é.png", "with.dots.png", f"{long}.png"):
        (images / "000.png").rename(images / name)
        (images / name).with_name("000.png").write_bytes((images / name).read_bytes())
    _, captions = blip()
    assert {"猫 & é.caption", "with.dots.caption", f"{long}.caption"} <= captions.keys()


def test_mistakes_are_told_before_a_model_is_loaded(images, tmp_path, monkeypatch):
    def never(*_):
        raise AssertionError("no model is loaded")

    monkeypatch.setattr("finetune.blip.load_blip", never)
    main = make_captions.main
    assert "train_data_dir is missing" in mistake(main)
    assert "no such folder" in mistake(main, tmp_path / "imagse") or "imagse" in mistake(main, tmp_path / "imagse")
    (tmp_path / "empty").mkdir()
    assert "no images" in mistake(main, tmp_path / "empty")
    assert "--min_length 9 is more than --max_length 8" in mistake(main, images, "--min_length", 9, "--max_length", 8)
    assert "would overwrite the images" in mistake(main, images, "--caption_extension", ".PNG")
    assert "there are 2 words" in mistake(main, images, tmp_path)
    assert "there is no option --beem_search" in mistake(main, images, "--beem_search")


def test_only_folders_inside_hold_images(tmp_path):
    write_images(tmp_path / "inner", 1)
    assert "--recursive" in mistake(make_captions.main, tmp_path)


def test_a_model_that_cannot_be_used(images, tmp_path):
    (tmp_path / "model").mkdir()
    assert "cannot read the BLIP model" in mistake(make_captions.main, images, "--caption_weights", tmp_path / "model")
    assert texts(images, ".caption") == {}


def test_a_longer_caption_than_the_model_has_places(images, blip_folder):
    words = (images, "--caption_weights", blip_folder, "--max_length", PLACES + 1)
    assert f"more than the {PLACES} tokens of this model" in mistake(make_captions.main, *words)


def test_debug_shows_results(blip, capsys):
    _, captions = blip("--debug")
    shown = capsys.readouterr().out
    assert all(text.decode().strip() in shown for text in captions.values())


def test_from_inside_the_folder_of_the_tools(images, blip_folder):
    script = start(
        "make_captions.py", "--batch_size", 8, images, "--caption_weights", blip_folder, cwd=ROOT / "finetune"
    )
    _, errors = script.communicate(timeout=120)
    assert script.returncode == 0, errors
    assert len(texts(images, ".caption")) == 5


@pytest.mark.slow
def test_two_processes_share_the_images(blip, blip_folder, images):
    (images / "003.png").write_bytes(b"")
    code, alone = blip()
    assert code == 1
    for name in alone:
        (images / name).unlink()
    words = (images, "--caption_weights", blip_folder, "--max_length", 16, "--batch_size", 2)
    script = start(ROOT / "finetune/make_captions.py", *words, cwd=images, launcher=TORCHRUN)
    _, errors = script.communicate(timeout=240)
    assert script.returncode == 1, errors
    assert texts(images, ".caption") == alone
    assert errors.count("1 images could not be read") == 1
    assert "003.png: cannot read the image: the file is empty" in errors


def git(images: Path, folder: Path, *argv):
    code = make_captions_by_git.main([str(images), "--model_id", str(folder), "--max_length", "16", *map(str, argv)])
    return code, texts(images, ".caption")


def test_git_in_batches_and_alone(images, git_folder):
    code, alone = git(images, git_folder)
    assert code == 0
    assert len(alone) == 5
    assert len(set(alone.values())) > 1
    assert git(images, git_folder, "--batch_size", 4) == (0, alone)
    lengths = [len(text.split()) for text in git(images, git_folder, "--max_length", 5)[1].values()]
    assert max(lengths) <= 5


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["input"])
def test_phrases_about_visible_text_are_removed(case):
    assert without_visible_text(case["input"]) == case["output"]


def test_removing_words_is_an_option(images, git_folder, monkeypatch):
    texts_seen = "a dog with the words hello on it"
    monkeypatch.setattr("transformers.GitProcessor.batch_decode", lambda self, tokens, **_: [texts_seen] * len(tokens))
    assert set(git(images, git_folder)[1].values()) == {f"{texts_seen}\n".encode()}
    assert set(git(images, git_folder, "--remove_words")[1].values()) == {b"a dog\n"}


def test_git_models_that_cannot_be_used(images, tmp_path):
    (tmp_path / "config.json").write_text("{")
    assert "cannot read the GIT model" in mistake(make_captions_by_git.main, images, "--model_id", tmp_path)
