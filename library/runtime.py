"""Where and how a run computes: device, processes, precision, threads and log lines.

Distribution and mixed precision belong to Accelerate; this module starts it as the options say and tells the user what
would otherwise go unnoticed: a launcher that started fewer processes or another precision than was asked for.
"""

import contextlib
import ctypes
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

from library.documents import printable_lines
from library.errors import Problem, UserError, first_line, raise_if_any
from library.messages import KeepMessages
from library.runtime_options import ConsoleOptions, RuntimeOptions
from library.scrubbing import Scrubber

if TYPE_CHECKING:
    import torch
    from torch import nn

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Runtime:
    """The processes of a run and what they compute with.

    Attributes:
        accelerator: Accelerate's handle on devices, processes and precision.
        weight_dtype: dtype of frozen weights.
        seed: Seed of the run, the same in every process.
        trains_narrow: Trained weights have ``weight_dtype`` too, instead of float32.
        keeps_memory: Memory of a GPU that is not in use stays reserved between stages.
        compiler: Backend of torch.compile for the models; None leaves them as they are.
    """

    accelerator: Any
    weight_dtype: "torch.dtype"
    seed: int
    trains_narrow: bool = False
    keeps_memory: bool = False
    compiler: str | None = None

    @property
    def trained_dtype(self) -> "torch.dtype":
        """Dtype of trained weights and their gradients."""
        import torch

        return self.weight_dtype if self.trains_narrow else torch.float32

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

    def from_all(self, text: str) -> list[str]:
        """The ``text`` of every process, which all of them ask for at the same time."""
        if self.world == 1:
            return [text]
        from accelerate.utils import gather_object

        return [str(one) for one in gather_object([text])]

    def release_memory(self) -> None:
        """Give memory that a finished stage has left back to others: that of the GPU, and of the process."""
        import torch

        if self.keeps_memory:
            return
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        # glibc keeps what was freed in small pieces; others have no such call.
        with contextlib.suppress(OSError, AttributeError, TypeError):
            ctypes.CDLL(None).malloc_trim(0)

    def prepare(self, module: "nn.Module", optimizer: Any) -> tuple["nn.Module", Any]:
        """``module`` and ``optimizer`` as Accelerate lets them work in several processes and in 16 bits."""
        from torch.nn.parallel import DistributedDataParallel

        # No backend can send 8-bit weights. Every process has read them from the file, and nothing changes them.
        own = [name for name, value in module.named_parameters() if value.is_floating_point() and value.itemsize == 1]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, own)  # type: ignore[no-untyped-call]
        prepared: tuple[nn.Module, Any] = self.accelerator.prepare(module, optimizer)
        if isinstance(prepared[0], DistributedDataParallel):
            # No buffer changes in training, and an adapter has one for every module.
            prepared[0].forward_sync_buffers = False
        return prepared

    def compile(self, *parts: "nn.Module") -> None:
        """Let ``parts`` be compiled when they are first called; their state dicts keep their names."""
        if self.compiler is not None:
            for part in parts:
                part.compile(backend=self.compiler)


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
    lines = _FileLines if options.console_log_file else _Lines
    new.setFormatter(lines("%(message)s" if simple else "%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    root.addHandler(new)
    root.addHandler(KeepMessages())
    root.setLevel(level)
    # bitsandbytes warns on import of kernels that nothing here uses.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    for name in ("httpx", "urllib3", "PIL", "accelerate", "diffusers", "transformers", "filelock"):
        logging.getLogger(name).setLevel(max(level, logging.WARNING))


class _Lines(logging.Formatter):
    """Names of files and captions are in many lines, and may hold what would steer a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return printable_lines(super().format(record))


class _FileLines(_Lines):
    """Lines for a file, which may be passed on: the screen alone shows whole paths."""

    def format(self, record: logging.LogRecord) -> str:
        return Scrubber()(super().format(record))


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


def start_runtime(options: RuntimeOptions, *, find_unused_parameters: bool, seed: int | None = None) -> Runtime:
    """Start Accelerate.

    Args:
        options: Precision, seed and process options.
        find_unused_parameters: Whether a step may leave trained parameters without a gradient.
        seed: Seed of the run where the options give none; drawn where there is none either.

    Raises:
        UserError: fp16 was asked for where it cannot be trained, a backend of torch.compile is not there, torch has
            no kernels for the GPU, or the launcher's configuration divides weights among processes.
    """
    raise_if_any(_launcher_problems())
    # A worker process forks after the tokenizer has been used; its thread pool would not survive that.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # GNU OpenMP's threads wait for each other by spinning, for long by default: beside another busy program, training
    # on a CPU is then many times slower. Read when torch loads the library.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    import torch

    has_accelerator = has_gpu()
    if not has_accelerator:
        _return_large_blocks()
    # Under torchrun without a GPU, Accelerate starts independent single runs unless it is told to use the CPU.
    accelerator = _accelerator(options, cpu=not has_accelerator, find_unused_parameters=find_unused_parameters)
    _check_kernels(accelerator.device)
    raise_if_any(_precision_problems(options, accelerator.device.type))
    if options.torch_compile:
        _check_compiler(options.dynamo_backend)
    if options.tf32:
        _use_tf32(accelerator.device.type)
    log.info("device: %s, precision: %s", _device_name(accelerator.device), options.mixed_precision)
    if accelerator.device.type == "cpu" and (advice := _missing_gpu_advice()):
        log.warning("training on the CPU although there seems to be a GPU. %s", advice)
    dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[options.mixed_precision]
    world = int(accelerator.num_processes)
    for notice in (
        *options.process_notices(world),
        *_launcher_notices(options, world, has_accelerator),
        *_emulation_notices(options, accelerator.device),
    ):
        log.warning(notice)
    if options.full_fp16:
        _unscale_fp16_gradients(accelerator.scaler)
    return Runtime(
        accelerator,
        dtype,
        _agree_on_seed(seed if options.seed is None else options.seed),
        trains_narrow=options.full_fp16 or options.full_bf16,
        keeps_memory=options.highvram,
        compiler=options.dynamo_backend if options.torch_compile else None,
    )


def _accelerator(options: RuntimeOptions, *, cpu: bool, find_unused_parameters: bool) -> Any:
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

    processes: dict[str, Any] = {}
    if options.ddp_timeout is not None:
        processes["timeout"] = timedelta(minutes=options.ddp_timeout)
    return Accelerator(
        cpu=cpu,
        mixed_precision=options.mixed_precision,
        step_scheduler_with_optimizer=False,
        # Compiling is this program's: the launcher's would take in the keyed draws as well.
        dynamo_backend="no",
        kwargs_handlers=[
            DistributedDataParallelKwargs(
                find_unused_parameters=find_unused_parameters,
                gradient_as_bucket_view=options.ddp_gradient_as_bucket_view,
                static_graph=options.ddp_static_graph,
            ),
            InitProcessGroupKwargs(**processes),
        ],
    )


def _launcher_problems() -> list[Problem]:
    """Ways to distribute that ``accelerate config`` offers and that would give wrong or unchecked results here."""
    reasons = {
        "ACCELERATE_USE_DEEPSPEED": "DeepSpeed, which changes weights within the backward pass, unchecked",
        "ACCELERATE_USE_FSDP": "FSDP, which leaves each process with a part of the weights; only whole ones are saved",
    }
    return [
        Problem(
            f"the launcher is configured for {reason}",
            "accelerate launch",
            "Run `accelerate config` again without it, or give --multi_gpu; see docs/multiple_gpus.md.",
        )
        for name, reason in reasons.items()
        if os.environ.get(name, "false").lower() in ("true", "1")
    ]


def has_gpu() -> bool:
    """Whether torch finds a GPU."""
    import torch

    return torch.cuda.is_available() or torch.backends.mps.is_available()


def _precision_problems(options: RuntimeOptions, device_type: str) -> list[Problem]:
    """What stands against the precision on a device, which is "cpu" or a kind of GPU."""
    if options.mixed_precision != "fp16" or device_type != "cpu":
        return []
    what = "fp16 cannot be trained on a CPU (it would silently be fp32)"
    remedy = _missing_gpu_advice() or "Use --mixed_precision=bf16, or leave it out for fp32."
    return [Problem(what, "--mixed_precision=fp16", remedy)]


def _check_kernels(device: "torch.device") -> None:
    """Refuse a GPU that torch finds, but was not built for.

    Raises:
        UserError: Naming what the GPU is and what torch was built for.
    """
    import torch

    if device.type != "cuda":
        return
    try:
        torch.ones(1, device=device) + 1
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        major, minor = torch.cuda.get_device_capability(device)
        raise UserError(
            f"torch {torch.__version__} cannot compute on this GPU, which is sm_{major}{minor}; it is built for "
            f"{', '.join(torch.cuda.get_arch_list())} ({first_line(error)})",
            where=_device_name(device),
            remedy="Install an older torch that is still built for this GPU; docs/installation.md says how.",
        ) from error


def _check_compiler(backend: str) -> None:
    """Refuse a backend that is not there.

    Raises:
        UserError: Naming those that are.
    """
    import torch

    known = [*torch.compiler.list_backends(), "aot_eager", "eager"]
    if backend not in known:
        raise UserError(
            f"the installed torch {torch.__version__} has no backend {backend!r}",
            where="--dynamo_backend",
            remedy=f"Use one of: {', '.join(sorted(known))}.",
        )


def _use_tf32(device: str) -> None:
    """Let a GPU multiply fp32 matrices with less precision."""
    import torch

    if device != "cuda":
        log.warning("without effect on %s: --tf32", device)
        return
    torch.set_float32_matmul_precision("high")


def _unscale_fp16_gradients(scaler: Any) -> None:
    """Let ``scaler`` work on gradients that are in fp16 themselves, which torch refuses because they lose precision."""
    unscale = scaler._unscale_grads_

    def unscale_fp16(optimizer: Any, inverse_scale: Any, found_inf: Any, allow_fp16: bool) -> Any:
        return unscale(optimizer, inverse_scale, found_inf, True)

    scaler._unscale_grads_ = unscale_fp16


def _return_large_blocks() -> None:
    """Let glibc map blocks from 1 MiB on by themselves, so that freeing one gives its memory back.

    By default it learns from the first large block to keep such memory; between short-lived and lasting tensors of a
    training step on the CPU it then scatters, and takes gigabytes more than is in use. Elsewhere nothing happens.
    """
    mmap_threshold = -3
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(mmap_threshold, 1 << 20)


def _device_name(device: "torch.device") -> str:
    import torch

    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def _missing_gpu_advice() -> str:
    """What to do when the driver knows a GPU that torch does not see; empty where there is none."""
    import torch

    if torch.cuda.is_available() or shutil.which("nvidia-smi") is None:
        return ""
    return "torch does not see it: update the driver, or delete the folder .venv and run start.py setup again."


def _agree_on_seed(seed: int | None) -> int:
    """The given seed, or one drawn by the main process for all."""
    if seed is not None:
        return seed
    from accelerate.utils import broadcast_object_list

    drawn = [secrets.randbelow(2**32)]
    broadcast_object_list(drawn)
    log.info("seed: %d (drawn; give --seed=%d to repeat this run)", drawn[0], drawn[0])
    return int(drawn[0])


def _emulation_notices(options: RuntimeOptions, device: "torch.device") -> Iterator[str]:
    """Whether bf16 is computed by detours."""
    import torch

    if options.mixed_precision != "bf16" or device.type != "cuda":
        return
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        yield (
            f"{_device_name(device)} has no bf16 of its own (NVIDIA's have from RTX 30 on), which makes it slow: "
            "give --mixed_precision=fp16"
        )


def _launcher_notices(options: RuntimeOptions, world: int, has_accelerator: bool) -> Iterator[str]:
    """What the launcher did otherwise than asked."""
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION")
    # "no" is what the launcher says where nothing was chosen.
    if launched not in (None, "no", options.mixed_precision):
        yield (
            f"the launcher's mixed precision is {launched!r}, --mixed_precision is {options.mixed_precision!r}: "
            f"{options.mixed_precision!r} is used"
        )
    compiler = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if compiler != "no":
        advice = f"give --torch_compile --dynamo_backend {compiler}"
        yield f"the launcher's dynamo backend {compiler!r} is not used: {advice}"
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
