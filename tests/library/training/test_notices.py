"""Options that do nothing as they are given are told, not ignored."""

from pathlib import Path

import pytest

from library.diffusion.options import LossOptions, NoiseOptions
from library.runtime_options import RuntimeOptions
from library.training.options import PreviewOptions, RecordOptions, SaveOptions
from networks.options import NetworkOptions

NO_PREVIEWS = (
    "no previews are made without --sample_every_n_epochs, --sample_every_n_steps or --sample_at_first: "
    "--sample_prompts without effect"
)


@pytest.mark.parametrize("options", [{}, {"sample_every_n_steps": 0}])
def test_prompts_without_an_interval(options):
    assert NO_PREVIEWS in PreviewOptions(sample_prompts=Path("p.txt"), **options).notices()


@pytest.mark.parametrize(
    "options", [{"sample_at_first": True}, {"sample_every_n_steps": 5}, {"sample_every_n_epochs": 1}]
)
def test_prompts_with_an_interval(options):
    assert PreviewOptions(sample_prompts=Path("p.txt"), **options).notices() == []
    assert PreviewOptions(**options).notices() == ["no previews are made without --sample_prompts FILE"]


@pytest.mark.parametrize(
    ("options", "notices"),
    [
        ({"save_last_n_epochs": 2}, ["without effect without --save_every_n_epochs: --save_last_n_epochs"]),
        ({"save_last_n_steps": 9}, ["without effect without --save_every_n_steps: --save_last_n_steps"]),
        (
            {"save_last_n_steps_state": 9, "save_every_n_steps": 3},
            ["without effect without --save_state: --save_last_n_steps_state"],
        ),
        ({"save_last_n_epochs": 2, "save_n_epoch_ratio": 3}, []),
        (
            {"save_every_n_epochs": 2, "save_n_epoch_ratio": 3},
            ["--save_n_epoch_ratio is used, --save_every_n_epochs is not"],
        ),
        ({"save_last_n_epochs": 2, "save_every_n_epochs": 1}, []),
        ({"save_last_n_steps": 2, "save_every_n_steps": 1, "save_last_n_steps_state": 1, "save_state": True}, []),
    ],
)
def test_how_many_to_keep_of_nothing(options, notices):
    assert SaveOptions(**options).notices() == notices


@pytest.mark.parametrize(
    ("options", "owner", "told"),
    [
        (NoiseOptions(noise_offset_random_strength=True), "without --noise_offset", "--noise_offset_random_strength"),
        (NoiseOptions(multires_noise_discount=0.8), "without --multires_noise_iterations", "--multires_noise_discount"),
        (
            NoiseOptions(ip_noise_gamma=0.0, ip_noise_gamma_random_strength=True),
            "without --ip_noise_gamma",
            "--ip_noise_gamma_random_strength",
        ),
        (LossOptions(huber_c=0.3), "with --loss_type l2", "--huber_c"),
        (LossOptions(loss_type="l1", huber_schedule="constant"), "with --loss_type l1", "--huber_schedule"),
        (LossOptions(loss_type="huber", huber_scale=2.0), "with --huber_schedule snr", "--huber_scale"),
        (RecordOptions(no_metadata=True, training_comment="x"), "with --no_metadata", "--training_comment"),
        (
            NetworkOptions(network_train_unet_only=True, text_encoder_lr=(1e-4,)),
            "with --network_train_unet_only",
            "--text_encoder_lr",
        ),
        (
            NetworkOptions(network_train_text_encoder_only=True, unet_lr=1e-4),
            "with --network_train_text_encoder_only",
            "--unet_lr",
        ),
    ],
)
def test_a_setting_of_something_that_is_not_used(options, owner, told):
    assert options.notices() == [f"without effect {owner}: {told}"]


@pytest.mark.parametrize(
    "options",
    [
        NoiseOptions(noise_offset=0.1, noise_offset_random_strength=True),
        NoiseOptions(multires_noise_iterations=6, multires_noise_discount=0.8),
        NoiseOptions(ip_noise_gamma=0.1, ip_noise_gamma_random_strength=True),
        LossOptions(loss_type="huber", huber_c=0.3),
        LossOptions(loss_type="smooth_l1", huber_schedule="constant", huber_scale=2.0),
        RecordOptions(training_comment="x"),
        NetworkOptions(network_train_unet_only=True, unet_lr=1e-4),
    ],
)
def test_a_setting_of_something_that_is_used(options):
    assert options.notices() == []


def test_a_sampler_without_previews():
    (notice,) = PreviewOptions(sample_prompts=Path("p.txt"), sample_sampler="euler_a").notices()
    assert notice.endswith("--sample_prompts, --sample_sampler without effect")


def test_settings_of_several_processes_in_one():
    options = RuntimeOptions(ddp_timeout=5, ddp_static_graph=True)
    assert options.process_notices(1) == ["without effect with one process: --ddp_timeout, --ddp_static_graph"]
    assert options.process_notices(2) == RuntimeOptions().process_notices(1) == []
