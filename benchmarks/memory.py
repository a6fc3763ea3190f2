"""Peak memory of every method on a full-size SD1.5 with random weights: 2 steps at 256x256, batch 1, on the CPU.

Run ``python benchmarks/memory.py`` from the project's folder; it needs about 15 GB of disk in the temporary folder and
20 GB of memory for the largest case. ``--only WORDS`` runs the cases whose name contains them. Prints one line a case:
the peak resident set of the whole process, models, data and saving included, and its ratio to the first case of the
same method.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
CONFIGS = {
    "unet": {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 64,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    },
    "vae": {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "latent_channels": 4,
        "norm_num_groups": 32,
        "sample_size": 512,
    },
}
_MEASURE = """
import resource, sys
sys.path.insert(0, {root!r})
import {script}
code = {script}.main({argv!r})
print("PEAK", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
sys.exit(code or 0)
"""
_BF16 = ("--mixed_precision=bf16",)
_FULL_BF16 = (*_BF16, "--full_bf16")
_FUSED = ("--fused_backward_pass", "--max_grad_norm=0")
_UNET_ONLY = ("--network_train_unet_only", "--cache_text_encoder_outputs")


@dataclass(frozen=True)
class Case:
    """One run to measure: a script, what it starts from, and its options."""

    method: str
    name: str
    script: str
    options: tuple[str, ...] = ()
    single_file: bool = False


CASES = (
    Case("LoRA", "fp32", "train_network"),
    Case("LoRA", "fp32, single file", "train_network", single_file=True),
    Case("LoRA", "bf16", "train_network", _BF16),
    Case("LoRA", "bf16, gradient checkpointing", "train_network", (*_BF16, "--gradient_checkpointing")),
    Case("LoRA", "bf16, U-Net only, captions encoded once", "train_network", (*_BF16, *_UNET_ONLY)),
    Case("Textual inversion", "fp32", "train_textual_inversion"),
    Case("Textual inversion", "bf16", "train_textual_inversion", _BF16),
    Case("DreamBooth", "fp32", "train_db"),
    Case("DreamBooth", "fp32, fused step", "train_db", _FUSED),
    Case("DreamBooth", "bf16 throughout, fused step", "train_db", (*_FULL_BF16, *_FUSED)),
    Case("Fine-tuning", "fp32", "fine_tune"),
    Case("Fine-tuning", "fp32, fused step", "fine_tune", _FUSED),
    Case("Fine-tuning", "fp32, AdamW8bit", "fine_tune", ("--optimizer_type=AdamW8bit",)),
    Case("Fine-tuning", "bf16", "fine_tune", _BF16),
    Case("Fine-tuning", "bf16 throughout", "fine_tune", _FULL_BF16),
    Case("Fine-tuning", "bf16 throughout, fused step", "fine_tune", (*_FULL_BF16, *_FUSED)),
    Case(
        "Fine-tuning",
        "bf16 throughout, fused step, AdamW8bit, gradient checkpointing",
        "fine_tune",
        (*_FULL_BF16, *_FUSED, "--optimizer_type=AdamW8bit", "--gradient_checkpointing"),
    ),
)
_METHOD_OPTIONS = {
    "train_network": ("--network_module=networks.lora", "--network_dim=8"),
    "train_textual_inversion": ("--token_string=shs", "--init_word=thing", "--use_object_template"),
    "train_db": ("--save_model_as=diffusers_safetensors",),
    "fine_tune": ("--save_model_as=diffusers_safetensors",),
}


def write_model(folder: Path) -> None:
    """Write a full-size SD1.5 with small random weights, fp32, as a diffusers folder."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    text = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768
    )
    with torch.no_grad():
        for name, build in (
            ("unet", lambda: UNet2DConditionModel.from_config(CONFIGS["unet"])),
            ("vae", lambda: AutoencoderKL.from_config(CONFIGS["vae"])),
            ("text_encoder", lambda: CLIPTextModel(text)),
        ):
            build().save_pretrained(folder / name)
    DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").save_pretrained(
        folder / "scheduler"
    )
    shutil.copytree(ROOT / "library" / "tokenizer", folder / "tokenizer")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")


def write_single_file(folder: Path, path: Path) -> None:
    """Write the model of ``folder`` as one LDM checkpoint."""
    from library.models.ldm_file import write_ldm
    from library.models.options import ModelOptions, PromptOptions
    from library.models.stable_diffusion import load_stable_diffusion

    model = load_stable_diffusion(ModelOptions(pretrained_model_name_or_path=str(folder)), PromptOptions())
    write_ldm(path, text_encoder=model.text_encoder, vae=model.vae, unet=model.unet, v2=False)


def write_images(work: Path) -> None:
    """Write two images of 256x256, as a folder with repeats and as a metadata file."""
    from PIL import Image

    folder = work / "images" / "1_a thing"
    folder.mkdir(parents=True)
    for number in range(2):
        Image.effect_noise((256, 256), 60).convert("RGB").save(folder / f"{number}.png")
    entries = {str(folder / f"{number}.png"): {"caption": "a thing"} for number in range(2)}
    (work / "meta.json").write_text(json.dumps(entries), encoding="utf-8")


def peak_bytes(case: Case, work: Path) -> int:
    """Train two steps in a process of its own; return its peak resident set."""
    described = case.script == "fine_tune"
    argv = [
        f"--pretrained_model_name_or_path={work / ('sd15.safetensors' if case.single_file else 'sd15')}",
        f"--train_data_dir={work / 'images'}",
        *([f"--in_json={work / 'meta.json'}"] if described else []),
        "--resolution=256",
        f"--output_dir={work / 'out'}",
        "--max_train_steps=2",
        "--max_data_loader_n_workers=0",
        "--cache_latents",
        "--seed=1",
        "--learning_rate=1e-6",
        *_METHOD_OPTIONS[case.script],
        *case.options,
    ]
    code = _MEASURE.format(root=str(ROOT), script=case.script, argv=argv)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    shutil.rmtree(work / "out", ignore_errors=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("PEAK ")]
    if done.returncode or not lines:
        sys.exit(f"{case.method}, {case.name}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    return int(lines[0].split()[1])


def main() -> None:
    """Make the model, run the cases, print the peaks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, help="folder to work in; a temporary one when absent")
    parser.add_argument("--only", default="", help="run the cases whose name contains this text")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    first: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        if not (work / "sd15").exists():
            write_model(work / "sd15")
        if not (work / "images").exists():
            write_images(work)
        for case in CASES:
            if arguments.only.lower() not in f"{case.method}: {case.name}".lower():
                continue
            if case.single_file and not (work / "sd15.safetensors").exists():
                write_single_file(work / "sd15", work / "sd15.safetensors")
            peak = peak_bytes(case, work)
            ratio = peak / first.setdefault(case.method, peak)
            print(f"{case.method}: {case.name}: {peak / 2**30:.2f} GiB, {ratio:.2f} of the first", flush=True)


if __name__ == "__main__":
    main()
