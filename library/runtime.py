"""Where and how a run computes: device, processes, precision, threads and log lines.

Distribution and mixed precision belong to Accelerate; this module starts it as the options say and tells the user what
would otherwise go unnoticed: a launcher that started fewer processes or another precision than was asked for.
"""

import logging
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import UserError
from library.runtime_options import ConsoleOptions, RuntimeOptions

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Runtime:
    """The processes of a run and what they compute with.

    Attributes:
        accelerator: Accelerate's handle on devices, processes and precision.
        weight_dtype: dtype of frozen weights.
        seed: Seed of the run, the same in every process.
        keeps_memory: Memory of a GPU that is not in use stays reserved between stages.
    """

    accelerator: Any
    weight_dtype: "torch.dtype"
    seed: int
    keeps_memory: bool = False

    @property
    def device(self) -> "torch.device":
        """The device of this process."""
        return self.accelerator.device  # type: ignore[no-any-return]

    @property
    def world(self) -> int:
        """Number of processes."""
        return int(self.accelerator.num_processes)

    @property
    def rank(self) -> int:
        """Number of this process, from 0."""
        return int(self.accelerator.process_index)

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return bool(self.accelerator.is_main_process)

    def release_memory(self) -> None:
        """Give memory of the GPU that a finished stage has left back to others."""
        import torch

        if not self.keeps_memory and torch.cuda.is_available():
            torch.cuda.empty_cache()


def set_up_logging(options: ConsoleOptions) -> None:
    """Send log lines to the screen (beside progress bars), or to ``--console_log_file``."""
    level = getattr(logging, options.console_log_level or "INFO")
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
    if os.environ.get("RANK", "0") != "0":
        # One of several processes speaks; what ends the others is shown all the same.
        root.addHandler(logging.NullHandler())
        return
    if options.console_log_file:
        path = Path(options.console_log_file)
        path.parent.mkdir(parents=True, exist_ok=True)
        new: logging.Handler = logging.FileHandler(path, mode="w", encoding="utf-8")
    else:
        new = _ConsoleHandler(sys.stdout if options.console_log_simple else sys.stderr)
    simple = options.console_log_simple and not options.console_log_file
    new.setFormatter(
        logging.Formatter("%(message)s" if simple else "%(asctime)s %(levelname)s %(message)s", "%H:%M:%S")
    )
    root.addHandler(new)
    root.setLevel(level)
    # bitsandbytes warns on import of kernels that nothing here uses.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    for name in ("httpx", "urllib3", "PIL", "accelerate", "diffusers", "transformers", "filelock"):
        logging.getLogger(name).setLevel(max(level, logging.WARNING))


class _ConsoleHandler(logging.StreamHandler[Any]):
    """Writes through tqdm, so that a log line does not tear a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        if "tqdm" not in sys.modules:
            super().emit(record)
            return
        from tqdm import tqdm

        try:
            tqdm.write(self.format(record), file=self.stream)
        except Exception:
            # A closed pipe or a letter that the terminal lacks must not end a run.
            self.handleError(record)


def start_runtime(options: RuntimeOptions, *, find_unused_parameters: bool) -> Runtime:
    """Start Accelerate.

    Args:
        options: Precision, seed and process options.
        find_unused_parameters: Whether a step may leave trained parameters without a gradient.

    Raises:
        UserError: fp16 was asked for where it cannot be trained.
    """
    # A worker process forks after the tokenizer has been used; its thread pool would not survive that.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # GNU OpenMP's threads wait for each other by spinning, for long by default: beside another busy program, training
    # on a CPU is then many times slower. Read when torch loads the library.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    import torch
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

    has_accelerator = torch.cuda.is_available() or torch.backends.mps.is_available()
    processes: dict[str, Any] = {}
    if options.ddp_timeout is not None:
        processes["timeout"] = timedelta(minutes=options.ddp_timeout)
    accelerator = Accelerator(
        # Under torchrun without a GPU, Accelerate starts independent single runs unless it is told to use the CPU.
        cpu=not has_accelerator,
        mixed_precision=options.mixed_precision,
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[
            DistributedDataParallelKwargs(
                find_unused_parameters=find_unused_parameters,
                gradient_as_bucket_view=options.ddp_gradient_as_bucket_view,
                static_graph=options.ddp_static_graph,
                # No buffer changes in training, and an adapter has one for every module.
                broadcast_buffers=False,
            ),
            InitProcessGroupKwargs(**processes),
        ],
    )
    if options.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError(
            "fp16 cannot be trained on a CPU (it would silently be fp32)",
            where="--mixed_precision=fp16",
            remedy=_missing_gpu_advice() or "Use --mixed_precision=bf16, or leave it out for fp32.",
        )
    log.info("device: %s, precision: %s", _device_name(accelerator.device), options.mixed_precision)
    if accelerator.device.type == "cpu" and (advice := _missing_gpu_advice()):
        log.warning("training on the CPU although there seems to be a GPU. %s", advice)
    dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[options.mixed_precision]
    for notice in _launcher_notices(options, int(accelerator.num_processes), has_accelerator):
        log.warning(notice)
    return Runtime(accelerator, dtype, _agree_on_seed(options.seed, accelerator), keeps_memory=options.highvram)


def _device_name(device: "torch.device") -> str:
    import torch

    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def _missing_gpu_advice() -> str:
    """What to do when the driver knows a GPU that torch does not see; empty where there is none."""
    import torch

    if torch.cuda.is_available() or shutil.which("nvidia-smi") is None:
        return ""
    return "torch does not see it: update the driver, or delete the folder .venv and run start.py setup again."


def _agree_on_seed(seed: int | None, accelerator: Any) -> int:
    """The given seed, or one drawn by the main process for all."""
    if seed is not None:
        return seed
    from accelerate.utils import broadcast_object_list

    drawn = [secrets.randbelow(2**32)]
    broadcast_object_list(drawn)
    log.info("seed: %d (drawn; give --seed=%d to repeat this run)", drawn[0], drawn[0])
    return int(drawn[0])


def _launcher_notices(options: RuntimeOptions, world: int, has_accelerator: bool) -> Iterator[str]:
    """What the launcher did otherwise than asked."""
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION")
    if launched is not None and launched != options.mixed_precision:
        yield (
            f"the launcher's mixed precision is {launched!r}, --mixed_precision is {options.mixed_precision!r}: "
            f"{options.mixed_precision!r} is used"
        )
    asked = _processes_asked_of_launcher()
    if asked > world:
        yield (
            f"{asked} processes were asked for, but Accelerate started {world}: without GPUs it starts only one. "
            f"Use `torchrun --nproc_per_node {asked} SCRIPT ...` instead."
        )
    cores = os.cpu_count() or 1
    one_thread = launched is not None and os.environ.get("OMP_NUM_THREADS") == "1"
    if not has_accelerator and world == 1 and one_thread and cores > 1:
        yield (
            f"only 1 of {cores} cores is used (OMP_NUM_THREADS=1, the launcher's default): "
            f"start with `accelerate launch --num_cpu_threads_per_process {cores}` or with `python` alone"
        )


def _processes_asked_of_launcher() -> int:
    """The ``--num_processes`` that ``accelerate launch`` was given, 0 when this was not started by it."""
    import psutil

    try:
        command = psutil.Process().parent().cmdline()
    except (psutil.Error, AttributeError):
        return 0
    if "launch" not in command or not any("accelerate" in word for word in command):
        return 0
    for word, following in zip(command, [*command[1:], ""], strict=True):
        name, _, value = word.partition("=")
        if name == "--num_processes":
            number = value or following
            return int(number) if number.isdigit() else 0
    return 0
