"""Options of how a run computes: precision, memory, processes, seed, console. Imports nothing heavy."""

from dataclasses import dataclass
from pathlib import Path

from library.errors import Problem
from library.options import option

_FULL = "training in half precision throughout"
_FP8 = "8-bit base weights"
_COMPILE = "torch.compile"
_OFFLOAD = "checkpoints kept in main memory"
_DEEPSPEED = "DeepSpeed by options"


@dataclass(frozen=True, kw_only=True, slots=True)
class RuntimeOptions:
    """Device and precision."""

    mixed_precision: str = option(
        "no",
        choices=("no", "fp16", "bf16"),
        help="Compute in 16 bits while trained weights stay in 32: less memory, faster. bf16 where the device has it.",
    )
    full_fp16: bool = option(False, later=_FULL, help="Keep trained weights and gradients in fp16 as well.")
    full_bf16: bool = option(False, later=_FULL, help="Keep trained weights and gradients in bf16 as well.")
    fp8_base: bool = option(False, later=_FP8, help="Keep the frozen base model in 8 bits.")
    fp8_base_unet: bool = option(False, later=_FP8, help="Keep the frozen U-Net in 8 bits, the text encoder not.")
    gradient_checkpointing: bool = option(
        False, help="Compute activations again instead of keeping them: less memory, slower."
    )
    cpu_offload_checkpointing: bool = option(
        False, later=_OFFLOAD, help="Keep the activations at checkpoints in main memory."
    )
    torch_compile: bool = option(False, later=_COMPILE, help="Compile the models before training.")
    dynamo_backend: str = option(
        "inductor",
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
        synonyms={"no": "inductor"},
        later=_COMPILE,
        help="Backend of --torch_compile.",
    )
    ddp_timeout: int | None = option(
        None, minimum=1, synonyms={0: None}, metavar="MINUTES", help="Minutes that processes wait for each other."
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


@dataclass(frozen=True, kw_only=True, slots=True)
class DeepSpeedOptions:
    """DeepSpeed."""

    deepspeed: bool = option(False, later=_DEEPSPEED, help="Train with DeepSpeed.")
    zero_stage: int = option(
        2, choices=(0, 1, 2, 3), later=_DEEPSPEED, help="What is divided among processes: more with each stage."
    )
    offload_optimizer_device: str | None = option(
        None, choices=("cpu", "nvme"), later=_DEEPSPEED, help="Keep optimizer states there (from stage 2)."
    )
    offload_optimizer_nvme_path: Path | None = option(
        None, metavar="DIR", later=_DEEPSPEED, help="Folder for optimizer states on nvme (stage 3)."
    )
    offload_param_device: str | None = option(
        None, choices=("cpu", "nvme"), later=_DEEPSPEED, help="Keep weights there (stage 3)."
    )
    offload_param_nvme_path: Path | None = option(
        None, metavar="DIR", later=_DEEPSPEED, help="Folder for weights on nvme (stage 3)."
    )
    zero3_init_flag: bool = option(False, later=_DEEPSPEED, help="Divide weights while models are built (stage 3).")
    zero3_save_16bit_model: bool = option(False, later=_DEEPSPEED, help="Save weights in 16 bits (stage 3).")
    fp16_master_weights_and_gradients: bool = option(
        False, later=_DEEPSPEED, help="Keep master weights and gradients in fp16."
    )
    fused_backward_pass: bool = option(
        False,
        later="optimizer steps within the backward pass",
        help="Update each weight as soon as its gradient is known; offered for larger model families.",
    )
