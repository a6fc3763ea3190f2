"""Options that contradict each other or are out of range: refused by every script, before anything heavy is loaded."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from library.errors import UserError
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
    ["--dynamo_backend=fast"],
    ["--deepspeed"],
    ["--dataset_class=my.Class"],
    ["--ema", "--ema_decay=1.5"],
    ["--validation_split=2"],
    ["--seed=-1"],
    ["--save_precision=fp8"],
    ["--sample_every_n_steps=1"],
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


@pytest.mark.parametrize("name", ["train_db", "fine_tune"])
def test_a_trained_model_is_not_kept_in_8_bits(name: str, images: Path) -> None:
    with pytest.raises(UserError, match="this script trains the model itself"):
        script(name).main(given(name, images, "--fp8_base", "--mixed_precision=bf16"))
