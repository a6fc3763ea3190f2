import base64
import json
from pathlib import Path

import pytest

from library.training.metadata import (
    MINIMUM_KEYS,
    ModelFacts,
    RunFacts,
    _resolution,
    check_metadata,
    file_metadata,
    modelspec,
    training_metadata,
)
from library.training.options import MetadataOptions

GOLDEN_FOLDER = Path(__file__).parents[2] / "golden"
GOLDEN = json.loads((GOLDEN_FOLDER / "modelspec.json").read_text())["cases"]

OPTIONS = {
    "v2": False,
    "learning_rate": 1e-4,
    "network_module": "networks.lora",
    "network_dim": None,
    "network_alpha": 1,
    "text_encoder_lr": (5e-5,),
    "unet_lr": None,
    "output_name": "style/toy",
    "seed": None,
    "caption_dropout_rate": 0.0,
    "face_crop_aug_range": (2.0, 4.0),
    "debiased_estimation_loss": True,
    "training_comment": "a test",
    "huggingface_token": "hf_secret",
}

KEYS_OF_EVERY_RECORD = """
    session_id training_started_at output_name learning_rate text_encoder_lr unet_lr num_train_images num_reg_images
    num_validation_images num_batches_per_epoch num_epochs max_train_steps gradient_checkpointing
    gradient_accumulation_steps lr_warmup_steps lr_scheduler network_module network_dim network_alpha
    network_dropout mixed_precision full_fp16 fp8_base fp8_base_unet lowram v2 base_model_version clip_skip
    max_token_length cache_latents seed max_grad_norm noise_offset noise_offset_random_strength
    multires_noise_iterations multires_noise_discount adaptive_noise_scale ip_noise_gamma
    ip_noise_gamma_random_strength zero_terminal_snr min_snr_gamma debiased_estimation prior_loss_weight
    scale_weight_norms loss_type huber_schedule huber_scale huber_c caption_dropout_rate
    caption_dropout_every_n_epochs caption_tag_dropout_rate face_crop_aug_range training_comment optimizer
    sd_scripts_commit_hash validation_seed validation_split max_validation_steps validate_every_n_epochs
    validate_every_n_steps resize_interpolation sd_model_name
"""


def facts(**changes):
    values = {
        "session_id": 7,
        "started_at": 1700000000.25,
        "seed": 42,
        "train_images": 20,
        "reg_images": 4,
        "batches_per_epoch": 6,
        "epochs": 3,
        "total_steps": 18,
        "optimizer": "torch.optim.adamw.AdamW(eps=1e-06)",
        "base_model_version": "sd_v1",
        "model": "someone/some-model",
        "network_args": {"conv_dim": "4", "dropout": None},
    }
    return RunFacts(**{**values, **changes})


def model_facts(case):
    extra = case["extra"]
    kind = "checkpoint"
    if case["lora"]:
        kind = "lora"
    elif case["textual_inversion"]:
        kind = "textual-inversion"
    elif case["is_stable_diffusion_ckpt"] is False:
        kind = "diffusers"
    version = ("sd_v2" if case["v2"] else "sd_v1") + ("_v" if case["v_parameterization"] else "")
    low, high = extra.get("timesteps", (None, None))
    return ModelFacts(
        kind=kind,
        base_model_version=version,
        resolution=tuple(extra["reso"]) if "reso" in extra else None,
        min_timestep=low,
        max_timestep=high,
        clip_skip=extra.get("clip_skip"),
    )


@pytest.mark.parametrize("case", [case for case in GOLDEN if "v2" in case], ids=str)
def test_golden_modelspec(case, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")  # The recorded dates are in UTC.
    named = ("title", "author", "description", "license", "tags", "merged_from")
    options = MetadataOptions(**{f"metadata_{name}": case["extra"][name] for name in named if name in case["extra"]})
    card = modelspec(options, model_facts(case), timestamp=case["timestamp"])
    assert card.pop("modelspec.implementation_version")
    assert card == case["result"]


@pytest.mark.parametrize("case", [case for case in GOLDEN if "determine_resolution" in case], ids=str)
def test_golden_resolution(case):
    given = case["determine_resolution"]
    assert _resolution(tuple(given) if isinstance(given, list) else given, 512) == case["result"]


def test_half_a_timestep_range_is_filled_in():
    facts = ModelFacts(kind="lora", base_model_version="sd_v1", max_timestep=500)
    assert modelspec(MetadataOptions(), facts, timestamp=0)["modelspec.timestep_range"] == "0,500"
    facts = ModelFacts(kind="lora", base_model_version="sd_v1", min_timestep=500)
    assert modelspec(MetadataOptions(), facts, timestamp=0)["modelspec.timestep_range"] == "500,1000"


def test_title_falls_back_to_the_output_name():
    facts = ModelFacts(kind="lora", base_model_version="sd_v1", output_name="/home/someone/toy")
    assert modelspec(MetadataOptions(), facts, timestamp=0)["modelspec.title"] == "toy"


def test_thumbnail_file_becomes_a_data_url(tmp_path, monkeypatch):
    image = tmp_path / "thumb.webp"
    image.write_bytes(b"picture")
    facts = ModelFacts(kind="lora", base_model_version="sd_v1")
    card = modelspec(MetadataOptions(metadata_thumbnail=str(image)), facts, timestamp=0)
    assert card["modelspec.thumbnail"] == "data:image/webp;base64," + base64.b64encode(b"picture").decode()
    assert check_metadata(MetadataOptions(metadata_thumbnail="data:image/png;base64,AA==")) == []
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    at_home = MetadataOptions(metadata_thumbnail=f"~/{image.name}")
    assert check_metadata(at_home) == []
    assert modelspec(at_home, facts, timestamp=0)["modelspec.thumbnail"] == card["modelspec.thumbnail"]
    (problem,) = check_metadata(MetadataOptions(metadata_thumbnail=str(tmp_path / "none.png")))
    assert problem.where == "--metadata_thumbnail"


def test_record_is_text_in_the_usual_spelling():
    record = training_metadata(OPTIONS, facts(), {"ss_dataset_dirs": "{}"})
    assert all(isinstance(value, str) for value in record.values())
    expected = {
        "ss_v2": "False",
        "ss_learning_rate": "0.0001",
        "ss_network_dim": "None",
        "ss_network_alpha": "1",
        "ss_text_encoder_lr": "5e-05",
        "ss_unet_lr": "None",
        "ss_output_name": "toy",
        "ss_seed": "42",
        "ss_face_crop_aug_range": "(2.0, 4.0)",
        "ss_debiased_estimation": "True",
        "ss_training_started_at": "1700000000.25",
        "ss_num_train_images": "20",
        "ss_num_validation_images": "0",
        "ss_optimizer": "torch.optim.adamw.AdamW(eps=1e-06)",
        "ss_sd_model_name": "someone/some-model",
        "ss_network_args": '{"conv_dim": "4", "dropout": null}',
        "ss_dataset_dirs": "{}",
    }
    assert {name: record[name] for name in expected} == expected


def test_record_has_the_documented_keys():
    """The keys that are there whatever the options; those of the data set are made where it is known."""
    record = training_metadata({}, facts(network_args=None), {})
    assert set(record) == {f"ss_{name}" for name in KEYS_OF_EVERY_RECORD.split()}


def test_a_distribution_of_timesteps_that_is_not_the_usual_one_is_recorded():
    options = {"timestep_distribution": "snr", "timestep_snr_gamma": 3.0, "timestep_logit_mean": 0.0}
    record = training_metadata(options, facts(), {})
    assert (record["ss_timestep_distribution"], record["ss_timestep_snr_gamma"]) == ("snr", "3.0")
    assert not any("timestep" in name for name in training_metadata({"timestep_distribution": "uniform"}, facts(), {}))


@pytest.mark.parametrize(("given", "recorded"), [((5e-5, 1e-5), "5e-05"), ((), "None"), (None, "None")])
def test_the_rate_of_the_only_text_encoder_is_recorded_as_a_number(given, recorded):
    record = training_metadata({"text_encoder_lr": given}, facts(), {})
    assert record["ss_text_encoder_lr"] == recorded


def test_a_model_in_the_home_folder_has_its_hashes(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "base.safetensors").write_bytes(b"abc")
    record = training_metadata({}, facts(model="~/base.safetensors"), {})
    assert record["ss_sd_model_name"] == "base.safetensors"
    assert record["ss_new_sd_model_hash"] == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_base_model_file_is_named_and_hashed(tmp_path):
    model = tmp_path / "base.safetensors"
    model.write_bytes(b"abc")
    record = training_metadata({}, facts(model=str(model), vae=str(tmp_path)), {})
    assert record["ss_sd_model_name"] == "base.safetensors"
    assert record["ss_sd_model_hash"] == "e3b0c442"
    assert record["ss_new_sd_model_hash"] == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert record["ss_vae_name"] == tmp_path.name
    assert record["ss_new_vae_hash"] == "IsADirectory"


def test_record_tells_neither_paths_nor_secrets(tmp_path):
    options = {**OPTIONS, "pretrained_model_name_or_path": str(tmp_path), "output_name": str(tmp_path / "toy")}
    record = training_metadata(options, facts(model=str(tmp_path / "missing.safetensors")), {})
    assert str(tmp_path) not in json.dumps(record)
    assert "hf_secret" not in json.dumps(record)


def test_file_metadata_adds_progress(monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    found = file_metadata({"ss_v2": "False", "ss_seed": "1"}, {"modelspec.title": "x"}, step=10, epoch=2)
    assert found == {
        "ss_v2": "False",
        "ss_seed": "1",
        "ss_steps": "10",
        "ss_epoch": "2",
        "ss_training_finished_at": "1700000000.0",
        "modelspec.title": "x",
    }


def test_no_metadata_keeps_the_minimum_and_the_card():
    record = training_metadata(OPTIONS, facts(), {"ss_tag_frequency": "{}"})
    found = file_metadata(record, {"modelspec.title": "x"}, step=10, epoch=2, no_metadata=True)
    assert set(found) == {*MINIMUM_KEYS, "modelspec.title"}
