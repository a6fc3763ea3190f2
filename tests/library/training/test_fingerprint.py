"""What makes a run another one, and what may change when it goes on."""

import json

import pytest

from library.training.fingerprint import changes, fingerprint


def made_of(options=None, *, data="a", model="b", total_steps=10):
    return fingerprint(options or {}, data={"images": data}, model={"U-Net": model}, total_steps=total_steps)


def test_neither_paths_nor_secrets_are_told():
    options = {
        "train_data_dir": "/home/someone/mine",
        "huggingface_token": "hf_secret",
        "betas": (0.9, 0.99),
        "network_args": ("preset=/home/someone/x.toml", "conv_dim=4"),
    }
    found = made_of(options)
    assert found["options"] == {
        "train_data_dir": "mine",
        "betas": [0.9, 0.99],
        "network_args": ["preset=x.toml", "conv_dim=4"],
    }
    assert json.loads(json.dumps(found)) == found


def test_only_what_defines_a_run_counts_as_a_difference():
    before = made_of({"learning_rate": 1e-3, "save_every_n_steps": 5, "sample_at_first": False, "sdpa": False})
    now = made_of(
        {"learning_rate": 1e-4, "save_every_n_steps": 9, "sample_at_first": True, "sdpa": True},
        data="other",
        model="other",
        total_steps=20,
    )
    assert changes(before, before) == changes(now, now)
    assert changes(before, before).defining == ()
    assert changes(before, now).defining == (
        "--learning_rate: 0.001 -> 0.0001",
        "data: images: 'a' -> 'other'",
        "the weights of the U-Net",
    )
    assert changes(before, now).harmless == ("--sdpa: False -> True",)


@pytest.mark.parametrize(
    "name",
    [
        "cache_latents",
        "cache_latents_to_disk",
        "gradient_accumulation_steps",
        "log_with",
        "max_train_epochs",
        "output_name",
        "resume",
        "resume_allow_changes",
        "sample_every_n_epochs",
        "save_state",
        "vae",
        "vae_batch_size",
        "vae_slicing",
    ],
)
def test_what_leaves_the_weights_alone_may_change(name):
    assert changes(made_of({name: 1}), made_of({name: 2})) == changes(made_of(), made_of())


def test_latents_that_change_make_another_run():
    assert changes(made_of({"vae_tiling": False}), made_of({"vae_tiling": True})).defining == (
        "--vae_tiling: False -> True",
    )


def test_channels_together_change_the_last_digits_at_most():
    found = changes(made_of({"channels_last": False}), made_of({"channels_last": True}))
    assert (found.defining, found.harmless) == ((), ("--channels_last: False -> True",))


def test_an_option_that_was_not_there_counts():
    assert changes(made_of(), made_of({"min_snr_gamma": 5.0})).defining == ("--min_snr_gamma: (not there) -> 5.0",)
