"""Peak memory of LoRA training on a full-size SD1.5 with random weights: 2 steps at 256x256 on the CPU, fp32.

Run ``python benchmarks/memory_lora.py`` from the project's folder; it needs about 10 GB of disk in the temporary
folder. Prints one line a source: the peak resident set of the whole process, models and data included.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
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
import train_network
code = train_network.main({argv!r})
print("PEAK", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
sys.exit(code or 0)
"""


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


def write_images(folder: Path) -> None:
    """Write two images of 256x256."""
    from PIL import Image

    folder.mkdir(parents=True)
    for number in range(2):
        Image.effect_noise((256, 256), 60).convert("RGB").save(folder / f"{number}.png")


def peak_bytes(source: Path, work: Path) -> int:
    """Train two steps from ``source`` in a process of its own; return its peak resident set."""
    argv = [
        f"--pretrained_model_name_or_path={source}",
        f"--train_data_dir={work / 'images'}",
        "--resolution=256",
        f"--output_dir={work / 'out'}",
        "--network_module=networks.lora",
        "--network_dim=8",
        "--max_train_steps=2",
        "--max_data_loader_n_workers=0",
        "--cache_latents",
        "--seed=1",
        "--learning_rate=1e-4",
    ]
    code = _MEASURE.format(root=str(ROOT), argv=argv)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    lines = [line for line in done.stdout.splitlines() if line.startswith("PEAK ")]
    if done.returncode or not lines:
        sys.exit(done.stderr[-2000:])
    return int(lines[0].split()[1])


def main() -> None:
    """Make the model, train from both kinds of source, print the peaks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, help="folder to work in; a temporary one when absent")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        folder, single = work / "sd15", work / "sd15.safetensors"
        if not folder.exists():
            write_model(folder)
        if not single.exists():
            write_single_file(folder, single)
        if not (work / "images").exists():
            write_images(work / "images" / "1_a thing")
        for label, source in (("diffusers folder", folder), ("single file", single)):
            print(f"{label}: {peak_bytes(source, work) / 2**30:.2f} GiB peak")


if __name__ == "__main__":
    main()
