"""Dataset files and named folders: the schema, fallbacks, and what is said about mistakes."""

import json
import sys
from pathlib import Path

import pytest

from library.data.config import bucket_bounds, load_spec, read_spec
from library.data.config_file import read_dataset_file
from library.data.lint import lint
from library.data.options import CacheOptions, CaptionOptions, ImageOptions, SourceOptions
from library.data.schema import KEYS
from library.data.support import TEXTUAL_INVERSION
from library.errors import UserError
from tests.library.data.reading import GOLDEN, errors, golden, make_images, read, write

EXAMPLES = sorted((GOLDEN / "dataset_examples").glob("*.toml"))


# --- the schema against the reference's validator ---

VALIDITY = golden("dataset_config_validity")["table"]
SCOPED_ELSEWHERE = {
    # Known here everywhere, and refused with "this method needs every caption".
    ("train_db", "metadata_file"),
    ("train_db", "conditioning_data_dir"),
    ("train_network", "conditioning_data_dir"),
    ("train_textual_inversion", "conditioning_data_dir"),
}


@pytest.mark.parametrize("script", ["train_db", "train_network", "train_textual_inversion"])
def test_every_key_is_accepted_where_the_reference_accepts_it(script):
    for name, scopes in VALIDITY[script]["dreambooth"].items():
        ours = KEYS[name].scopes if name in KEYS else ()
        if script == "train_textual_inversion" and "dropout" in name:
            ours = ()
        if (script, name) not in SCOPED_ELSEWHERE:
            assert list(ours) == scopes, name


def test_the_schema_has_no_other_keys():
    known = {name for name, scopes in VALIDITY["train_network --masked_loss"]["dreambooth"].items() if scopes}
    assert set(KEYS) == known


SCOPE_TEXTS = {
    "general": "[general]\n{}\n[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'a'\n",
    "dataset": "[[datasets]]\n{}\n[[datasets.subsets]]\nimage_dir = 'a'\n",
    "subset": "[[datasets]]\n[[datasets.subsets]]\n{}\n",
}


@pytest.mark.parametrize("scope", SCOPE_TEXTS)
def test_a_key_is_refused_exactly_where_it_does_not_belong(tmp_path, scope):
    for key in KEYS.values():
        line = f"{key.name} = {key.kind.example}"
        if scope == "subset" and key.name != "image_dir":
            line += "\nimage_dir = 'a'"
        _, findings = read(write(tmp_path, SCOPE_TEXTS[scope].format(line)))
        misplaced = [finding for finding in findings if "does not belong" in finding.what]
        assert bool(misplaced) == (scope not in key.scopes), key.name


def test_caption_dropout_is_refused_where_the_method_needs_captions(tmp_path):
    text = "[general]\ncaption_dropout_rate = 0.1\n[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'a'\n"
    path = write(tmp_path, text)
    assert not errors(read(path)[1])
    (finding,) = errors(read(path, support=TEXTUAL_INVERSION)[1])
    assert "caption_dropout_rate" in finding.what
    assert finding.where.endswith("data.toml:2")


LENIENT = {
    # Written without need for another type: taken as what it plainly means.
    ("resolution", "'512'"),
    ("resolution", "512.0"),
    ("network_multiplier", "1"),
    ("face_crop_aug_range", "[2, 4]"),
}
STRICT = {
    # Accepted by the reference, and then silently without effect or a crash.
    ("num_repeats", "true"),
    ("num_repeats", "0"),
    ("batch_size", "0"),
    ("keep_tokens", "-1"),
}
UNCHANGED_DEFAULT = {("validation_split", "0")}


def toml_value(value):
    if isinstance(value, str):
        return f"'{value}'"
    return json.dumps(value)


@pytest.mark.parametrize(
    "case",
    [case for case in golden("dataset_config_values")["cases"] if "key" in case],
    ids=lambda case: f"{case['key']}={case['value']}",
)
def test_values_are_judged_as_by_the_reference_but_for_listed_differences(tmp_path, case):
    key, written = case["key"], toml_value(case["value"])
    scope = KEYS[key].scopes[0]
    _, findings = read(write(tmp_path, SCOPE_TEXTS[scope].format(f"{key} = {written}")))
    accepted = not errors(findings)
    if (key, written) in LENIENT | UNCHANGED_DEFAULT:
        assert accepted
        assert not case["accepted"]
    elif (key, written) in STRICT:
        assert not accepted
        assert case["accepted"]
    else:
        assert accepted == case["accepted"]


ACCEPTED_BUT_EMPTY = ({}, {"datasets": []}, {"datasets": [{}]}, {"datasets": [{"subsets": []}]})
"""The reference's validator takes these, and the run then ends with "No data found"."""

TWO_STYLES = {"datasets": [{"subsets": [{"image_dir": "a"}]}, {"subsets": [{"metadata_file": "b"}]}]}


@pytest.mark.parametrize(
    "case",
    [case for case in golden("dataset_config_values")["cases"] if "config" in case],
    ids=lambda c: str(c["config"]),
)
def test_structures_are_judged_as_by_the_reference(tmp_path, case):
    path = write(tmp_path, json.dumps(case["config"]), "data.json")
    found = errors(read(path)[1])
    if case["config"] == TWO_STYLES:
        assert case["accepted"]
        assert not found
        return
    assert found, "every other case is wrong or holds no images"
    if case["accepted"]:
        assert case["config"] in ACCEPTED_BUT_EMPTY
        assert "no data set" in found[0].what or "no subsets" in found[0].what


# --- fallbacks ---


def options_of(argv):
    """The option groups of a golden command line."""
    image, captions, source = {}, {}, {}
    flags = {"--color_aug": "color_aug", "--enable_bucket": "enable_bucket"}
    words = iter(argv)
    for word in words:
        if word in flags:
            image[flags[word]] = True
            continue
        value = next(words)
        if word == "--resolution":
            sides = [int(side) for side in value.split(",")]
            image["resolution"] = (sides[0], sides[-1])
        elif word == "--train_batch_size":
            image["train_batch_size"] = int(value)
        elif word == "--dataset_repeats":
            source["dataset_repeats"] = int(value)
        else:
            captions[word[2:]] = int(value) if word == "--keep_tokens" else value
    return source, ImageOptions(**image), CaptionOptions(**captions)


def flat(spec):
    """A dataset or subset spec as one dict, under the reference's names."""
    values = {}
    for name in spec.__slots__:
        value = getattr(spec, name)
        if hasattr(value, "__slots__") and not isinstance(value, Path):
            values |= flat(value)
        else:
            values[name] = value
    return values


NO_TEXT = {"secondary_separator", "caption_prefix", "caption_suffix", "custom_attributes"}
"""Empty here where the reference has None."""

NOT_CARRIED = {
    "debug_dataset",
    "validation_seed",
    "validation_split",
    "prior_loss_weight",
}


def assert_same(ours, theirs, *, skip=frozenset()):
    for name, value in theirs.items():
        if name in NOT_CARRIED | skip:
            continue
        mine = ours[name]
        if name in ("image_dir", "metadata_file"):
            mine = str(mine)
        elif name in NO_TEXT:
            mine = dict(mine) or None if name == "custom_attributes" else mine or None
        elif isinstance(mine, tuple):
            mine = list(mine)
        assert mine == value, name


FALLBACK = golden("dataset_config_fallback")["cases"]


@pytest.mark.parametrize("number", range(len(FALLBACK)))
def test_values_fall_back_as_in_the_reference(tmp_path, number):
    case = FALLBACK[number]
    source, image, captions = options_of(case["argv"])
    path = write(tmp_path, json.dumps(case["config"]), "data.json")
    spec, findings = read_spec(SourceOptions(dataset_config=path, **source), image, captions, CacheOptions())
    problems = [finding.what for finding in errors(findings)]
    # Differences: a missing resolution and a data set without images are errors here.
    expected = {0: [], 1: [], 2: ["no training resolution"], 3: ["the data set has no subsets", "no tr"]}
    assert len(problems) == len(expected[number])
    assert all(any(what.startswith(start) for what in problems) for start in expected[number])
    for mine, theirs in zip(spec.datasets, case["result"], strict=True):
        skip = {"resize_interpolation"}
        if image.resolution is None:
            skip |= {"resolution", "enable_bucket"}
        assert_same(flat(mine), theirs["dataset"], skip=skip)
        for subset, expected_subset in zip(mine.subsets, theirs["subsets"], strict=True):
            assert_same(flat(subset), expected_subset)


# --- the documented examples ---


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_documented_examples_are_read(path):
    spec, findings = read(path)
    assert not findings
    if path.stem.startswith("4"):
        (dataset,) = spec.datasets
        assert dataset.buckets.enable_bucket
        assert [subset.is_reg for subset in dataset.subsets] == [False, True]
        assert [subset.num_repeats for subset in dataset.subsets] == [10, 1]
    if path.stem.startswith("5"):
        assert [subset.captions.keep_tokens for subset in spec.datasets[0].subsets] == [2, 3, 2]
        assert spec.datasets[1].resolution == (768, 512)
        # A Windows path shows its last part only, on every system.
        assert [subset.name for subset in spec.datasets[0].subsets] == ["anna", "rex", "people"]
        assert [subset.name for subset in spec.datasets[1].subsets] == ["meta_lat.json"]
        assert spec.datasets[1].subsets[0].captions.keep_tokens == 1


# --- mistakes: where and what to do ---

MISTAKES = """\
[general]
enable_buckt = true
num_repeats = 3
train_batch_size = 4

[[datasets]]
resolution = "big"
prior_loss_weight = 0.5

  [[datasets.subsets]]
  image_dir = 'a'
  num_repeats = 0
  caption_dropout_rate = 7.0

  [[datasets.subsets]]
  image_dir = 'b'
  enable_bucket = true
  colour_aug = true
  alpha_mask = 'yes'
"""


def test_all_mistakes_are_told_at_once_with_line_and_remedy(tmp_path):
    path = write(tmp_path, MISTAKES)
    with pytest.raises(UserError) as caught:
        load_spec(
            SourceOptions(dataset_config=path), ImageOptions(resolution=(64, 64)), CaptionOptions(), CacheOptions()
        )
    found = {int(problem.where.rsplit(":", 1)[1]): problem for problem in caught.value.problems}
    assert sorted(found) == [2, 4, 7, 8, 12, 13, 17, 18, 19]
    assert found[2].remedy == "Did you mean enable_bucket?"
    assert "batch_size" in found[4].remedy
    assert '"big"' in found[7].what
    assert "--prior_loss_weight" in found[8].remedy
    assert "num_repeats must be a whole number of at least 1 and at most 1,000,000, not 0" in found[12].what
    assert "from 0 to 1" in found[13].what
    assert found[17].remedy == "Move it to [general] or [[datasets]]."
    assert found[18].remedy == "Did you mean color_aug?"
    assert found[19].what == 'alpha_mask must be true or false, not "yes"'


@pytest.mark.parametrize(
    ("text", "what", "remedy"),
    [
        (
            "resolution = 512\n[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'a'",
            "outside of every section",
            "general",
        ),
        ("[[subsets]]\nimage_dir = 'a'", "outside of a data set", "[[datasets.subsets]]"),
        ("[[dataset]]\nresolution = 512", "unknown section or key: dataset", "Did you mean [[datasets]]?"),
        ("[datasets]\nresolution = 512", "datasets must be a list", "double brackets"),
        ("[[datasets]]\n[datasets.subsets]\nimage_dir = 'a'", "subsets must be a list", "double brackets"),
        ("general = 3\n[[datasets]]\n[[datasets.subsets]]\nimage_dir='a'", "must be a table", "[general]"),
        ("[general]\n[generale]\n[[datasets]]\n[[datasets.subsets]]\nimage_dir='a'", "the same", "general"),
        ("[[datasets]]\n[[datasets.subset]]\nimage_dir = 'a'", "unknown key under [[datasets]]: subset", "subsets"),
        ("[[datasets]]\n[[datasets.subsets]]\nnum_repeats = 2", "has no image_dir", "image_dir ="),
        ("[[datasets]]\n[[datasets.subsets]]\nimage_dir = ''", "image_dir must be", "Write for example"),
    ],
)
def test_a_structural_mistake_is_explained(tmp_path, text, what, remedy):
    found = errors(read(write(tmp_path, text))[1])
    match = [finding for finding in found if what in finding.what]
    assert match, found
    assert remedy in match[0].remedy


@pytest.mark.parametrize(
    ("name", "content", "where", "remedy"),
    [
        ("data.toml", b'[[datasets]]\n[[datasets.subsets]]\nimage_dir = "C:\\hoge"\n', "data.toml", "single quotes"),
        ("data.toml", "[general]\nclass_tokens = 'caf\xe9'".encode("latin-1"), "data.toml", "UTF-8"),
        ("data.json", b'{"datasets": [}', "data.json", "Mend"),
        ("data.json", b"[]", "data.json", "Begin"),
        ("data.yaml", b"a: 1", "--dataset_config", "Rename"),
    ],
)
def test_a_file_that_cannot_be_read_says_why(tmp_path, name, content, where, remedy):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read(path)
    (problem,) = caught.value.problems
    assert problem.where.endswith(where)
    assert remedy in problem.remedy


def test_a_missing_file_names_its_neighbour(tmp_path):
    write(tmp_path, "", "dataset.toml")
    with pytest.raises(UserError) as caught:
        read(tmp_path / "datset.toml")
    assert "dataset.toml" in caught.value.problems[0].remedy


def test_a_byte_order_mark_is_no_mistake(tmp_path):
    path = tmp_path / "data.toml"
    path.write_bytes(b"\xef\xbb\xbf[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'a'\n")
    assert not read(path)[1]


def test_lines_are_right_after_strings_and_in_json(tmp_path):
    text = (
        "[[datasets]]\n  [[datasets.subsets]]\n  image_dir = 'a'\n  caption_prefix = '''\nkeep_tokens = -1\n'''\n"
        "  [[datasets.subsets]]\n  image_dir = 'b'\n  keep_tokens = -1\n[[datasets]]\n  [[datasets.subsets]]\n"
        "  image_dir = 'c'\n  keep_tokens = -2\n"
    )
    places = [finding.where for finding in read(write(tmp_path, text))[1]]
    assert [place.rsplit(":", 1)[1] for place in places] == ["9", "13"]
    first = '{"image_dir": "a: {", "num_repeats": 1}'
    text = f'{{"datasets": [\n {{"subsets": [\n {first},\n {{"image_dir": "b",\n"num_repeats": 0}}]}}]}}'
    (finding,) = read(write(tmp_path, text, "data.json"))[1]
    assert finding.where.endswith("data.json:5")


def test_relative_folders_are_found_here_or_beside_the_file(tmp_path, monkeypatch):
    here, there = tmp_path / "here", tmp_path / "there"
    make_images(here / "both")
    make_images(there / "both")
    make_images(there / "only")
    text = "".join(f"[[datasets.subsets]]\nimage_dir = '{name}'\n" for name in ("both", "only", "none"))
    path = write(there, "[[datasets]]\n" + text)
    monkeypatch.chdir(here)
    spec, _ = read(path)
    assert [subset.image_dir for subset in spec.datasets[0].subsets] == [Path("both"), there / "only", Path("none")]


@pytest.mark.parametrize("near", ["here", "there"])
def test_a_misspelt_relative_folder_is_looked_for_here_and_beside_the_file(tmp_path, monkeypatch, near):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    make_images(tmp_path / near / "pictures")
    path = write(tmp_path / "there", "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'pictuers'\n")
    monkeypatch.chdir(tmp_path / "here")
    spec, _ = read(path)
    (finding,) = [finding for finding in errors(lint(spec, ())) if "pictuers" in finding.what]
    expected = "pictures" if near == "here" else tmp_path / "there" / "pictures"
    assert finding.remedy == f"Did you mean image_dir = '{expected}'?"


def test_the_same_folder_twice_in_a_data_set_is_refused(tmp_path):
    subset = "[[datasets.subsets]]\nimage_dir = '{}'\n"
    twice = "[[datasets]]\n" + subset.format("a") + subset.format("./a")
    (finding,) = read(write(tmp_path, twice))[1]
    assert "twice" in finding.what
    apart = "[[datasets]]\n" + subset.format("a") + "[[datasets]]\n" + subset.format("a")
    assert not read(write(tmp_path, apart))[1]


# --- buckets and resolution ---

BOUNDS = golden("bucket_minmax_adjust")["cases"]


@pytest.mark.parametrize("case", BOUNDS, ids=str)
def test_bucket_bounds_are_adjusted_and_checked_as_golden(tmp_path, case):
    (width, height), low, high, step = case["resolution"], case["min"], case["max"], case["step"]
    text = (
        f"[general]\nenable_bucket = true\nresolution = [{width}, {height}]\nmin_bucket_reso = {low}\n"
        f"max_bucket_reso = {high}\nbucket_reso_steps = {step}\n[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'a'\n"
    )
    spec, findings = read(write(tmp_path, text))
    assert bool(errors(findings)) == bool(case["error"])
    if case["error"]:
        assert "fits no bucket" in errors(findings)[0].what
    else:
        rules = spec.datasets[0].buckets
        assert [rules.min_bucket_reso, rules.max_bucket_reso] == case["result"] == list(bucket_bounds(low, high, step))
        rounded = (low, high) != tuple(case["result"])
        assert any("rounded" in finding.what for finding in findings) == rounded
        assert any("bucket_reso_steps" in finding.where or "finer" in finding.remedy for finding in findings) == bool(
            step % 64
        )


@pytest.mark.parametrize(
    ("lines", "what"),
    [
        ("enable_bucket = true\nbucket_reso_steps = 1", "not a multiple of 8"),
        ("enable_bucket = true\nmin_bucket_reso = 32", "below bucket_reso_steps"),
        ("resolution = [510, 512]", "not multiples of 8"),
    ],
)
def test_sizes_that_cannot_work_are_refused(tmp_path, lines, what):
    text = f"[general]\n{lines}\n[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'a'\n"
    (finding,) = errors(read(write(tmp_path, text))[1])
    assert what in finding.what


def test_bucket_rules_do_not_matter_without_buckets(tmp_path):
    text = "[general]\nmin_bucket_reso = 900\n[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'a'\n"
    assert not read(write(tmp_path, text))[1]


@pytest.mark.parametrize("name", ["color_aug", "random_crop"])
def test_changing_pixels_and_cached_latents_exclude_each_other(tmp_path, name):
    subset = "[[datasets.subsets]]\nimage_dir = "
    text = f"[[datasets]]\n{subset}'plain'\n{subset}'b/changed'\n{name} = true\n"
    path = write(tmp_path, text)
    assert not read(path)[1]
    (finding,) = errors(read(path, cache=True)[1])
    assert name in finding.what
    assert "'changed'" in finding.what


def test_reading_a_dataset_file_imports_nothing_heavy(tmp_path):
    import subprocess

    path = write(tmp_path, "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'a'\n")
    code = (
        "import sys; from pathlib import Path; import library.data.config, library.data.lint;"
        f"library.data.config.read_dataset_file(Path({str(path)!r}), caption_dropout=True);"
        "print([name for name in ('torch', 'cv2', 'diffusers', 'transformers', 'PIL', 'numpy') if name in sys.modules])"
    )
    root = Path(__file__).parents[3]
    shown = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_values_keep_their_place(tmp_path):
    path = write(tmp_path, "[general]\nkeep_tokens = 2\n[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'a'\n")
    file, findings = read_dataset_file(path, caption_dropout=True)
    assert not findings
    assert file.general.places["keep_tokens"] == f"{path}:2"
