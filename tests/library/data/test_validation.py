"""Which images are held out, and how validation reads them."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from library.data.options import ValidationOptions
from library.data.records import ImageRecord
from library.data.spec import AugmentRules, CaptionRules, DataSpec
from library.data.validation import hold_out, number_held_out
from tests.library.data.reading import errors, read, write
from tests.library.data.small_set import make_spec, make_subset

GOLDEN = Path(__file__).parents[2] / "golden"
SPLITS = json.loads((GOLDEN / "validation_split.json").read_text())["cases"]
EMPTY_IN_REFERENCE = {(3, 0.1)}
"""The reference rounds to no image at all, and so validates nothing without a word."""


def records(names, *, folder=Path("images"), dataset=0, subset=0, is_reg=False, repeats=1):
    return [
        ImageRecord(
            folder=folder,
            name=name,
            size=(64, 64),
            caption=f"caption of {name}",
            has_caption_file=True,
            dataset=dataset,
            subset=subset,
            is_reg=is_reg,
            repeats=repeats,
        )
        for name in names
    ]


def images(count):
    return records([f"{number:03d}.png" for number in range(count)])


def held_names(split):
    return sorted(record.path.name for record in split.held_out.records) if split.held_out else []


SPEC = make_spec(make_subset(Path("images")))


@pytest.mark.parametrize("case", SPLITS, ids=lambda case: f"{case['n']}x{case['split']}")
def test_as_many_as_in_the_reference_and_never_in_both(case):
    options = ValidationOptions(validation_split=case["split"], validation_seed=case["seed"])
    split = hold_out(SPEC, images(case["n"]), options)
    held = held_names(split)
    kept = {record.path.name for record in split.training}
    assert len(held) == (1 if (case["n"], case["split"]) in EMPTY_IN_REFERENCE else len(case["val"]))
    assert not kept & set(held)
    # Where the reference's two sets overlap, ours do not.
    assert len(kept) == case["n"] - len(held)
    assert len(kept) == len(case["train"]) - len(case["overlap"]) - ((case["n"], case["split"]) in EMPTY_IN_REFERENCE)


@settings(max_examples=30, deadline=None)
@given(
    names=st.lists(st.from_regex(r"[abcxyz]{1,4}(/[abc]{1,3})?", fullmatch=True), min_size=1, max_size=12, unique=True),
    part=st.floats(0, 1),
    seed=st.integers(0, 2**31),
    regularisation=st.integers(0, 3),
)
def test_a_split_is_a_partition_that_files_alone_decide(names, part, seed, regularisation):
    spec = make_spec(make_subset(Path("images")), make_subset(Path("reg"), is_reg=True, num_repeats=2))
    options = ValidationOptions(validation_split=part, validation_seed=seed)
    given_records = records(sorted(names)) + records(
        [f"r{number}" for number in range(regularisation)], folder=Path("reg"), subset=1, is_reg=True, repeats=2
    )
    split = hold_out(spec, given_records, options)
    held = [] if split.held_out is None else list(split.held_out.records)
    trained = [record for record in split.training if not record.is_reg]
    assert Counter(record.path for record in [*held, *trained]) == Counter(
        record.path for record in given_records if not record.is_reg
    )
    assert len(held) == number_held_out(len(names), part)
    assert not any(record.is_reg for record in held)
    order = {record.path: position for position, record in enumerate(given_records)}
    assert [order[record.path] for record in held] == sorted(order[record.path] for record in held)
    # The same whatever the order, and the other images' training data apart.
    again = hold_out(spec, [replace(record, repeats=3) for record in reversed(given_records)], options)
    assert held_names(again) == held_names(split)


def test_exactly_the_nearest_number_but_one_of_several():
    assert [number_held_out(n, 0.1) for n in (0, 1, 2, 4, 14, 16, 100)] == [0, 0, 1, 1, 1, 2, 10]
    assert [number_held_out(n, 1.0) for n in (0, 1, 7)] == [0, 1, 7]
    assert number_held_out(50, 0.0) == 0


def test_another_image_leaves_the_choice_of_the_others_alone():
    options = ValidationOptions(validation_split=0.5)
    before = hold_out(SPEC, images(20), options)
    after = hold_out(SPEC, images(22), options)
    assert len(set(held_names(before)) - set(held_names(after))) <= 1
    assert len(held_names(after)) == 11


def test_the_seed_chooses():
    chosen = {
        tuple(held_names(hold_out(SPEC, images(20), ValidationOptions(validation_split=0.3, validation_seed=seed))))
        for seed in (None, 0, 1, 2)
    }
    assert len(chosen) == 3


def test_validation_reads_an_image_the_same_way_every_time():
    rules = CaptionRules(
        shuffle_caption=True,
        caption_dropout_rate=1.0,
        caption_dropout_every_n_epochs=1,
        caption_tag_dropout_rate=0.9,
        token_warmup_step=100,
        keep_tokens_separator="|||",
        caption_prefix="first",
        enable_wildcard=True,
    )
    augment = AugmentRules(flip_aug=True, color_aug=True, random_crop=True, face_crop_aug_range=(1.0, 2.0))
    spec = make_spec(make_subset(Path("images"), captions=rules, augment=augment, num_repeats=5))
    given_records = [replace(record, caption="a ||| b, {c|d}, e", repeats=5) for record in images(8)]
    held_out = hold_out(spec, given_records, ValidationOptions(validation_split=0.5)).held_out
    (subset,) = held_out.spec.datasets[0].subsets
    assert (subset.captions, subset.augment) == (CaptionRules(), AugmentRules())
    captions = {record.caption for record in held_out.records}
    assert captions <= {"first a, b, c, e", "first a, b, d, e"}
    assert {record.repeats for record in held_out.records} == {1}
    again = hold_out(spec, given_records, ValidationOptions(validation_split=0.5)).held_out
    assert again == held_out


def test_regularisation_images_are_balanced_against_what_is_left():
    spec = make_spec(make_subset(Path("images")), make_subset(Path("reg"), is_reg=True))
    given_records = images(4) + records(
        [f"r{number}" for number in range(4)], folder=Path("reg"), subset=1, is_reg=True
    )
    split = hold_out(spec, given_records, ValidationOptions(validation_split=0.5))
    assert sum(record.repeats for record in split.training if record.is_reg) == 2
    assert [record.path.name for record in split.training if record.is_reg] == ["r0", "r1"]


def test_a_data_set_of_its_own_is_held_out_whole():
    first = make_spec(make_subset(Path("images"))).datasets[0]
    second = replace(make_spec(make_subset(Path("held"))).datasets[0], validation_split=1.0, validation_seed=5)
    spec = DataSpec(datasets=(first, second), where="a.toml")
    split = hold_out(spec, images(3) + records(["x.png"], folder=Path("held"), dataset=1), ValidationOptions())
    assert not split.findings
    assert held_names(split) == ["x.png"]
    assert [record.dataset for record in split.training] == [0, 0, 0]
    assert split.held_out.seed(split.held_out.records[0]) == 5


def test_a_file_that_is_held_out_is_trained_on_in_no_data_set():
    first, second = (make_spec(make_subset(Path("images"))).datasets[0] for _ in range(2))
    spec = DataSpec(
        datasets=(replace(first, validation_split=0.5), replace(second, validation_split=0.0)), where="a.toml"
    )
    given_records = images(4) + [replace(record, dataset=1) for record in images(4)]
    split = hold_out(spec, given_records, ValidationOptions())
    held = set(held_names(split))
    assert len(held) == 2
    assert not held & {record.path.name for record in split.training}
    (finding,) = split.findings
    assert finding.severity == "warning"
    assert "2 images are not trained on" in finding.what


def test_a_split_that_leaves_nothing_to_train_on_is_refused():
    split = hold_out(SPEC, images(3), ValidationOptions(validation_split=1.0))
    (finding,) = split.findings
    assert finding.severity == "error"
    assert "leaves no image to train on" in finding.what


def test_a_split_that_holds_nothing_out_is_refused():
    (finding,) = hold_out(SPEC, images(1), ValidationOptions(validation_split=0.5)).findings
    assert finding.severity == "error"
    assert "holds out no image" in finding.what


def test_settings_without_a_split_are_told():
    options = ValidationOptions(validate_every_n_steps=5, max_validation_steps=2)
    split = hold_out(SPEC, images(3), options)
    assert len(split.training) == 3
    (finding,) = split.findings
    assert finding.severity == "warning"
    assert "--validate_every_n_steps, --max_validation_steps" in finding.what
    seeded = replace(SPEC, datasets=(replace(SPEC.datasets[0], validation_seed=3),))
    (finding,) = hold_out(seeded, images(3), ValidationOptions()).findings
    assert "validation_seed in a.toml" in finding.what


def test_keys_of_the_dataset_file_win_over_the_options(tmp_path):
    text = """
[general]
validation_split = 0.25
[[datasets]]
validation_seed = 3
[[datasets.subsets]]
image_dir = 'a'
[[datasets]]
validation_split = 0.0
[[datasets.subsets]]
image_dir = 'b'
"""
    spec, findings = read(write(tmp_path, text))
    assert not errors(findings)
    assert [dataset.validation_split for dataset in spec.datasets] == [0.25, 0.0]
    assert [dataset.validation_seed for dataset in spec.datasets] == [3, None]
    given_records = images(8) + [replace(record, dataset=1, folder=Path("b")) for record in images(8)]
    split = hold_out(spec, given_records, ValidationOptions(validation_split=0.9, validation_seed=9))
    assert [record.dataset for record in split.held_out.records] == [0, 0]
    assert [dataset.validation_seed for dataset in split.held_out.spec.datasets] == [3, 9]


def test_a_split_above_one_is_refused(tmp_path):
    text = "[[datasets]]\nvalidation_split = 2\n[[datasets.subsets]]\nimage_dir = 'a'\n"
    (finding,) = errors(read(write(tmp_path, text))[1])
    assert "validation_split must be a number from 0 to 1" in finding.what
