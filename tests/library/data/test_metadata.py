"""Fine-tuning sets: metadata files, how their keys are found, and what is said about mistakes."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from library.data.lint import lint
from library.data.metadata import MetadataEntry, caption_text, read_metadata
from library.data.records import scan
from library.data.setup import prepare_data
from library.data.spec import BucketRules, CaptionRules, DatasetSpec, DataSpec, SubsetSpec
from library.data.summary import dataset_metadata, startup_table
from tests.library.data.reading import errors, golden, make_images, read, write

BUCKETS = BucketRules(enable_bucket=True, min_bucket_reso=32, max_bucket_reso=128, bucket_reso_steps=16)


def spec_of(metadata_file, image_dir, *, buckets=BUCKETS, resolution=(64, 64), **changes):
    subset = SubsetSpec(
        image_dir=image_dir,
        name=metadata_file.name,
        where="data.toml:3",
        metadata_file=metadata_file,
        **changes,
    )
    dataset = DatasetSpec(resolution=resolution, batch_size=1, buckets=buckets, subsets=(subset,), where="data.toml:1")
    return DataSpec(datasets=(dataset,), where="data.toml")


def described(tmp_path, content, names=("a.png", "b.jpg"), **changes):
    """Records and findings of a metadata file about images in a folder."""
    folder = tmp_path / "images"
    folder.mkdir(exist_ok=True)
    for name in names:
        Image.new("RGB", (64, 64)).save(folder / name)
    text = content if isinstance(content, str) else json.dumps(content)
    path = write(tmp_path, text.replace("@", folder.as_posix()), "meta.json")
    return scan(spec_of(path, folder, **changes))


# --- against the reference ---

JOINED = {
    "full path caption+tags": "c, t1, t2",
    "multi line caption wildcard + tags": "l1, t\nl2, t",
    "multi line tags": "c, t1, t2",
    "multi line tags wildcard": "c, t1, t2",
}
"""Difference: a space follows the separator, as in all other captions, and no tag is lost at a line end."""

TAGS_WITH_WILDCARDS = "tags only wildcard"


@pytest.mark.parametrize("case", golden("metadata_files")["cases"], ids=lambda case: case["label"])
def test_metadata_is_read_as_golden_but_for_listed_differences(tmp_path, case):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in case["images"]:
        Image.new("RGB", (64, 64)).save(folder / name)
    text = case["metadata"].replace("@", folder.as_posix())
    # Difference: without an image folder, relative keys start at the folder of the metadata file instead of a crash.
    beside = tmp_path if case["image_dir"] else folder
    path = write(beside, text, "meta.jsonl" if "jsonl" in case["label"] else "meta.json")
    rules = CaptionRules(enable_wildcard=case["enable_wildcard"])
    records, findings = scan(spec_of(path, folder, captions=rules))
    if case["label"] == "relative without image_dir":
        assert [record.caption for record in records] == ["c"]
    elif isinstance(case["result"], str):
        (finding,) = errors(findings)
        assert finding.where.endswith("meta.json:1")
    elif not case["result"]:
        # Difference: a set without images is an error.
        assert "names no image" in errors(findings)[0].what
    else:
        (record,), (theirs,) = records, case["result"]
        assert not errors(findings)
        assert list(record.size) == theirs["size"]
        assert record.path.as_posix() == theirs["path"].replace("@", folder.as_posix())
        expected = JOINED.get(case["label"], theirs["caption"])
        # Difference: tags alone work with wildcards, too.
        assert record.caption == ("t1" if case["label"] == TAGS_WITH_WILDCARDS else expected)


@pytest.mark.parametrize(
    ("caption", "tags", "all_lines", "expected"),
    [
        ("a cat", "fur, whiskers", False, "a cat, fur, whiskers"),
        ("", "fur", False, "fur"),
        ("a cat", "", True, "a cat"),
        ("\n one \r\n two ", "t", False, "one, t"),
        ("\n one \r\n two ", "t", True, "one, t\ntwo, t"),
        ("", "", True, ""),
    ],
)
def test_caption_and_tags_are_joined(caption, tags, all_lines, expected):
    assert caption_text(MetadataEntry("a", caption, tags), separator=",", all_lines=all_lines) == expected


def test_another_separator_stands_between_caption_and_tags():
    assert caption_text(MetadataEntry("a", "one", "two"), separator="|", all_lines=False) == "one| two"


# --- keys ---


def test_tags_of_several_lines_are_counted_one_by_one(tmp_path):
    records, _ = described(tmp_path, {"a": {"caption": "c", "tags": "t1\nt2"}, "b": {"tags": "t1"}})
    assert [record.tags for record in records] == ["t1, t2", "t1"]


@pytest.mark.parametrize("key", ["@/a.png", "@/a", "a.png", "a", "../images/a.png", "..\\images\\a", "./a"])
def test_a_key_may_be_a_full_or_relative_path_with_or_without_suffix(tmp_path, key):
    records, findings = described(tmp_path, json.dumps({key: {"caption": "c"}, "b": {"tags": "t"}}))
    assert [(record.path.resolve().name, record.caption) for record in records] == [("a.png", "c"), ("b.jpg", "t")]
    assert not errors(findings)


def test_a_key_may_be_as_the_current_folder_has_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_images(tmp_path / "elsewhere")
    path = write(tmp_path, '{"elsewhere/0.png": {"caption": "c"}}', "meta.json")
    records, findings = scan(spec_of(path, tmp_path / "images"))
    assert records[0].path == Path("elsewhere/0.png")
    assert not findings


def test_a_stem_with_dots_is_no_suffix(tmp_path):
    records, _ = described(tmp_path, {"v1.2": {"caption": "c"}}, names=("v1.2.png",))
    assert records[0].path.name == "v1.2.png"


def test_records_are_in_the_order_of_paths(tmp_path):
    records, _ = described(tmp_path, {"b": {"caption": "2"}, "a": {"caption": "1"}})
    assert [record.caption for record in records] == ["1", "2"]


# --- training sizes ---


def test_sizes_of_the_metadata_decide_the_buckets(tmp_path):
    entries = {"a": {"caption": "1", "train_resolution": [80, 64]}, "b": {"caption": "2", "train_resolution": [64, 64]}}
    records, findings = described(tmp_path, entries, buckets=BucketRules())
    assert not findings
    spec = spec_of(tmp_path / "meta.json", tmp_path / "images", buckets=BucketRules())
    assert not lint(spec, records)
    data = prepare_data(spec, records)
    assert [placement.bucket for placement in data.placements] == [(80, 64), (64, 64)]
    assert data.placements[0].resized == (80, 80)


def test_sizes_are_used_only_where_all_have_one(tmp_path):
    entries = {"a": {"caption": "1", "train_resolution": [80, 64]}, "b": {"caption": "2"}}
    records, findings = described(tmp_path, entries)
    assert [record.bucket for record in records] == [None, None]
    assert "1 of 2 entries have a train_resolution" in findings[0].what


def test_sizes_far_from_the_resolution_and_bucket_no_upscale_are_remarked_on(tmp_path):
    entries = {"a": {"caption": "1", "train_resolution": [128, 128]}}
    records, findings = described(tmp_path, entries, names=("a.png",))
    assert records[0].bucket == (128, 128)
    assert [finding.severity for finding in findings] == ["warning"]
    assert "128x128" in findings[0].what
    no_upscale = BucketRules(enable_bucket=True, bucket_no_upscale=True)
    records, findings = described(tmp_path, entries, names=("a.png",), buckets=no_upscale)
    assert records[0].bucket is None
    assert "bucket_no_upscale" in findings[0].what


def test_the_resolution_may_be_left_to_the_metadata(tmp_path):
    make_images(tmp_path / "images", 2)
    entries = {str(n): {"tags": "t", "train_resolution": size} for n, size in enumerate([[80, 64], [64, 64]])}
    text = "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'images'\nmetadata_file = 'meta.json'\n"
    path = write(tmp_path, text)
    write(tmp_path, json.dumps(entries), "meta.json")
    spec, findings = read(path, resolution=None)
    assert not findings
    assert spec.datasets[0].resolution == (80, 64)
    del entries["0"]["train_resolution"]
    write(tmp_path, json.dumps(entries), "meta.json")
    assert "no training resolution" in only_error(read(path, resolution=None)[1]).what


# --- mistakes ---


def only_error(findings):
    (finding,) = errors(findings)
    return finding


def test_a_missing_metadata_file_names_its_neighbour(tmp_path):
    write(tmp_path, "{}", "meta.json")
    finding = only_error(scan(spec_of(tmp_path / "mata.json", tmp_path))[1])
    assert finding.where == "data.toml:3"
    assert "meta.json" in finding.remedy
    assert "is a folder" in only_error(scan(spec_of(tmp_path, tmp_path))[1]).what


def test_entries_without_an_image_are_counted_and_named(tmp_path):
    entries = {f"gone{number}": {"caption": "c"} for number in range(7)} | {"a": {"caption": "c"}, "b": {"tags": "t"}}
    records, findings = described(tmp_path, entries)
    finding = only_error(findings)
    assert len(records) == 2
    assert finding.what.startswith("7 of 9 entries match no image: 'gone0', 'gone1'")
    assert finding.what.endswith("and 2 more")


def test_keys_of_another_machine_are_recognised(tmp_path):
    finding = only_error(described(tmp_path, {"C:\\pictures\\a.png": {"caption": "c"}, "/old/b": {"tags": "t"}})[1])
    assert "Images of the names of 2 of them are in" in finding.remedy


def test_a_wrong_image_dir_is_named(tmp_path):
    path = write(tmp_path, '{"a": {"caption": "c"}}', "meta.json")
    make_images(tmp_path / "images")
    finding = only_error(scan(spec_of(path, tmp_path / "imags"))[1])
    assert "folder not found" in finding.what
    assert "images" in finding.remedy


@pytest.mark.parametrize(
    ("content", "what", "line"),
    [
        ('{\n"a": {"caption": "c",}\n}', "no JSON", 2),
        ("[]", "no JSON object", 1),
        ("[" * 100_000, "nested too deeply", 1),
        ('{"b": {},\n"a": "c"}', "must be an object ('a')", 2),
        ('{"b": {},\n\n"a": {"caption": 5}}', "caption must be text", 3),
        ('{"a": {"tags": ["t"]}}', "tags must be text", 1),
        ('{"a": {"train_resolution": [500, 512]}}', "multiples of 8", 1),
        ('{"a": {"train_resolution": 512}}', "width and height", 1),
        ('{"a": {"train_resolution": [512.5, 512]}}', "without fractions", 1),
        ('{"a": {"train_resolution": [56, 512]}}', "sides have 64 to 4096 pixels", 1),
        ('{"a": {"train_resolution": [4104, 512]}}', "sides have 64 to 4096 pixels", 1),
        ('{"a": {"train_resolution": [4096, 2048]}}', "at most 4194304 pixels", 1),
        ('{"a\\u0000": {"caption": "c"}}', "no path", 1),
        ('{"a\\ud800/b": {"caption": "c"}}', "no path ('a\\ud800/b')", 1),
        ('{"a": {"caption": "c\\udfff"}}', "caption must be text", 1),
        ('{"a": ' + "1" * 5000 + "}", "too many digits", 1),
    ],
)
def test_a_mistake_in_the_file_is_told_with_its_line(tmp_path, content, what, line):
    path = write(tmp_path, content, "meta.json")
    finding = only_error(read_metadata(path)[1])
    assert what in finding.what
    assert finding.where == f"{path}:{line}"


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
ENTRIES = st.fixed_dictionaries({}, optional={"caption": VALUES, "tags": VALUES, "train_resolution": VALUES})
FILES = st.dictionaries(st.text(max_size=4), ENTRIES | VALUES, max_size=4).map(json.dumps) | st.text(max_size=20)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=FILES, is_lines=st.booleans())
def test_whatever_a_file_holds_is_read_or_explained(tmp_path, text, is_lines):
    path = tmp_path / ("meta.jsonl" if is_lines else "meta.json")
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    records, findings = scan(spec_of(path, tmp_path / "images"))
    assert records == ()
    assert errors(findings)
    for finding in findings:
        str(finding).encode()


def test_mistakes_in_lines_do_not_hide_the_other_lines(tmp_path):
    lines = ['{"image_path": "a", "caption": "c"}', "", "{", '{"caption": "d"}', '{"image_path": "b", "tags": "t"}']
    path = write(tmp_path, "\n".join(lines), "meta.jsonl")
    entries, findings = read_metadata(path)
    assert [entry.key for entry in entries] == ["a", "b"]
    assert [finding.where for finding in findings] == [f"{path}:3", f"{path}:4"]


def test_many_mistakes_are_counted(tmp_path):
    path = write(tmp_path, json.dumps({str(number): number for number in range(9)}), "meta.json")
    findings = read_metadata(path)[1]
    assert len(findings) == 6
    assert findings[-1].what.startswith("4 more")


def test_another_encoding_is_told(tmp_path):
    path = tmp_path / "meta.json"
    path.write_bytes('{"a": {"caption": "café"}}'.encode("latin-1"))
    assert "UTF-8" in only_error(read_metadata(path)[1]).what
    path.write_bytes(b'\xef\xbb\xbf{"a": {"caption": "c"}}')
    assert [entry.caption for entry in read_metadata(path)[0]] == ["c"]


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ({"a": {}, "b": {"caption": " ", "tags": None}}, "2 of 2 entries have neither caption nor tags"),
        ({"a": {"caption": "c"}}, "1 of 2 images in"),
        ({"a": {"caption": "1"}, "a.png": {"caption": "2"}, "b": {"tags": "t"}}, "1 images have several entries"),
        ({"a": {"caption": "1\n2"}, "b": {"tags": "t"}}, "1 captions have several lines"),
        ('{"a": {"tags": "t"}, "b": {"tags": "t"}, "a": {"tags": "t"}}', "1 keys are given twice"),
    ],
)
def test_what_is_remarkable_is_a_warning(tmp_path, content, what):
    _, findings = described(tmp_path, content)
    assert [finding.severity for finding in findings] == ["warning"]
    assert what in findings[0].what


def test_an_image_is_listed_however_its_folder_is_spelled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_images(tmp_path / "images", 3)
    keys = ("0", str(tmp_path / "images" / "1.png"), "../images/2")
    write(tmp_path, json.dumps({key: {"tags": "t"} for key in keys}), "meta.json")
    records, findings = scan(spec_of(Path("meta.json"), Path("images")))
    assert len(records) == 3
    assert not findings


def test_two_metadata_files_may_share_a_folder(tmp_path):
    make_images(tmp_path / "images", 2)
    subsets = [
        spec_of(write(tmp_path, json.dumps({str(n): {"tags": "t"}}), f"{n}.json"), tmp_path / "images").datasets[0]
        for n in range(2)
    ]
    records, findings = scan(DataSpec(datasets=tuple(subsets), where="data.toml"))
    assert len(records) == 2
    assert not findings


def test_json_lines_are_known_by_their_first_line_too(tmp_path):
    make_images(tmp_path / "images", 2)
    lines = ['{"image_path": "0.png", "caption": "a"}', '{"image_path": "1.png", "caption": "b"}']
    path = write(tmp_path, "\n" + "\r\n".join(lines), "meta.json")
    records, findings = scan(spec_of(path, tmp_path / "images"))
    assert [record.caption for record in records] == ["a", "b"]
    assert not errors(findings)
    path = write(tmp_path, '{"image_path": {"caption": "a key like any other"}}', "meta.json")
    assert [entry.key for entry in read_metadata(path)[0]] == ["image_path"]


# --- dataset files and flags ---


def test_folder_and_metadata_sets_may_differ_but_not_mix(tmp_path):
    mixed = "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'a'\n[[datasets.subsets]]\nmetadata_file = 'b.json'\n"
    finding = only_error(read(write(tmp_path, mixed))[1])
    assert finding.where.endswith(":2")
    assert "no metadata_file" in finding.what
    apart = mixed.replace("[[datasets.subsets]]\nmeta", "[[datasets]]\n[[datasets.subsets]]\nmeta")
    spec, findings = read(write(tmp_path, apart))
    assert not findings
    assert [dataset.subsets[0].metadata_file for dataset in spec.datasets] == [None, Path("b.json")]


def test_keys_for_caption_files_have_no_meaning_beside_metadata(tmp_path):
    text = (
        "[general]\ncaption_extension = '.txt'\nclass_tokens = 'dog'\n[[datasets]]\ncache_info = false\n"
        "[[datasets.subsets]]\nmetadata_file = 'b.json'\nis_reg = true\nclass_tokens = 'x'\n"
    )
    spec, findings = read(write(tmp_path, text))
    assert [finding.where.rsplit(":", 1)[1] for finding in errors(findings)] == ["5", "9", "8"]
    assert spec.datasets[0].subsets[0].class_tokens is None


def test_the_same_metadata_file_twice_is_a_mistake_the_same_folder_is_none(tmp_path):
    subset = "[[datasets.subsets]]\nimage_dir = 'a'\nmetadata_file = '{}.json'\n"
    path = write(tmp_path, "[[datasets]]\n" + subset.format("b") + subset.format("b"))
    assert "metadata file 'b.json' is given twice" in only_error(read(path)[1]).what
    path = write(tmp_path, "[[datasets]]\n" + subset.format("b") + subset.format("c"))
    assert not read(path)[1]


def test_the_metadata_file_is_found_beside_the_dataset_file_and_may_stand_alone(tmp_path):
    make_images(tmp_path / "set")
    write(tmp_path / "set", "{}", "meta.json")
    path = write(tmp_path, "[[datasets]]\n[[datasets.subsets]]\nmetadata_file = 'set/meta.json'\n")
    (subset,) = read(path)[0].datasets[0].subsets
    assert subset.metadata_file == tmp_path / "set" / "meta.json"
    assert subset.image_dir == tmp_path / "set"


def test_the_command_line_describes_one_set(tmp_path):
    make_images(tmp_path / "images", 2)
    path = write(tmp_path, '{"0": {"caption": "c", "tags": "T, u"}, "1": {"tags": "t"}}', "meta.json")
    spec, findings = read(in_json=path, train=tmp_path / "images", repeats=3, resolution=(64, 64))
    assert not findings
    records, findings = scan(spec)
    assert not findings
    assert [record.repeats for record in records] == [3, 3]
    metadata = dataset_metadata(spec, prepare_data(spec, records))
    assert json.loads(metadata["ss_dataset_dirs"]) == {"meta.json": {"n_repeats": 3, "img_count": 2}}
    # The caption's words are no tags.
    assert json.loads(metadata["ss_tag_frequency"]) == {"meta.json": {"t": 2, "u": 1}}
    (finding,) = read(in_json=path, train=tmp_path / "images", reg=tmp_path)[1]
    assert finding.severity == "error"
    assert "--reg_data_dir does not go with --in_json" in finding.what


def test_metadata_of_the_result_tells_the_method(tmp_path):
    records, _ = described(tmp_path, {"a": {"caption": "c"}, "b": {"tags": "t"}})
    spec = spec_of(tmp_path / "meta.json", tmp_path / "images")
    data = prepare_data(spec, records)
    metadata = dataset_metadata(spec, data)
    (dataset,) = json.loads(metadata["ss_datasets"])
    assert dataset["is_dreambooth"] is False
    (subset,) = dataset["subsets"]
    assert (subset["image_dir"], subset["metadata_file"]) == ("images", "meta.json")
    assert "class_tokens" not in subset
    assert json.loads(metadata["ss_dataset_dirs"]) == {"meta.json": {"n_repeats": 1, "img_count": 2}}
    assert "2 captions found (meta.json)" in startup_table(spec, data, str)
    assert str(tmp_path) not in json.dumps(metadata)
