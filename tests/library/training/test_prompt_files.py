import json
from pathlib import Path

import pytest

from library.diffusion import samplers
from library.errors import UserError
from library.training.prompt_files import MAX_STEPS, PreviewPrompt, load_prompts, parse_line

GOLDEN = Path(__file__).parents[2] / "golden"
LINES = json.loads((GOLDEN / "sample_prompt_lines.json").read_text())["cases"]
FILES = json.loads((GOLDEN / "sample_prompt_files.json").read_text())["cases"]
FIELDS = {
    "prompt": "prompt",
    "negative_prompt": "negative_prompt",
    "width": "width",
    "height": "height",
    "sample_steps": "steps",
    "scale": "scale",
    "seed": "seed",
    "sample_sampler": "sampler",
}

# The reference reads options out of the prompt itself; here the prompt is only a prompt.
PROMPT_READ_AS_OPTIONS = {
    "w 640 is here": {"prompt": "w 640 is here"},
    "n nothing": {"prompt": "n nothing"},
    "d 5 things --w 100": {"prompt": "d 5 things", "width": 100},
}
# The reference passes over what it cannot read, without a word; here the line is refused.
REFUSED = {
    "a cat --w abc": "--w 'abc' cannot be used",
    "a cat -- w 640": "there is no option '--'",
    "a cat --l 3.5.1": "--l '3.5.1' cannot be used",
    "a cat --cn /path/to img.png": "control images are not available yet",
    "a cat --d -5": "--d '-5' cannot be used",
    "a --w 64 b --h 64": "--w '64 b' cannot be used",
    "a cat --x 5": "there is no option '--x'",
    "a cat --w 640--h 320": "--w '640--h 320' cannot be used",
}
# Settings of other families of models: read and left out, with a warning.
FOREIGN = ("cfg_trunc_ratio", "renorm_cfg", "flow_shift")


def write(folder, name, content):
    path = folder / name
    path.write_text(content, encoding="utf-8")
    return path


def expected(result):
    """The prompt that a golden result stands for."""
    values = {FIELDS[key]: value for key, value in result.items() if key in FIELDS}
    for side in ("width", "height"):
        if side in values:
            values[side] = max(64, values[side] // 8 * 8)
    if "sampler" in values:
        values["sampler"] = values["sampler"].lower()
    return PreviewPrompt(**values, index=result.get("enum", 0))


@pytest.mark.parametrize("case", [case for case in LINES if case["line"] not in REFUSED], ids=lambda case: case["line"])
def test_golden_lines(tmp_path, case):
    (prompt,) = load_prompts(write(tmp_path, "p.txt", case["line"]))
    assert prompt == expected(PROMPT_READ_AS_OPTIONS.get(case["line"], case["result"]))


def test_the_listed_differences_are_golden_lines():
    assert {*PROMPT_READ_AS_OPTIONS, *REFUSED} <= {case["line"] for case in LINES}


@pytest.mark.parametrize(("line", "message"), REFUSED.items())
def test_refused_lines_are_named(tmp_path, line, message):
    path = write(tmp_path, "p.txt", f"# a comment\na dog\n{line}\n")
    with pytest.raises(UserError) as caught:
        load_prompts(path)
    (problem,) = caught.value.problems
    assert message in problem.what
    assert problem.where == f"{path}:3"
    assert problem.remedy


@pytest.mark.parametrize("case", FILES[:2] + FILES[4:5], ids=lambda case: case["content"])
def test_golden_files(tmp_path, case):
    content = case["content"]
    results = case["result"]
    if case["file"] == "p.txt":
        # The reference takes an indented comment for a prompt.
        results = [{**result, "enum": number} for number, result in enumerate((results[0], results[2]))]
    content = content.replace("width2=3\n", "")  # The reference keeps keys that mean nothing.
    assert list(load_prompts(write(tmp_path, case["file"], content))) == [expected(result) for result in results]


def test_golden_subset_may_override_the_shared_value(tmp_path):
    """The reference ends with a TypeError."""
    (prompt,) = load_prompts(write(tmp_path, "p.toml", FILES[2]["content"]))
    assert (prompt.prompt, prompt.width) == ("a", 64)


@pytest.mark.parametrize("case", [case for case in FILES[3:] if "error" in case], ids=lambda case: case["content"])
def test_golden_errors_are_messages(tmp_path, case):
    with pytest.raises(UserError) as caught:
        load_prompts(write(tmp_path, case["file"], case["content"]))
    assert all(problem.remedy for problem in caught.value.problems)


def test_unknown_key_in_a_table(tmp_path):
    with pytest.raises(UserError, match="no setting 'width2'.*\n.*prompt 2\n.*Did you mean width?"):
        load_prompts(write(tmp_path, "p.toml", FILES[1]["content"]))


def test_all_problems_of_a_file_at_once(tmp_path):
    path = write(tmp_path, "p.txt", "a --w x --s y\n--n b\nc --ss eular\n")
    with pytest.raises(UserError) as caught:
        load_prompts(path)
    assert [(problem.where, problem.what) for problem in caught.value.problems] == [
        (f"{path}:1", "--w 'x' cannot be used"),
        (f"{path}:1", "--s 'y' cannot be used"),
        (f"{path}:2", "there is no prompt before the options"),
        (f"{path}:3", "there is no sampler 'eular'"),
    ]
    assert "Did you mean euler?" in str(caught.value)


def test_defaults_and_limits(tmp_path):
    path = write(tmp_path, "p.txt", "a\nb --w 127 --h 10 --s 5000 --l 0 --n")
    first, second = load_prompts(path, default_sampler="euler_a")
    assert first == PreviewPrompt(
        prompt="a",
        negative_prompt="",
        width=512,
        height=512,
        steps=30,
        scale=7.5,
        seed=None,
        sampler="euler_a",
        index=0,
    )
    assert second == PreviewPrompt(prompt="b", width=120, height=64, steps=999, scale=0.0, sampler="euler_a", index=1)


def test_what_is_not_taken_as_it_is_is_told_once(tmp_path, caplog):
    path = write(tmp_path, "p.txt", "a --w 512 --s 5000 --d 7\nb --w 10 --s 0\nc --h 500\n")
    assert [prompt.steps for prompt in load_prompts(path)] == [999, 1, 30]
    (message,) = caplog.messages
    assert message.startswith("4 values are brought to what a preview can have")
    assert message.endswith(f"{path}:1: --s 5000 is 999; {path}:2: --w 10 is 64; {path}:2: --s 0 is 1 and 1 more")


def test_values_that_a_preview_can_have_are_no_matter(tmp_path, caplog):
    load_prompts(write(tmp_path, "p.json", '[{"prompt": "a", "width": 512, "height": "768", "sample_steps": 999}]'))
    assert not caplog.messages


def test_the_most_steps_are_those_of_the_samplers():
    assert MAX_STEPS == samplers.MAX_STEPS


@pytest.mark.parametrize("value", ["true", '"512"', "512.5", "-1", "[512]"])
def test_wrong_types_in_tables(tmp_path, value):
    path = write(tmp_path, "p.json", f'[{{"prompt": "a", "seed": {value}}}]')
    if value == '"512"':
        assert load_prompts(path)[0].seed == 512
        return
    with pytest.raises(UserError, match="--d .* cannot be used"):
        load_prompts(path)


def test_byte_order_mark_and_other_encodings(tmp_path):
    path = tmp_path / "p.txt"
    path.write_bytes("\ufeff# comment\ncafé".encode())
    assert [prompt.prompt for prompt in load_prompts(path)] == ["café"]
    path.write_bytes("café".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        load_prompts(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "# nothing\n\n", "no prompt in the file"),
        ("p.toml", "prompt = [", "not valid TOML"),
        ("p.json", "[", "no JSON"),
        ("p.json", "[1]", "1 is no prompt"),
        ("p.json", '[{"width": 64}]', "no prompt before the options"),
    ],
)
def test_unusable_files(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message):
        load_prompts(write(tmp_path, name, content))


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        load_prompts(tmp_path / "none.txt")


def test_settings_of_other_families_are_mentioned_once_each(tmp_path, caplog):
    load_prompts(write(tmp_path, "p.txt", "a --ctr 0.5 --fs 3.1"))
    assert len(caplog.records) == 2
    assert all("changes nothing" in record.message for record in caplog.records)


def test_a_long_hostile_line_is_quick():
    problems = []
    parse_line("a" + " --" * 50_000, "p.txt:1", problems)
    assert len(problems) == 50_000
