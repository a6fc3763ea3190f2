"""The tagger end to end, with tiny networks."""

import json
import signal
import time
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from PIL import Image

from finetune import image_work, tag_output
from finetune.tag_images_by_wd14_tagger import main
from library.data.metadata import read_metadata
from tests.finetune.runs import ROOT, TORCHRUN, mistake, start, texts
from tests.finetune.tiny_models import TAGS, write_images, write_mapped_tagger, write_tagger

NAMES = [name for name, _ in TAGS]


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    write_images(folder, 7)
    return folder


@pytest.fixture
def tag(tagger_dir, images):
    """Runs the tagger over the images; returns the exit code and the text files."""

    def run(*argv, folder=images):
        code = main([str(folder), "--model_dir", str(tagger_dir), *map(str, argv)])
        return code, {name: text.decode() for name, text in texts(folder, ".txt").items()}

    return run


def expected(images: Path, model: Path, threshold: float = 0.35) -> dict[str, str]:
    """The tags of each image by the network alone, asked without the tool."""
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    found = {}
    for path in sorted(images.glob("*.png")):
        # 40 x 30 pixels: five white lines above and below, then enlarged.
        square = Image.new("RGB", (40, 40), "white")
        square.paste(Image.open(path), (0, 5))
        pixels = np.asarray(square.resize((448, 448), Image.Resampling.LANCZOS), np.float32)[None, ..., ::-1]
        values = session.run(None, {"input_1:0": pixels})[0][0]
        chosen = [name for name, value in zip(NAMES[4:], values[4:], strict=True) if value >= threshold]
        found[path.with_suffix(".txt").name] = ", ".join(chosen) + "\n"
    return found


def test_each_image_has_the_tags_of_the_network(tag, images, tagger_dir):
    code, found = tag()
    assert code == 0
    assert found == expected(images, tagger_dir / "model.onnx")
    assert len(set(found.values())) > 1
    assert tag("--thresh", 0.7)[1] == expected(images, tagger_dir / "model.onnx", 0.7)


def test_neither_batches_nor_threads_change_tags(tag):
    _, alone = tag()
    assert tag("--batch_size", 3)[1] == alone
    assert tag("--batch_size", 50, "--max_data_loader_n_workers", 4)[1] == alone
    assert tag("--onnx", "--max_data_loader_n_workers", 0)[1] == alone


def test_a_network_of_a_fixed_batch_is_fed_as_it_wants(tag, images, tmp_path, capsys):
    _, alone = tag()
    write_tagger(tmp_path / "fixed", batch=4)
    assert tag("--model_dir", tmp_path / "fixed", "--batch_size", 3)[1] == alone
    assert "takes 4 images at a time: --batch_size 3 is not used" in capsys.readouterr().err


def test_the_other_kind_of_tagger(images, tmp_path):
    tags = [("safe", "Rating"), ("bad", "Quality"), ("good", "Quality"), ("tree", "General"), ("someone", "Artist")]
    folder = write_mapped_tagger(tmp_path / "models" / "a_b_c", tags)
    settings = [str(images), "--repo_id", "a/b/c", "--model_dir", str(tmp_path / "models"), "--thresh", "0"]
    assert main([*settings, "--use_quality_tags", "--use_rating_tags_as_last_tag"]) == 0
    session = onnxruntime.InferenceSession(str(folder / "model_optimized.onnx"), providers=["CPUExecutionProvider"])
    for path in sorted(images.glob("*.png")):
        square = Image.new("RGB", (40, 40), "white")
        square.paste(Image.open(path), (0, 5))
        pixels = np.asarray(square.resize((448, 448), Image.Resampling.LANCZOS), np.float32)[..., ::-1] / 127.5 - 1
        logits = session.run(None, {"input_1:0": pixels.transpose(2, 0, 1)[None]})[0][0]
        quality = "good" if logits[2] > logits[1] else "bad"
        assert path.with_suffix(".txt").read_text() == f"{quality}, tree, someone, safe\n"
    assert main([*settings, "--artist_threshold", "1", "--general_threshold", "0.0"]) == 0
    assert set(texts(images, ".txt").values()) == {b"tree\n"}


def test_wording_and_order(tag, images):
    everything = ("--thresh", 0, "--remove_underscore", "--character_tag_expand", "--use_rating_tags")
    order = ("--character_tags_first", "--always_first_tags", "tree,red sky", "--undesired_tags", "1girl, ^_^")
    _, found = tag(*everything, *order, "--tag_replacement", "long hair,hair;hatsune miku,miku")
    rating, rest = found["000.txt"].strip().split(", ")[2], found["000.txt"].strip().split(", ")
    assert rating in NAMES[:4]
    assert [tag for tag in rest if tag != rating] == ["red sky", "tree", "saber", "fate", "miku", "hair"]
    _, separated = tag("--thresh", 0, "--caption_separator", " | ", "--undesired_tags", "1girl|tree")
    assert separated["000.txt"] == "long_hair | ^_^ | red_sky | hatsune_miku | saber_(fate)\n"


def test_names_that_the_tagger_never_gives_are_told(tag, capsys):
    tag("--undesired_tags", "long hair", "--tag_replacement", "red_sty,x", "--use_quality_tags")
    told = capsys.readouterr().err
    assert "--undesired_tags: this tagger never gives 'long hair'" in told
    assert "long_hair" in told
    assert "--tag_replacement: this tagger never gives 'red_sty'" in told
    assert "this tagger has no quality tags" in told


def test_appended_tags_are_new_ones_behind_the_old(tag, images, capsys):
    (images / "000.txt").write_text("zebra,1girl\n, tree\n", encoding="utf-8")
    _, found = tag("--append_tags", "--thresh", 0)
    assert found["000.txt"] == "zebra, 1girl, tree, long_hair, ^_^, red_sky, hatsune_miku, saber_(fate)\n"
    assert found["001.txt"] == ", ".join(NAMES[4:]) + "\n"
    assert "1 .txt files exist and are added to" in capsys.readouterr().err
    assert tag("--append_tags", "--thresh", 0)[1] == found


def test_old_text_that_is_not_utf8_is_left_alone(images, tagger_dir):
    (images / "000.txt").write_bytes(b"caf\xe9")
    assert "cannot add tags to 000.txt" in mistake(main, images, "--model_dir", tagger_dir, "--append_tags")
    assert (images / "000.txt").read_bytes() == b"caf\xe9"


def test_the_frequency_table(tag, capsys):
    _, found = tag("--frequency_tags")
    lines = capsys.readouterr().out.splitlines()
    table = dict(line.rsplit(": ", 1) for line in lines[lines.index("Tag frequencies:") + 1 :])
    every = [tag for text in found.values() for tag in text.strip().split(", ")]
    assert table == {tag: str(every.count(tag)) for tag in set(every)}
    counts = [int(count) for count in table.values()]
    assert counts == sorted(counts, reverse=True)


def test_debug_shows_tags_by_category(tag, capsys):
    tag("--debug", "--thresh", 0, "--use_rating_tags")
    shown = capsys.readouterr().out
    assert shown.count("  character: hatsune_miku, saber_(fate)") == 7
    assert shown.count("  rating: ") == 7


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_one_metadata_file_in_place_of_text_files(tag, images, tmp_path, suffix):
    _, expected_tags = tag()
    for path in images.glob("*.txt"):
        path.unlink()
    target = tmp_path / f"tags{suffix}"
    assert tag("--output_path", target) == (0, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", target.name]
    if suffix == ".json":
        content = json.loads(target.read_text())
        field = "tags"
    else:
        rows = [json.loads(line) for line in target.read_text().splitlines()]
        content = {row.pop("image_path"): row for row in rows}
        field = "caption"
    assert list(content) == [str(path) for path in sorted(images.glob("*.png"))]
    for name, entry in content.items():
        text = expected_tags[Path(name).with_suffix(".txt").name].strip()
        assert entry == {field: text, "image_size": [40, 30]}
    entries, findings = read_metadata(target)
    assert len(entries) == 7
    assert not findings


def test_an_existing_metadata_file_is_extended_or_replaced_and_said_so(tag, images, tmp_path, capsys):
    target = tmp_path / "tags.json"
    tag("--output_path", target)
    whole = target.read_bytes()
    content = json.loads(whole)
    first, second = list(content)[:2]
    content[first] = {"tags": "mine", "caption": "words", "image_size": [40, 30]}
    del content[second]
    content["other.png"] = {"tags": "far"}
    target.write_text(json.dumps(content))
    capsys.readouterr()
    tag("--output_path", target, "--skip_existing")
    extended = json.loads(target.read_text())
    assert list(extended) == ["other.png", *json.loads(whole)]
    assert extended[first]["tags"] == "mine"
    assert extended[second] == json.loads(whole)[second]
    told = capsys.readouterr().err
    assert "has 7 entries and is extended" in told
    assert "6 of 7 images have an entry already" in told
    tag("--output_path", target, "--append_tags")
    appended = json.loads(target.read_text())
    assert appended[first]["caption"] == "words"
    assert appended[first]["tags"].startswith("mine, ")
    tag("--output_path", target)
    assert "has 8 entries and is replaced" in capsys.readouterr().err
    assert target.read_bytes() == whole


def stop_after(monkeypatch, count):
    """Let the work be stopped, as by Ctrl-C, when ``count`` results are written."""
    original = image_work.ImageWork.run

    def run(self, images, **settings):
        left = iter(range(count))

        def infer(paths, contents):
            if next(left, None) is None:
                raise KeyboardInterrupt
            return self.infer(paths, contents)

        changed = image_work.ImageWork(
            read=self.read, infer=infer, write=self.write, batch_size=self.batch_size, threads=self.threads
        )
        return original(changed, images, **settings)

    monkeypatch.setattr(image_work.ImageWork, "run", run)


@pytest.mark.parametrize("output", [(), ("--output_path", "tags.json"), ("--output_path", "tags.jsonl")])
def test_stopped_and_started_again_the_result_is_the_same(tag, images, tmp_path, monkeypatch, output):
    monkeypatch.chdir(tmp_path)
    _, texts_alone = tag(*output)
    alone = {path.name: path.read_bytes() for path in tmp_path.glob("tags.*")}
    assert bool(alone) == bool(output)
    for count in (0, 1, 3, 6):
        for path in (*images.glob("*.txt"), *tmp_path.glob("tags.*")):
            path.unlink()
        with monkeypatch.context() as patch:
            stop_after(patch, count)
            with pytest.raises(KeyboardInterrupt):
                tag(*output)
        assert len(list(images.glob("*.txt"))) == (0 if output else count)
        assert tag(*output, "--skip_existing") == (0, texts_alone)
        assert {path.name: path.read_bytes() for path in tmp_path.glob("tags.*")} == alone


def test_a_stopped_run_leaves_the_old_metadata_file_and_keeps_its_results(tag, images, tmp_path, monkeypatch):
    target = tmp_path / "tags.json"
    target.write_text('{"old.png": {"tags": "old"}}')
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            tag("--output_path", target)
    assert json.loads(target.read_text()) == {"old.png": {"tags": "old"}}
    assert len(json.loads((tmp_path / "tags.part0.json").read_text())) == 3


def test_results_are_kept_from_time_to_time(tag, images, tmp_path, monkeypatch):
    kept = []
    original = tag_output.write_entries
    monkeypatch.setattr(tag_output, "_KEPT_EVERY", 0.0)
    monkeypatch.setattr(
        tag_output, "write_entries", lambda path, entries: (kept.append(len(entries)), original(path, entries))
    )
    tag("--output_path", tmp_path / "tags.json")
    assert kept == [1, 2, 3, 4, 5, 6, 7, 7]


def test_a_bad_image_is_named_and_the_others_are_done(tag, images, tmp_path, capsys):
    _, expected_tags = tag()
    (images / "003.txt").unlink()
    (images / "003.png").write_bytes(b"\x89PNG")
    (images / "004.jpg").write_bytes(b"")
    code, found = tag("--batch_size", 4)
    assert code == 1
    assert found == {name: text for name, text in expected_tags.items() if name != "003.txt"}
    told = capsys.readouterr().err
    assert "1 images have the name of another one" in told
    assert tag("--output_path", tmp_path / "tags.json")[0] == 1
    told = capsys.readouterr().err
    assert "2 images could not be read" in told
    assert "003.png: cannot read the image" in told
    assert len(json.loads((tmp_path / "tags.json").read_text())) == 6


def test_only_bad_images(tag, tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"no image")
    assert tag(folder=tmp_path / "bad") == (1, {})


def test_mistakes(images, tmp_path, tagger_dir):
    def said(*argv):
        return mistake(main, images, "--model_dir", tagger_dir, *argv)

    (tmp_path / "empty").mkdir()
    assert "no images" in mistake(main, tmp_path / "empty")
    assert "train_data_dir is missing" in mistake(main)
    assert "neither .json nor .jsonl" in said("--output_path", "tags.csv")
    assert "--append_tags adds" in said("--append_tags", "--skip_existing")
    assert "no character but spaces" in said("--caption_separator", " ")
    assert "pairs" in said("--tag_replacement", "a,b,c")
    assert "--thresh must be" in said("--thresh", "1.5")
    (tmp_path / "broken.json").write_text("{")
    assert "broken.json" in said("--output_path", tmp_path / "broken.json", "--skip_existing")
    assert (tmp_path / "broken.json").read_text() == "{"
    (tmp_path / "list.json").write_text("[1]")
    assert "list.json" in said("--output_path", tmp_path / "list.json", "--append_tags")
    (tmp_path / "folder.json").mkdir()
    assert "is a folder" in said("--output_path", tmp_path / "folder.json")


def test_a_file_that_is_no_metadata_is_not_replaced_either(images, tmp_path, tagger_dir):
    (tmp_path / "broken.json").write_text("{")
    mistake(main, images, "--model_dir", tagger_dir, "--output_path", tmp_path / "broken.json")
    assert (tmp_path / "broken.json").read_text() == "{"


def test_taggers_that_cannot_be_used(images, tmp_path):
    def said():
        return mistake(main, images, "--model_dir", folder)

    folder = write_tagger(tmp_path / "model")
    (folder / "selected_tags.csv").write_text("tag_id,name,category\n0,a,0\n")
    assert f"gives {len(TAGS)} values an image, and selected_tags.csv names 1" in said()
    (folder / "model.onnx").write_bytes(b"no network")
    assert "cannot read the tagger" in said()
    (folder / "model.onnx").write_bytes((write_tagger(tmp_path / "other", size=64) / "model.onnx").read_bytes()[:200])
    assert "cannot read the tagger" in said()
    assert texts(images, ".txt") == {}


def test_without_onnxruntime_the_way_to_it_is_told(images, tagger_dir, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None if name == "onnxruntime" else object())
    told = mistake(main, images, "--model_dir", tagger_dir)
    assert "pip install onnxruntime==1.31.1" in told
    assert "pip install onnxruntime-gpu==1.31.1" in told
    assert "onnxruntime==1.31.1" in (ROOT / "requirements-tagger.txt").read_text()


def test_options_come_before_anything_heavy(tmp_path):
    script = "import sys; from finetune import tag_images_by_wd14_tagger, make_captions, make_captions_by_git; " + (
        "heavy = {'torch', 'transformers', 'onnxruntime', 'cv2', 'numpy'} & set(sys.modules); assert not heavy, heavy"
    )
    run = start("-c", script)
    assert run.communicate(timeout=60)[1] == ""


def test_killed_at_any_moment_and_started_again(tag, tagger_dir, tmp_path):
    folder = tmp_path / "many"
    paths = write_images(folder, 40, size=(64, 64))
    _, alone = tag(folder=folder)
    for wanted in (0, 1, 17):
        for path in folder.glob("*.txt"):
            path.unlink()
        script = start(
            "finetune/tag_images_by_wd14_tagger.py", folder, "--model_dir", tagger_dir, "--max_data_loader_n_workers", 0
        )
        while script.poll() is None and len(list(folder.glob("*.txt"))) < wanted:
            pass
        script.kill()
        script.communicate()
        written = {name: text.decode() for name, text in texts(folder, ".txt").items() if not name.startswith(".")}
        assert written.items() <= alone.items()
        for path in folder.glob(".writing-*"):
            path.unlink()
        assert tag("--skip_existing", folder=folder) == (0, alone)
    assert len(alone) == len(paths)


def test_ctrl_c_ends_with_130_and_says_how_far_it_came(tagger_dir, tmp_path):
    folder = tmp_path / "many"
    write_images(folder, 60, size=(64, 64))
    script = start(
        "finetune/tag_images_by_wd14_tagger.py", folder, "--model_dir", tagger_dir, "--max_data_loader_n_workers", 0
    )
    while script.poll() is None and len(list(folder.glob("*.txt"))) < 3:
        time.sleep(0.001)
    script.send_signal(signal.SIGINT)
    _, errors = script.communicate(timeout=60)
    assert script.returncode == 130
    assert "of 60 images" in errors
    assert "Traceback" not in errors
    assert not list(folder.glob(".writing-*"))


@pytest.mark.slow
@pytest.mark.parametrize("output", [(), ("--output_path", "tags.json")])
def test_two_processes_share_the_work(tag, images, tagger_dir, tmp_path, monkeypatch, output):
    monkeypatch.chdir(tmp_path)
    (images / "005.png").write_bytes(b"broken")
    code, alone = tag(*output)
    assert code == 1
    alone_json = (tmp_path / "tags.json").read_bytes() if output else None
    for path in images.glob("*.txt"):
        path.unlink()
    words = (ROOT / "finetune/tag_images_by_wd14_tagger.py", images, "--model_dir", tagger_dir, "--frequency_tags")
    script = start(words[0], *words[1:], *output, cwd=tmp_path, launcher=TORCHRUN)
    shown, errors = script.communicate(timeout=240)
    assert script.returncode == 1
    assert errors.count("1 images could not be read") == 1
    assert shown.count("Tag frequencies:") == 1
    assert {name: text.decode() for name, text in texts(images, ".txt").items()} == alone
    if output:
        assert (tmp_path / "tags.json").read_bytes() == alone_json
        assert list(tmp_path.glob("tags.part*")) == []
