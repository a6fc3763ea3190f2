"""Options of how a run computes: precision, memory, processes, seed, console. Imports nothing heavy."""

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Final

from library.disk_space import nearest
from library.errors import Problem
from library.options import option

_BACKEND: Final = "inductor"


@dataclass(frozen=True, kw_only=True, slots=True)
class RuntimeOptions:
    """Device and precision."""

    mixed_precision: str = option(
        "no",
        choices=("no", "fp16", "bf16"),
        help="Compute in 16 bits while trained weights stay in 32: less memory, faster. bf16 where the device has it.",
    )
    full_fp16: bool = option(
        False, help="Keep trained weights and gradients in fp16 as well: half the memory, less exact."
    )
    full_bf16: bool = option(
        False, help="Keep trained weights and gradients in bf16 as well: half the memory; steps are rounded by chance."
    )
    fp8_base: bool = option(
        False,
        help="Keep the matrices and convolutions of the frozen U-Net and text encoder in 8 bits: a quarter of their "
        "memory in fp32, half of that in bf16; a little slower and less exact. Needs --mixed_precision.",
    )
    fp8_base_unet: bool = option(False, help="The same for the U-Net alone; the text encoder stays in 16 bits.")
    gradient_checkpointing: bool = option(
        False, help="Compute activations again instead of keeping them: less memory, slower."
    )
    cpu_offload_checkpointing: bool = option(
        False,
        help="With --gradient_checkpointing: keep what the U-Net's blocks are computed again from in main memory, not "
        "on the GPU. Slower.",
    )
    torch_compile: bool = option(
        False,
        help="Compile U-Net and text encoder with torch.compile: slow first steps, also for each new image size, then "
        "faster ones.",
    )
    dynamo_backend: str = option(
        _BACKEND,
        choices=(
            "eager",
            "aot_eager",
            "inductor",
            "aot_ts_nvfuser",
            "nvprims_nvfuser",
            "cudagraphs",
            "ofi",
            "fx2trt",
            "onnxrt",
            "tensort",
            "ipex",
            "tvm",
        ),
        synonyms={"no": _BACKEND},
        help="Backend of --torch_compile; one that the installed torch does not have is refused.",
    )
    tf32: bool = option(
        False,
        help="Let NVIDIA GPUs from Ampere on multiply fp32 matrices with 10 bits of precision (TF32): faster where "
        "fp32 is computed with. Convolutions do so in any case.",
    )
    ddp_timeout: int | None = option(
        None,
        minimum=1,
        synonyms={0: None},
        metavar="MINUTES",
        help="Minutes that processes wait for each other. 0 is off: PyTorch's own limit.",
    )
    ddp_gradient_as_bucket_view: bool = option(
        False, help="Share memory between gradients and what processes exchange."
    )
    ddp_static_graph: bool = option(False, help="Promise that every step uses the same weights: faster exchange.")
    lowram: bool = option(
        False,
        help="For little main memory. Weights are mapped from their files in any case, so it changes nothing.",
    )
    highvram: bool = option(False, help="Do not empty the GPU's memory cache between stages: faster, more memory.")
    seed: int | None = option(
        None,
        minimum=0,
        maximum=2**32 - 1,
        metavar="N",
        help="Seed of everything random; drawn, shown and stored when absent.",
    )

    def problems(self) -> list[Problem]:
        """Precisions that contradict each other."""
        found = []
        for name in ("fp16", "bf16"):
            if getattr(self, f"full_{name}") and self.mixed_precision != name:
                found.append(
                    Problem(
                        f"--full_{name} needs --mixed_precision {name}, which is {self.mixed_precision}",
                        f"--full_{name}",
                        f"Add --mixed_precision {name}.",
                    )
                )
        if (self.fp8_base or self.fp8_base_unet) and self.mixed_precision == "no":
            flag = "--fp8_base" if self.fp8_base else "--fp8_base_unet"
            found.append(Problem(f"{flag} needs mixed precision", flag, "Add --mixed_precision bf16 or fp16."))
        return found

    def notices(self) -> list[str]:
        """What has no effect."""
        found = []
        if self.cpu_offload_checkpointing and not self.gradient_checkpointing:
            found.append("without effect without --gradient_checkpointing: --cpu_offload_checkpointing")
        if self.dynamo_backend != _BACKEND and not self.torch_compile:
            found.append("without effect without --torch_compile: --dynamo_backend")
        if self.lowram:
            found.append("--lowram changes nothing: weights are mapped from their files in any case")
        if self.fp8_base and self.fp8_base_unet:
            found.append("--fp8_base includes the U-Net: --fp8_base_unet adds nothing")
        return found

    def process_notices(self, world: int) -> list[str]:
        """What has no effect with ``world`` processes."""
        names = ("ddp_timeout", "ddp_gradient_as_bucket_view", "ddp_static_graph")
        given = [f"--{name}" for name in names if getattr(self, name)]
        return [f"without effect with one process: {', '.join(given)}"] if given and world == 1 else []

    @property
    def narrows_base(self) -> bool:
        """Whether frozen weights are kept in 8 bits."""
        return self.fp8_base or self.fp8_base_unet


@dataclass(frozen=True, kw_only=True, slots=True)
class ConsoleOptions:
    """Console."""

    console_log_level: str | None = option(
        None,
        choices=("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"),
        help="Least important lines that are shown; INFO when absent.",
    )
    console_log_file: Path | None = option(
        None, metavar="FILE", help="Write log lines to this file, which is emptied first, instead of the screen."
    )
    console_log_simple: bool = option(False, help="Plain log lines without colours or columns.")

    def problems(self) -> list[Problem]:
        """A file that cannot be written."""
        path = self.console_log_file
        if path is None:
            return []
        existing = path if path.exists() else nearest(path.parent)
        if path.is_dir():
            what = f"{path} is a folder, not a file"
        elif existing != path and not existing.is_dir():
            what = f"{existing} is a file, not a folder"
        elif not os.access(existing, os.W_OK):
            what = f"{existing} cannot be written to"
        else:
            return []
        return [Problem(what, "--console_log_file", "Choose another file.")]

    def notices(self) -> list[str]:
        """Plain lines, which are for the screen."""
        unused = self.console_log_simple and self.console_log_file is not None
        return ["without effect with --console_log_file: --console_log_simple"] if unused else []


@dataclass(frozen=True, kw_only=True, slots=True)
class DeepSpeedOptions:
    """DeepSpeed (not supported)."""

    deepspeed: bool = option(
        False, help="Refused: DeepSpeed changes weights within the backward pass, before they could be checked."
    )
    zero_stage: int = option(2, choices=(0, 1, 2, 3), help="Without effect, as all options of DeepSpeed.")
    offload_optimizer_device: str | None = option(None, choices=("cpu", "nvme"), help="Without effect.")
    offload_optimizer_nvme_path: Path | None = option(None, metavar="DIR", help="Without effect.")
    offload_param_device: str | None = option(None, choices=("cpu", "nvme"), help="Without effect.")
    offload_param_nvme_path: Path | None = option(None, metavar="DIR", help="Without effect.")
    zero3_init_flag: bool = option(False, help="Without effect.")
    zero3_save_16bit_model: bool = option(False, help="Without effect.")
    fp16_master_weights_and_gradients: bool = option(False, help="Without effect.")

    def problems(self) -> list[Problem]:
        """DeepSpeed is not supported."""
        if not self.deepspeed:
            return []
        return [
            Problem(
                "--deepspeed is not supported: DeepSpeed changes weights within the backward pass, before a gradient "
                "that is not finite could be noticed, and counts accumulated batches itself",
                "--deepspeed",
                "Leave it out: several GPUs work with accelerate launch alone. For memory there are "
                "--gradient_checkpointing, --full_bf16, --fused_backward_pass and 8-bit optimizers; see "
                "docs/precision_and_memory.md.",
            )
        ]

    def notices(self) -> list[str]:
        """Its settings, when it is not used."""
        plain = DeepSpeedOptions()
        given = [f"--{item.name}" for item in fields(self) if getattr(self, item.name) != getattr(plain, item.name)]
        return [f"without effect without --deepspeed: {', '.join(given)}"] if given and not self.deepspeed else []
