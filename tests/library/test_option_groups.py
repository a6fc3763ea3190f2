"""The option groups of every script against the reference's lists of flags."""

import importlib
import json
import typing
from pathlib import Path

import pytest

from library.option_fields import declarations
from library.option_values import convert, is_switch, is_variadic
from library.options import declared_flags

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "flags.json").read_text())
REFERENCE = {
    script.removesuffix(".py"): {row["name"]: row for row in rows}
    for script, rows in GOLDEN.items()
    if script.endswith(".py")
}
OPTIONS = {script: importlib.import_module(script).Options for script in REFERENCE}
DECLARED = {script: declarations(kind) for script, kind in OPTIONS.items()}
# Each declaration once: scripts share most of them.
EVERY = {(name, declared.default): declared for found in DECLARED.values() for name, declared in found.items()}

MORE_CHOICES = {"lr_scheduler"}  # a free text in the reference, whose wrong values fail after the models are loaded


OURS = {
    "dry_run",
    "validate_dataset",
    "ema",
    "ema_decay",
    "ema_device",
    "ema_save",
    "ema_previews",
    "cache_text_encoder_outputs",
    "vae_slicing",
    "vae_tiling",
    "no_report",
    "on_nonfinite",
    "no_manifest",
    "channels_last",
    "tf32",
    "timestep_distribution",
    "timestep_logit_mean",
    "timestep_logit_std",
    "timestep_snr_gamma",
    "resume_allow_changes",
    "save_state_every_minutes",
}

# What the reference has for its network script alone, and every script of ours can do or refuses.
_SHARED = {
    *("cpu_offload_checkpointing", "fp8_base_unet", "initial_epoch", "initial_step", "skip_until_initial_step"),
    *("max_validation_steps", "validate_every_n_epochs", "validate_every_n_steps", "validation_seed"),
    "validation_split",
}
MORE = {
    "train_network": set(),
    "train_db": {*_SHARED, "in_json", "dataset_repeats"},
    "fine_tune": {*_SHARED, "reg_data_dir", "prior_loss_weight", "conditioning_data_dir", "masked_loss"},
}


@pytest.mark.parametrize("script", OPTIONS)
def test_the_set_of_flags(script):
    assert declared_flags(OPTIONS[script]) == {*REFERENCE[script], *OURS, *MORE[script]}


@pytest.mark.parametrize(
    ("script", "name"),
    [(script, name) for script, found in DECLARED.items() for name in sorted({*found} & {*REFERENCE[script]})],
)
def test_default_type_and_choices(script, name):
    declared, expected = DECLARED[script][name], REFERENCE[script][name]
    default = expected["default"]
    if is_variadic(declared.type) and default is None:
        assert declared.default in (None, ())
    else:
        assert declared.default == default
    assert is_switch(declared) == (expected["type"] == "flag")
    assert is_variadic(declared.type) == expected["many"]
    if name not in MORE_CHOICES:
        choices = {choice for choice in expected["choices"] or () if choice is not None}
        assert set(declared.facts.choices or ()) == choices
    if expected["type"] in ("int", "float"):
        assert expected["type"] in str(declared.type)


@pytest.mark.parametrize("declared", EVERY.values(), ids=lambda declared: declared.name)
def test_default_fits_its_own_checks(declared):
    if declared.default is None:
        assert type(None) in typing.get_args(declared.type)
    elif not isinstance(declared.default, tuple):
        assert convert(declared, declared.default) == declared.default


@pytest.mark.parametrize("declared", EVERY.values(), ids=lambda declared: declared.name)
def test_help_is_a_sentence(declared):
    text = declared.facts.help
    assert text[0].isupper() or text.startswith("--") or text.startswith("'")
    assert len(text) < 250
