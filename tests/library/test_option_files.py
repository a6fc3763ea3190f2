"""Configuration files: precedence, mistakes with their lines, and what the common GUI writes."""

from importlib import import_module

import pytest

from library.errors import UserError
from library.option_fields import declarations
from library.option_foreign import FILE_KEYS, FOREIGN_KEYS
from library.options import flat_values, parse_options
from tests.library.parsing import config, parse, problems_of
from train_network import Options

SCRIPTS = ("train_network", "train_db", "fine_tune", "train_textual_inversion", "train_textual_inversion_XTI")


def test_precedence(tmp_path):
    path = config(tmp_path, "seed = 3\ncache_latents = true\nnetwork_args = ['a=1', 'b=2']\n")
    options = parse("--config_file", path, "--seed", 9, "--no_cache_latents", "--network_args", "c=3")
    assert (options.runtime.seed, options.cache.cache_latents, options.network.network_args) == (9, False, ("c=3",))
    assert parse("--config_file", path).runtime.seed == 3
    assert parse().runtime.seed is None


def test_suffix_may_be_left_out_and_sections_too(tmp_path):
    path = config(tmp_path, "v2 = true\n[one]\nseed = 3\n[two]\nlearning_rate = 1e-3\n")
    options = parse("--config_file", path.with_suffix(""))
    assert (options.model.v2, options.runtime.seed, options.optimizer.learning_rate) == (True, 3, 1e-3)


def test_mistakes_of_a_file_have_lines(tmp_path):
    path = config(
        tmp_path,
        '[training]\nlearnig_rate = 1e-4  # typo\n\nmixed_precision = "bf17"\nadaptive_noise_scale = 0.1\n'
        "[a.b]\nseed = 3\n",
    )
    found = {problem.where.removeprefix(f"{path}, "): problem for problem in problems_of("--config_file", path)}
    assert list(found) == ["line 2", "line 6", "line 4", "line 5"]
    assert found["line 2"].remedy == "Did you mean learning_rate?"
    assert found["line 4"].remedy == "Did you mean bf16?"


def test_all_problems_of_both_sources_in_one_error(tmp_path):
    path = config(tmp_path, "seed = 'x'\nfoo = 1\n")
    found = problems_of("--config_file", path, "--bar", "1", "--train_batch_size", "0", "--dim_from_weights")
    assert len(found) == 5
    with pytest.raises(UserError, match="5|2") as error:
        parse("--config_file", path, "--bar", "1", "--train_batch_size", "0", "--dim_from_weights")
    assert str(error.value).startswith("5 problems:")


def test_a_wrong_value_brings_no_second_problem():
    (problem,) = problems_of("--noise_offset", "much", "--adaptive_noise_scale", "0.1")
    assert "--noise_offset expects a number" in problem.what


def test_a_switch_of_a_file_can_be_put_back(tmp_path):
    path = config(tmp_path, "skip_until_initial_step = true\n")
    assert not parse("--config_file", path, "--no_skip_until_initial_step").resume.skip_until_initial_step


def test_contradicting_sections_are_told(tmp_path):
    path = config(tmp_path, "[one]\nseed = 3\nv2 = true\n[two]\nseed = 4\nv2 = true\n")
    notices = []
    assert parse("--config_file", path, notices=notices).runtime.seed == 4
    assert len(notices) == 1
    assert "line 2" in notices[0]
    assert "line 5" in notices[0]


@pytest.mark.parametrize(
    ("text", "what", "remedy"),
    [
        ("seed = \n", "not valid TOML", "Correct this line: seed ="),
        ('output_dir = "C:\\images"\n', "not valid TOML", "single quotes"),
        ("seed = 1\nseed = 2\n", "not valid TOML", "Correct this line: seed = 2"),
        ("[[datasets]]\nresolution = 512\n", "there is no option datasets", "--dataset_config"),
        ("config_file = 'x'\n", "config_file has no place", "flag"),
        ("seed = 2024-01-01\n", "--seed expects a whole number", "Correct it."),
    ],
)
def test_mistake_in_a_file(tmp_path, text, what, remedy):
    (problem,) = problems_of("--config_file", config(tmp_path, text))
    assert problem.what.startswith(what)
    assert remedy in problem.remedy


def test_file_that_is_not_there_or_not_text(tmp_path):
    config(tmp_path, "")
    (problem,) = problems_of("--config_file", tmp_path / "confg")
    assert problem.remedy == "Did you mean config.toml?"
    (tmp_path / "latin.toml").write_bytes(b"output_name = '\xe9'\n")
    (problem,) = problems_of("--config_file", tmp_path / "latin.toml")
    assert "UTF-8" in problem.what


def test_byte_order_mark_is_no_mistake(tmp_path):
    path = tmp_path / "bom.toml"
    path.write_bytes(b"\xef\xbb\xbfseed = 3\n")
    assert parse("--config_file", path).runtime.seed == 3


def test_output_config_keeps_an_existing_file(tmp_path):
    path = config(tmp_path, "seed = 3\n")
    (problem,) = problems_of("--config_file", path, "--output_config", "--seed", "7")
    assert "exists already" in problem.what
    assert path.read_text() == "seed = 3\n"


# --- files of the common GUI

GUI_FILE = """\
bucket_no_upscale = true
bucket_reso_steps = 64
caption_extension = ".txt"
clip_skip = 1
dynamo_backend = "no"
enable_bucket = true
epoch = 10
huber_c = 0.1
huber_scale = 1
huber_schedule = "snr"
learning_rate = 1
loraplus_lr_ratio = 16
loss_type = "l2"
lowvram = true
lr_scheduler = "cosine"
lr_scheduler_args = []
lr_scheduler_num_cycles = 1
lr_scheduler_power = 1
lr_warmup_steps = 0.1
max_bucket_reso = 2048
max_data_loader_n_workers = 0
max_grad_norm = 1
max_timestep = 1000
max_token_length = 75
max_train_steps = 1600
min_bucket_reso = 256
mixed_precision = "bf16"
network_alpha = 1
network_args = [ "use_tucker=False", "dora_wd=False", "use_tucker=False",]
network_dim = 8
network_module = "networks.lora"
noise_offset_type = "Original"
optimizer_args = []
optimizer_type = "AdamW8bit"
output_dir = "out"
output_name = "last"
persistent_data_loader_workers = 1
pretrained_model_name_or_path = "model.safetensors"
prior_loss_weight = 1
resolution = "128,128"
sample_prompts = "out/prompt.txt"
sample_sampler = "euler_a"
save_every_n_epochs = 1
save_model_as = "safetensors"
save_precision = "bf16"
stop_text_encoder_training = 0
text_encoder_lr = [ 0.0001, 0.0001,]
train_batch_size = 1
train_data_dir = "img"
train_inpainting = true
unet_lr = 1e-5
wandb_run_name = "last"
xformers = true
"""


def test_gui_file_is_taken_with_one_warning(tmp_path):
    notices = []
    options = parse("--config_file", config(tmp_path, GUI_FILE), notices=notices)
    ignored = [text for text in notices if "ignored" in text]
    assert len(ignored) == 1
    for name in ("epoch", "loraplus_lr_ratio", "lowvram", "noise_offset_type", "train_inpainting"):
        assert name in ignored[0]
    assert "stop_text_encoder_training" in ignored[0]
    assert sorted(notices) == sorted(
        [
            *ignored,
            "--network_args gives use_tucker more than once; the last one holds",
            "no previews are made without --sample_every_n_epochs, --sample_every_n_steps or --sample_at_first: "
            "--sample_prompts, --sample_sampler without effect",
            "without effect without --log_with wandb or all: --wandb_run_name",
        ]
    )
    values = flat_values(options)
    expected = {
        "max_token_length": None,
        "dynamo_backend": "inductor",
        "learning_rate": 1.0,
        "lr_warmup_steps": 0.1,
        "resolution": (128, 128),
        "text_encoder_lr": (1e-4, 1e-4),
        "persistent_data_loader_workers": True,
        "optimizer_args": (),
        "network_alpha": 1.0,
        "unet_lr": 1e-5,
    }
    assert {name: values[name] for name in expected} == expected
    assert isinstance(values["learning_rate"], float)


def test_foreign_flags_take_their_values_and_never_hide_an_option():
    notices = []
    options = parse("--clip_l", "x", "--seed", 3, "--sdxl", "--text_encoder", 1e-4, notices=notices)
    assert options.runtime.seed == 3
    assert options.network.text_encoder_lr == (1e-4,)
    assert notices == ["ignored, since they mean nothing here: clip_l (Stable Diffusion 3); sdxl (SDXL)"]
    assert not set(FOREIGN_KEYS) & set(declarations(Options))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_file_may_hold_what_is_meant_for_another_script(script, tmp_path):
    kinds = {name: declarations(import_module(name).Options) for name in SCRIPTS}
    others = {name for kind in kinds.values() for name in kind} - set(kinds[script])
    assert others <= {*FOREIGN_KEYS, *FILE_KEYS}
    path = tmp_path / "c.toml"
    keys = ("lr_restart_cycles = 2", 'training_comment = "mine"', 'init_word = "cat"', "learning_rate_te = 1e-5")
    path.write_text("\n".join(('token_string = "zwx"', *keys)))
    notices = []
    parse_options(
        import_module(script).Options, ["--config_file", str(path)], prog="t", description="d", announce=notices.append
    )
    (notice,) = [notice for notice in notices if notice.startswith("ignored")]
    assert "lr_restart_cycles (cycles are set by lr_scheduler_num_cycles)" in notice
    assert ("training_comment" in notice) == (script != "train_network")
    assert ("learning_rate_te" in notice) == (script not in ("train_db", "fine_tune"))
