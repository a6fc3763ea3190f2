"""The page and the sheets of ``--debug_dataset``."""

import base64
import io
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from library.data import preview
from library.data.preview import open_in_browser, write_preview
from library.data.setup import prepare_data
from library.data.spec import AugmentRules, BucketRules, CaptionRules
from library.models.caption_tokens import CaptionTokens
from library.randomness import python_random
from tests.library.data.small_set import make_spec, make_subset, write_images


class Page(HTMLParser):
    """The texts, sources and tags of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.sources, self.addresses = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        values = dict(attrs)
        if tag == "img":
            self.sources.append(values["src"])
        self.addresses += [values[name] for name in ("src", "href") if name in values]

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", "".join(self.texts))


def make(tmp_path, *, captions=None, augment=None, folder="images", tokens=None, steps=100):
    records = write_images(tmp_path / folder, sizes=[(64, 64)] * 5)
    if captions is not None:
        records = [replace(record, caption=caption) for record, caption in zip(records, captions, strict=False)]
    data = prepare_data(make_spec(make_subset(tmp_path / folder, augment=augment or AugmentRules())), records)
    plan = data.plan(7, accumulation=1, world=1)
    written = write_preview(
        tmp_path / "out", data, plan, tokens_of=tokens or CaptionTokens(limit=75), seed=7, total_steps=steps
    )
    return written, Page(written.page.read_text(encoding="utf-8")), data


def test_every_batch_of_two_epochs_is_shown(tmp_path):
    written, page, data = make(tmp_path)
    assert page.tags.count("section") == 6
    assert len(page.sources) == 10
    assert "epoch 2, step 6" in page.text
    assert page.text.count("bucket 64x64, 2 to train on") == 4
    assert page.text.count("bucket 64x64, 1 to train on") == 2
    assert page.text.count("64x64, not resized nothing cut off once in an epoch") == 10
    assert [path.name for path in written.sheets] == ["epoch-01-sheet-001.png", "epoch-02-sheet-001.png"]
    for path in written.sheets:
        Image.open(path).verify()


def test_a_short_run_shows_only_what_it_trains(tmp_path):
    _, page, _ = make(tmp_path, steps=2)
    assert page.tags.count("section") == 2


def test_the_pictures_are_what_the_model_gets(tmp_path):
    """All images mirrored or not as keyed: compared with the files themselves."""
    _, page, data = make(tmp_path, augment=AugmentRules(flip_aug=True), steps=3)
    plan = data.plan(7, accumulation=1, world=1)
    examples = [example for step in plan.epoch(1) for batch in step.micro_batches for example in batch.examples]
    flips = [python_random(7, "flip", 1, example).random() < 0.5 for example in examples]
    assert 0 < sum(flips) < 5
    for example, flipped, source in zip(examples, flips, page.sources, strict=True):
        shown = Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))).convert("RGB")
        wanted = Image.open(data.records[example].path).convert("RGB")
        wanted = wanted.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flipped else wanted
        compressed = io.BytesIO()
        wanted.save(compressed, format="JPEG", quality=85)
        assert np.array_equal(np.asarray(shown), np.asarray(Image.open(compressed).convert("RGB")))
    assert page.text.count("mirrored") == sum(flips)


def test_a_hostile_caption_or_name_stays_text(tmp_path):
    hostile = '<script>alert("x")</script>'
    _, page, _ = make(tmp_path, captions=[hostile] * 5, folder='a"><img src=x onerror=alert(1)>')
    assert page.tags.count("script") == 1
    assert not {"object", "iframe", "svg", "b"} & set(page.tags)
    assert len(page.sources) == 10
    assert "alert" in page.text
    assert "script" in page.text
    assert "onerror=alert(1)" in page.text


def test_the_page_needs_nothing_from_elsewhere(tmp_path):
    written, page, _ = make(tmp_path)
    assert "link" not in page.tags
    assert all(address.startswith("data:") for address in page.addresses)
    assert "http" not in written.page.read_text(encoding="utf-8").replace("http-equiv", "")


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_the_keys_of_the_page(tmp_path):
    """The page's script, with just so much of a browser around it."""
    written, _, _ = make(tmp_path)
    (script,) = re.findall(r"<script>(.*)</script>", written.page.read_text(encoding="utf-8"), re.DOTALL)
    browser = """
      const sections = [1, 1, 1, 2, 2, 2].map((epoch) => ({dataset: {epoch}, classList: new Set()}));
      const body = {classList: new Set()};
      for (const {classList} of [...sections, body]) classList.remove = classList.delete;
      const elements = {}, shown = [];
      let press;
      const document = {querySelectorAll: () => sections, body, getElementById: (id) => elements[id] ??= {},
        addEventListener: (name, handler) => press = handler};
      const window = {scrollTo() {}};
    """
    presses = """
      for (const key of ["s", "E", "e", "Escape", "S", "ArrowLeft", "ArrowRight", "s"]) {
        press({key});
        shown.push(body.classList.has("single") ? sections.findIndex((one) => one.classList.has("current")) : "all");
      }
      console.log(JSON.stringify(shown));
    """
    done = subprocess.run(["node", "-e", browser + script + presses], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [1, 3, 3, "all", 4, 3, 4, 5]


def test_tokens_behind_the_limit_are_marked(tmp_path):
    written, page, _ = make(tmp_path, captions=["red green blue"] * 5, tokens=CaptionTokens(limit=2))
    assert page.text.count("cut off here") == 10
    assert re.search(r"cut off here; never trained on:\s*blue", page.text)
    assert "2 of 2 tokens, 1 too many" in page.text


def test_weights_are_shown(tmp_path):
    _, page, _ = make(tmp_path, captions=["(red:1.25) dog"] * 5, tokens=CaptionTokens(limit=75, weighted=True))
    assert "red1.25 dog" in page.text


def show(tmp_path, records, spec):
    """The page of one step with all of ``records``."""
    data = prepare_data(spec, records)
    plan = data.plan(7, accumulation=1, world=1)
    tokens = CaptionTokens(limit=75)
    written = write_preview(tmp_path / "out", data, plan, tokens_of=tokens, seed=7, total_steps=1)
    return written, Page(written.page.read_text(encoding="utf-8"))


def test_what_is_cut_off_is_shown(tmp_path):
    """128x64 covers the bucket 64x64 as it is: a quarter goes on each side."""
    records = write_images(tmp_path / "images", sizes=[(128, 64)])
    subset = make_subset(tmp_path / "images")
    spec = make_spec(subset, buckets=BucketRules(enable_bucket=True, min_bucket_reso=64, max_bucket_reso=64))
    written, page = show(tmp_path, records, spec)
    assert "128x64, not resized cropped at 32, 0: 50.0% cut off" in page.text
    assert len(page.sources) == 2
    whole = Image.open(io.BytesIO(base64.b64decode(page.sources[1].split(",")[1])))
    assert whole.size == (128, 64)
    assert "left: 25.0%; top: 0.0%; width: 50.0%; height: 100.0%" in written.page.read_text(encoding="utf-8")


def test_a_caption_that_was_changed_is_shown_as_written_too(tmp_path):
    records = write_images(tmp_path / "images", sizes=[(64, 64)])
    records = [replace(records[0], caption="one, two")]
    changed = replace(make_subset(tmp_path / "images"), captions=CaptionRules(caption_prefix="a photo of"))
    _, page = show(tmp_path, records, make_spec(changed))
    assert "the caption as writtenone, two" in page.text
    _, page = show(tmp_path, records, make_spec(make_subset(tmp_path / "images")))
    assert "as written" not in page.text


def test_a_caption_that_is_left_out_is_not_called_missing(tmp_path):
    records = write_images(tmp_path / "images", sizes=[(64, 64)])
    dropped = replace(make_subset(tmp_path / "images"), captions=CaptionRules(caption_dropout_rate=1.0))
    _, page = show(tmp_path, [replace(records[0], caption="one, two")], make_spec(dropped))
    assert "the caption is left out this time" in page.text
    _, page = show(tmp_path, [replace(records[0], caption="")], make_spec(dropped))
    assert "no caption" in page.text


def test_regularisation_is_marked(tmp_path):
    records = write_images(tmp_path / "images", sizes=[(64, 64)] * 2)
    records = [records[0], replace(records[1], is_reg=True)]
    _, page = show(tmp_path, records, make_spec(make_subset(tmp_path / "images")))
    assert "1 to train on, 1 of regularisation" in page.text
    assert page.text.count("regularisation") == 2


def test_a_large_epoch_is_cut_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(preview, "_MOST_PICTURES", 4)
    _, page, _ = make(tmp_path)
    assert page.tags.count("section") in (4, 5)
    assert "Epoch 1 has 3 batches; the first 2 are shown." in page.text


def test_sheets_of_an_earlier_time_go(tmp_path):
    (tmp_path / "out").mkdir()
    old = tmp_path / "out" / "epoch-09-sheet-009.png"
    old.touch()
    make(tmp_path)
    assert not old.exists()


@pytest.mark.parametrize(
    ("display", "terminal", "opened"), [("", True, False), (":0", False, False), (":0", True, True)]
)
def test_a_browser_opens_only_before_a_person(display, terminal, opened, tmp_path, monkeypatch):
    pages = []
    monkeypatch.setattr(preview.webbrowser, "open", lambda page: pages.append(page) or True)
    monkeypatch.setattr(preview.sys, "platform", "linux")
    monkeypatch.setattr(preview.sys.stdin, "isatty", lambda: terminal, raising=False)
    monkeypatch.setenv("DISPLAY", display)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    assert open_in_browser(tmp_path / "index.html") == opened
    assert len(pages) == opened


def test_what_a_mask_leaves_out_is_darkened(tmp_path):
    records = write_images(tmp_path / "images", sizes=[(64, 64)])
    Image.new("L", (64, 64)).save(tmp_path / "mask.png")
    white = Image.new("RGB", (64, 64), "white")
    white.save(records[0].path)
    half = Image.new("L", (64, 64))
    half.paste(255, (0, 0, 32, 64))
    half.save(tmp_path / "mask.png")
    records = [replace(records[0], mask=tmp_path / "mask.png")]
    _, page = show(tmp_path, records, make_spec(make_subset(tmp_path / "images")))
    shown = Image.open(io.BytesIO(base64.b64decode(page.sources[0].split(",")[1]))).convert("L")
    assert shown.getpixel((8, 32)) > 250
    assert shown.getpixel((56, 32)) < 80
    assert "the mask keeps 50%" in page.text
