"""Options that contradict each other or are out of range: refused by every script, before anything heavy is loaded."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from library.errors import UserError
from library.errors import run_script as end_with_code
from tests.scripts.methods import SCRIPTS
from tests.scripts.runs import script

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "diffusers", "transformers", "accelerate", "cv2")
GOLDEN = json.loads((ROOT / "tests/golden/arg_checks.json").read_text())["cases"]
REFERENCE = [case["args"] for case in GOLDEN if "error" in case]

MORE = [
    ["--learning_rate=-1e-4"],
    ["--learning_rate=nan"],
    ["--learning_rate=inf"],
    ["--max_train_steps=0"],
    ["--max_train_epochs=-1"],
    ["--gradient_accumulation_steps=0"],
    ["--train_batch_size=0"],
    ["--max_grad_norm=-1"],
    ["--lr_warmup_steps=-1"],
    ["--min_timestep=500", "--max_timestep=400"],
    ["--min_timestep=500", "--max_timestep=500"],
    ["--min_timestep=-1"],
    ["--max_timestep=1001"],
    ["--timestep_distribution=logit-normal"],
    ["--timestep_distribution=logit_normal", "--timestep_logit_std=0"],
    ["--timestep_distribution=logit_normal", "--timestep_logit_mean=90", "--max_timestep=500"],
    ["--timestep_distribution=snr", "--min_snr_gamma=5"],
    ["--noise_offset=inf"],
    ["--multires_noise_iterations=-1"],
    ["--ip_noise_gamma=-0.1"],
    ["--min_snr_gamma=-1"],
    ["--huber_c=0"],
    ["--huber_scale=0"],
    ["--prior_loss_weight=-1"],
    ["--caption_dropout_rate=1.5"],
    ["--caption_tag_dropout_rate=-0.1"],
    ["--keep_tokens=-1"],
    ["--clip_skip=0"],
    ["--max_token_length=100"],
    ["--enable_bucket", "--resolution=64", "--min_bucket_reso=512", "--max_bucket_reso=256"],
    ["--bucket_reso_steps=63"],
    ["--full_fp16"],
    ["--full_bf16"],
    ["--full_bf16", "--mixed_precision=fp16"],
    ["--full_fp16", "--full_bf16", "--mixed_precision=bf16"],
    ["--mixed_precision=fp8"],
    ["--fp8_base"],
    ["--fp8_base_unet"],
    ["--fused_backward_pass", "--gradient_accumulation_steps=2"],
    ["--fused_backward_pass", "--mixed_precision=fp16"],
    ["--ddp_static_graph", "--gradient_accumulation_steps=2"],
    ["--dynamo_backend=fast"],
    ["--deepspeed"],
    ["--dataset_class=my.Class"],
    ["--ema", "--ema_decay=1.5"],
    ["--validation_split=2"],
    ["--seed=-1"],
    ["--save_precision=fp8"],
    ["--use_8bit_adam", "--use_lion_optimizer"],
]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    from tests.scripts.runs import write_images

    write_images(tmp_path / "data" / "1_thing", 1)
    return tmp_path / "data"


def given(name: str, images: Path, *arguments: str) -> list[str]:
    """A command line that would be refused for nothing but ``arguments`` (and for the model, which is not there)."""
    own = {
        "train_network": ["--network_module=networks.lora"],
        "fine_tune": [],
        "train_db": [],
    }.get(name, ["--token_string=zwx", "--init_word=dog", "--use_object_template"])
    common = ["--resolution=64", f"--train_data_dir={images}", f"--output_dir={images.parent / 'out'}"]
    return [*own, *common, *arguments]


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("arguments", [*REFERENCE, *MORE], ids=" ".join)
def test_it_is_refused(name: str, arguments: list[str], images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_late(*_given: object, **_named: object) -> None:
        raise AssertionError("the run began")

    module = script(name)
    monkeypatch.setattr(module, "start_runtime", too_late)
    with pytest.raises(UserError) as error:
        module.main(given(name, images, *arguments))
    flags = {word.split("=")[0] for word in arguments if word.startswith("--")}
    told = [problem for problem in error.value.problems if any(flag in str(problem) for flag in flags)]
    assert told, str(error.value)
    assert all(problem.where and problem.remedy for problem in told)
    assert not (images.parent / "out").exists()


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_exit_code_is_2_and_nothing_heavy_is_imported(name: str, images: Path) -> None:
    code = (
        "import sys, atexit\n"
        f"atexit.register(lambda: print('HEAVY', [name for name in {HEAVY} if name in sys.modules]))\n"
        f"import {name}\n"
        "from library.errors import run_script\n"
        f"run_script({name}.main)\n"
    )
    command = [
        sys.executable,
        "-c",
        code,
        *given(name, images, "--full_bf16", "--min_timestep=500", "--max_timestep=5"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 2
    assert "HEAVY []" in done.stdout
    assert "--full_bf16 needs --mixed_precision bf16" in done.stderr
    assert "--min_timestep" in done.stderr
    assert "Traceback" not in done.stderr


EMBEDDING = "{folder}/three.safetensors"
WRONG_USE = [
    ("train_textual_inversion", ["--init_word= "], "--init_word is empty"),
    ("train_textual_inversion", [f"--weights={EMBEDDING}"], "the file has 3 vectors, the new word 1"),
    ("train_textual_inversion", ["--token_string=cat"], "vocabulary already"),
    ("train_textual_inversion_XTI", [f"--weights={EMBEDDING}"], "the file has 3 vectors, the new word 1"),
    ("train_db", ["--learning_rate_te=0", "--stop_text_encoder_training=2"], "never begins|leaves out"),
    ("train_db", ["--in_json={folder}/meta.json"], "not on a metadata file"),
    ("fine_tune", [], "no metadata file is given, and this method trains on nothing else"),
    (
        "fine_tune",
        ["--in_json={folder}/meta.json", "--reg_data_dir={folder}/data"],
        "there are no regularisation images",
    ),
]


@pytest.mark.parametrize(("name", "arguments", "told"), WRONG_USE, ids=[f"{case[0]}-{case[2]}" for case in WRONG_USE])
def test_wrong_use_of_a_method_ends_with_2(
    name: str,
    arguments: list[str],
    told: str,
    images: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = images.parent
    save_file({"emb_params": np.zeros((3, 64), np.float32)}, folder / "three.safetensors")
    (folder / "meta.json").write_text('{"00": {"caption": "a thing"}}', encoding="utf-8")
    command = given(name, images, *(word.format(folder=folder) for word in arguments))
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *command, f"--pretrained_model_name_or_path={images}"])
    with pytest.raises(SystemExit) as ended:
        end_with_code(script(name).main)
    assert ended.value.code == 2
    shown = capsys.readouterr().err
    assert re.search(told, shown), shown
    assert "Traceback" not in shown
    assert not (folder / "out").exists()


@pytest.mark.parametrize("name", ["train_db", "fine_tune"])
def test_a_trained_model_is_not_kept_in_8_bits(name: str, images: Path) -> None:
    with pytest.raises(UserError, match="this script trains the model itself"):
        script(name).main(given(name, images, "--fp8_base", "--mixed_precision=bf16"))
