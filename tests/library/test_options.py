"""Options on the command line and in TOML files: conversion, precedence, and how mistakes are told."""

import ast
import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from library.data.options import CacheOptions
from library.errors import UserError
from library.option_fields import Declared, declarations
from library.option_relations import missing
from library.option_values import is_variadic
from library.options import (
    SECRET_KEYS,
    flat_values,
    option,
    options_that_differ,
    parse_options,
    public_values,
    to_toml,
)
from library.runtime_options import RuntimeOptions
from library.training.options import LR_SCHEDULERS, OptimizerOptions
from tests.library.parsing import config, parse, problems_of
from train_network import Options

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parents[1] / "golden"


# --- the reference's own parser, case by case

CONFIG_CASES = json.loads((GOLDEN / "config_file.json").read_text())["cases"]

# What is refused here and passes there (or the reverse), by what is given.
STRICTER = {
    # a wrong choice, and an unknown key, pass unseen in the reference
    'learning_rate = "1e-3"\nresolution = 512\nmax_token_length = 77\nfoo = 1\n': {"--max_token_length", "foo"},
    'cache_latents = true\nlr_scheduler = "COS"\n': {"--lr_scheduler"},
    # a table inside a table becomes an attribute there
    "[a.b]\nseed = 3\n": {"b"},
}
MILDER = {("--max_token_length", "75")}  # the GUI's way to write "none"


def shown_as_plain(value):
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


@pytest.mark.parametrize("case", CONFIG_CASES, ids=lambda case: " ".join(case["argv"]) or "nothing")
def test_config_file_golden(case, tmp_path, capsys):
    argv = [word.replace("@", str(tmp_path / "c")) for word in case["argv"]]
    if "config" in case:
        (tmp_path / "c.toml").write_text(case["config"])
    expected = case["shown"]
    if case.get("config") in STRICTER:
        found = problems_of(*argv)
        assert len(found) == len(STRICTER[case["config"]])
        for name in STRICTER[case["config"]]:
            assert any(name in problem.what.split() for problem in found)
    elif tuple(case["argv"]) in MILDER:
        assert parse(*argv).prompts.max_token_length is None
    elif expected == "SystemExit(0)":
        with pytest.raises(SystemExit) as ended:
            parse(*[word for word in argv if word not in ("--wandb_api_key", "k")])
        assert ended.value.code == 0
        written = (tmp_path / "cnew.toml").read_text()
        assert written.splitlines() == ['network_args = ["a=1"]', "cache_latents = true", "seed = 7"]
    elif expected in ("SystemExit(1)", "argparse error (exit 2)"):
        assert len(problems_of(*argv)) == 1  # exit code 2 for both
    else:
        values = flat_values(parse(*argv))
        for name, value in expected.items():
            if name == "config_file" or (name, value) == ("text_encoder_lr", "[]"):
                continue
            plain = shown_as_plain(values[name])
            if name == "text_encoder_lr" and not isinstance(value, str):
                plain = plain[0]  # a bare number stands for a list of one here
            assert plain == (value if "config" in case else ast.literal_eval(value))


def test_config_file_golden_values_and_empty_list():
    assert parse("--text_encoder_lr").network.text_encoder_lr is None


ARG_CASES = json.loads((GOLDEN / "arg_checks.json").read_text())["cases"]


@pytest.mark.parametrize("case", ARG_CASES, ids=lambda case: " ".join(case["args"]))
def test_arg_checks_golden(case):
    if "error" in case:
        assert len(problems_of(*case["args"])) == 1
        return
    values = flat_values(parse(*case["args"]))
    for key, expected in case.items():
        if key in ("args", "ok"):
            continue
        if (key, expected) == ("caption_extension", "txt"):
            expected = ".txt"  # the dot is added at once here, later there
        assert shown_as_plain(values[key]) == expected


# --- the command line


def test_prefixes_hyphens_equals_and_negative_numbers():
    options = parse("--no_met", "--output_d=x", "--max-train-steps", 7, "--noise_offset", "-0.1")
    assert options.record.no_metadata
    assert options.save.output_dir == Path("x")
    assert options.length.max_train_steps == 7
    assert options.noise.noise_offset == -0.1


def test_ambiguous_prefix_lists_candidates():
    (problem,) = problems_of("--network_d", "4")
    assert problem.remedy == "Write one of --network_dim, --network_dropout."


@pytest.mark.parametrize(
    ("argv", "what", "remedy"),
    [
        (["--learnig_rate", "1"], "there is no option --learnig_rate", "Did you mean --learning_rate?"),
        (["--seed"], "--seed needs a value", "Write --seed VALUE"),
        (["--seed", "--v2"], "--seed needs a value", "Write --seed VALUE"),
        (["--cache_latents", "true"], "--cache_latents is a switch", "Leave 'true' out."),
        (["--cache_latents=true"], "--cache_latents is a switch", "--no_cache_latents"),
        (["--output_name", "my", "lora"], "'lora' belongs to no option", "quotes"),
        (["-seed", "3"], "'-seed 3' belongs to no option", "two dashes"),
        (["--loss_type", "hubert"], "--loss_type allows l1, l2, huber, smooth_l1", "Did you mean huber?"),
        (["--lr_scheduler", "cosin"], "--lr_scheduler knows no schedule 'cosin'", "Did you mean cosine?"),
        (["--log_with", "tensorboard"], "--log_with tensorboard needs a folder", "Add --logging_dir FOLDER."),
        (["--output_config"], "--output_config needs", "--config_file"),
    ],
)
def test_mistake_on_the_command_line(argv, what, remedy):
    (problem,) = problems_of(*argv)
    assert problem.what.startswith(what)
    assert problem.where.startswith(argv[0].partition("=")[0] if "belongs" not in what else what.split("'")[1])
    assert remedy in problem.remedy


def test_given_twice_is_told_and_the_last_holds():
    notices = []
    assert parse("--seed", 1, "--seed", 2, notices=notices).runtime.seed == 2
    assert notices == ["--seed is given more than once; the last one holds"]


def test_secret_is_never_shown():
    notices = []
    options = parse("--wandb_api_key", "s3cret", notices=notices)
    assert notices == ["without effect without --log_with wandb or all: --wandb_api_key"]
    secret = replace(options, hub=replace(options.hub, huggingface_token="s3cret"))
    assert "s3cret" not in to_toml(secret)
    assert not SECRET_KEYS & set(public_values(secret))


def test_public_values_hold_no_paths():
    values = public_values(parse("--output_dir", "/home/me", "--pretrained_model_name_or_path", "/home/me/model"))
    assert "/home/me" not in str(values)
    assert values["max_train_steps"] == 1600


# --- groups


@pytest.mark.parametrize(
    ("argv", "notice"),
    [
        (["--use_8bit_adam"], "--use_8bit_adam means --optimizer_type AdamW8bit"),
        (["--max_train_epochs", 3, "--max_train_steps", 50], "--max_train_epochs 3 sets the length"),
        (["--sample_every_n_steps", "-1"], "--sample_every_n_steps -1 switches these previews off"),
        (["--v2", "--clip_skip", 2], "--clip_skip 2 with --v2 is unusual"),
        (["--zero_terminal_snr"], "--zero_terminal_snr without --v_parameterization"),
        (["--xformers", "--mem_eff_attn"], "several kinds of attention"),
        (["--text_encoder_lr", 1e-4, 2e-4], "Stable Diffusion 1 and 2 have one text encoder"),
    ],
)
def test_notices(argv, notice):
    notices = []
    parse(*argv, notices=notices)
    assert len(notices) == 1
    assert notices[0].startswith(notice)


def test_without_a_listener_notices_go_to_the_log(caplog):
    parse_options(Options, ["--use_8bit_adam"], prog="x", description="x")
    assert "--use_8bit_adam means" in caplog.text


@pytest.mark.parametrize(
    "argv",
    [
        ["--use_8bit_adam", "--use_lion_optimizer"],
        ["--use_8bit_adam", "--optimizer_type", "Lion"],
        ["--min_timestep", 500, "--max_timestep", 500],
        ["--min_bucket_reso", 512, "--max_bucket_reso", 256],
        ["--log_with", "tensorboard"],
        ["--network_weights", "missing.safetensors"],
        ["--network_train_unet_only", "--network_train_text_encoder_only"],
        ["--base_weights_multiplier", 0.5],
        ["--scale_v_pred_loss_like_noise_pred"],
    ],
)
def test_relations(argv):
    (problem,) = problems_of(*argv)
    assert problem.where.startswith("--")
    assert problem.remedy


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_half_precision_throughout_needs_its_mixed_precision(name):
    assert RuntimeOptions(**{f"full_{name}": True}).problems()
    assert not RuntimeOptions(**{f"full_{name}": True, "mixed_precision": name}).problems()


def test_disk_cache_switches_the_cache_on():
    options = CacheOptions(cache_latents_to_disk=True)
    assert options.settled().cache_latents
    assert options.notices() == ["--cache_latents_to_disk switches --cache_latents on"]


def test_trusting_cache_files_is_said():
    assert "--skip_cache_check" in CacheOptions(cache_latents_to_disk=True, skip_cache_check=True).notices()[-1]
    assert "no effect" in CacheOptions(skip_cache_check=True).notices()[0]


def test_missing():
    (problem,) = missing(None, "--network_module", "Add --network_module networks.lora.")
    assert problem.what == "--network_module is missing"
    assert missing("networks.lora", "--network_module", "") == []


def test_settled_values():
    options = parse("--use_lion_optimizer", "--caption_extention", "txt", "--sample_every_n_epochs", 0)
    assert options.optimizer.optimizer_type == "Lion"
    assert not options.optimizer.use_lion_optimizer
    assert options.captions.caption_extension == ".txt"
    assert options.preview.sample_every_n_epochs is None


# --- a script's own defaults, options of its own, and other names


@dataclass(frozen=True, kw_only=True, slots=True)
class Small:
    """Small."""

    optimizer: OptimizerOptions = OptimizerOptions(learning_rate=5e-4)
    size: int = option(3, flag_aliases=("side",), help="A size.")


def small(*argv):
    return parse_options(Small, argv, prog="small.py", description="Small.")


def test_own_defaults_and_options():
    assert small().optimizer.learning_rate == 5e-4
    assert small("--side", "4").size == 4
    assert to_toml(small("--size", "4", "--learning_rate", "2e-6")) == "learning_rate = 2e-06\nsize = 4\n"
    assert options_that_differ(small(), small("--size", "4")) == {"size": (3, 4)}
    with pytest.raises(UserError, match="--size expects"):
        small("--side", "x")


# --- round trip


def strategy_for(item: Declared):
    """Values of an option that are available and fit no relation with another option."""
    low = item.facts.minimum if item.facts.above is None else item.facts.above * 2 + 1e-3
    high = item.facts.maximum
    numbers = st.floats(-1e6 if low is None else low, 1e6 if high is None else high, allow_subnormal=False)
    integers = st.integers(-1000 if low is None else int(low), 1000 if high is None else min(int(high), 1000))
    text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)
    by_type = {
        bool: st.booleans(),
        int: integers,
        float: numbers,
        str: text,
        Path: text.map(Path),
    }
    if item.facts.choices is not None:
        return st.sampled_from(item.facts.choices)
    kind = str(item.type)
    if "tuple[int, int]" in kind:
        return st.tuples(st.integers(8, 4096), st.integers(8, 4096))
    if "tuple[float, float]" in kind:
        return st.tuples(numbers, numbers).map(sorted).map(tuple)
    if item.name == "lr_scheduler":
        return st.sampled_from(LR_SCHEDULERS)
    if item.name == "lr_warmup_steps":
        return st.one_of(st.integers(0, 1000), st.floats(0, 0.99))
    for plain in (Path, str, bool, int, float):
        if plain.__name__ in kind:
            single = by_type[plain]
            if item.facts.check is not None:
                single = single.filter(lambda value: item.facts.check(value) is None)
            if item.name.endswith("_args"):
                single = single.map(lambda value: f"key={value}")
            return st.lists(single, min_size=1).map(tuple) if is_variadic(item.type) else single
    raise AssertionError(item)


RELATED = {
    *("adaptive_noise_scale", "min_timestep", "max_timestep", "scale_v_pred_loss_like_noise_pred", "v_pred_like_loss"),
    *("log_with", "sample_every_n_steps", "sample_every_n_epochs", "sample_at_first"),
    *("network_weights", "base_weights", "base_weights_multiplier", "dim_from_weights"),
    *("network_train_unet_only", "network_train_text_encoder_only", "use_8bit_adam", "use_lion_optimizer"),
    *("min_bucket_reso", "max_bucket_reso", "bucket_reso_steps", "caption_extention", "caption_extension"),
    *("cache_latents_to_disk", "dataset_class", "deepspeed", "full_fp16", "full_bf16", "fp8_base", "fp8_base_unet"),
    *("timestep_distribution", "timestep_logit_mean", "timestep_logit_std", "fused_backward_pass"),
    *("huggingface_repo_id", "huggingface_repo_type", "huggingface_path_in_repo"),
    *SECRET_KEYS,
}
FREE = {name: item for name, item in declarations(Options).items() if name not in RELATED}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_toml_round_trip(data, tmp_path):
    names = data.draw(st.lists(st.sampled_from(sorted(FREE)), max_size=8, unique=True))
    options = parse()
    for name in names:
        group = FREE[name].group
        value = data.draw(strategy_for(FREE[name]), label=name)
        options = replace(options, **{group: replace(getattr(options, group), **{name: value})})
    read = parse("--config_file", config(tmp_path, to_toml(options)))
    assert read == options
    assert options_that_differ(read, options) == {}


# --- how fast, and what is imported


def run(*argv):
    code = (
        "import sys; from train_network import Options; from library.options import parse_options\n"
        "try:\n    parse_options(Options, sys.argv[1:], prog='t', description='d')\n"
        "finally:\n    heavy = {'torch', 'diffusers', 'transformers', 'accelerate', 'numpy', 'cv2'}\n"
        "    print(sorted(heavy & set(sys.modules)))"
    )
    return subprocess.run([sys.executable, "-c", code, *argv], cwd=ROOT, capture_output=True, text=True, check=True)


def test_help_is_grouped_and_light():
    text = run("--help").stdout
    assert text.splitlines()[-1] == "[]"
    for expected in ("Captions:", "Optimizer:", "--learning_rate RATE", "[default: 2e-06]"):
        assert expected in text
    for name in declarations(Options):
        assert f"  --{name}" in text
    assert max(map(len, text.splitlines())) <= 110


def test_parsing_imports_nothing_heavy():
    assert run("--seed", "3").stdout == "[]\n"
