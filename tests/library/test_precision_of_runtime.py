"""What the options of precision and of several processes set in Accelerate, torch and the gradient scaler."""

from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import nn

from library.errors import UserError
from library.options import parse_options
from library.runtime import (
    Runtime,
    _check_kernels,
    _emulation_notices,
    _launcher_notices,
    _unscale_fp16_gradients,
    _use_tf32,
    start_runtime,
)
from library.runtime_options import DeepSpeedOptions, RuntimeOptions
from library.training.updates import StepFacts, WholeUpdate
from tests.library.parsing import parse, problems_of

pytestmark = pytest.mark.usefixtures("accelerate_anew")

FACTS = StepFacts(step=0, loss=1.0, images="x.png")


def started(monkeypatch: pytest.MonkeyPatch, **options: Any) -> dict[str, Any]:
    """The arguments that Accelerate is started with; its handlers by class name."""
    import accelerate

    given: dict[str, Any] = {}
    original = accelerate.Accelerator

    def watched(**arguments: Any) -> Any:
        given.update(arguments)
        return original(**arguments)

    monkeypatch.setattr(accelerate, "Accelerator", watched)
    start_runtime(RuntimeOptions(seed=3, **options), find_unused_parameters=True)
    return {**given, **{type(handler).__name__: handler for handler in given["kwargs_handlers"]}}


def test_options_of_several_processes_reach_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    given = started(monkeypatch, ddp_timeout=7, ddp_gradient_as_bucket_view=True, ddp_static_graph=True)
    assert given["InitProcessGroupKwargs"].timeout == timedelta(minutes=7)
    exchange = given["DistributedDataParallelKwargs"]
    assert (exchange.gradient_as_bucket_view, exchange.static_graph, exchange.find_unused_parameters) == (True,) * 3


def test_without_them_nothing_is_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    given = started(monkeypatch)
    exchange = given["DistributedDataParallelKwargs"]
    assert (exchange.gradient_as_bucket_view, exchange.static_graph) == (False, False)
    assert given["InitProcessGroupKwargs"].timeout in (None, timedelta(minutes=30), timedelta(minutes=10))


@pytest.mark.parametrize(
    ("variable", "name"), [("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"), ("ACCELERATE_USE_FSDP", "FSDP")]
)
def test_a_launcher_that_divides_weights_is_refused(variable: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "true")
    with pytest.raises(UserError, match=name):
        start_runtime(RuntimeOptions(seed=3), find_unused_parameters=False)
    monkeypatch.setenv(variable, "false")
    start_runtime(RuntimeOptions(seed=3), find_unused_parameters=False)


def test_a_launcher_that_compiles_is_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    assert any(
        "--torch_compile --dynamo_backend inductor" in text for text in _launcher_notices(RuntimeOptions(), 1, True)
    )
    given = started(monkeypatch)
    assert given["dynamo_backend"] == "no"


class Doubled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * 2


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_modules_keep_their_names(backend: str) -> None:
    runtime = start_runtime(
        RuntimeOptions(seed=3, torch_compile=True, dynamo_backend=backend), find_unused_parameters=False
    )
    module, x = Doubled(), torch.randn(2, 3)
    before, names = module(x), list(module.state_dict())
    runtime.compile(module)
    torch.testing.assert_close(module(x), before)
    assert module._compiled_call_impl is not None
    assert list(module.state_dict()) == names


def test_a_compiled_network_draws_anew_in_every_step() -> None:
    """DyLoRA trains other ranks in each micro-batch, by the seed that the loop sets: none may be compiled in."""
    from networks.lora_module import LoRAModule, Variant, draw_uniform
    from networks.lora_settings import Rank

    def gradients(compiled: bool) -> list[list[bool]]:
        layer = nn.Linear(3, 3)
        ranks = LoRAModule("x", layer, Rank(dim=4, alpha=2), variant=Variant(draw_down=draw_uniform, unit=1))
        ranks.initialize(5)
        ranks.attach()
        ranks.train()
        if compiled:
            torch._dynamo.reset()
            layer.compile(backend="eager")
        found = []
        for step in range(4):
            torch.manual_seed(step)
            ranks.zero_grad()
            layer(torch.ones(2, 3)).sum().backward()
            gradient = ranks.lora_up.weight.grad
            assert gradient is not None
            found.append([bool(column.any()) for column in gradient.T])
        return found

    live = gradients(compiled=False)
    assert gradients(compiled=True) == live
    assert len({tuple(ranks) for ranks in live}) > 1


def test_without_the_option_nothing_is_compiled() -> None:
    module = Doubled()
    start_runtime(RuntimeOptions(seed=3), find_unused_parameters=False).compile(module)
    assert module._compiled_call_impl is None


def test_a_backend_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(UserError, match="inductor") as error:
        start_runtime(RuntimeOptions(seed=3, torch_compile=True, dynamo_backend="fx2trt"), find_unused_parameters=False)
    assert "no backend 'fx2trt'" in str(error.value)


def test_a_gpu_that_torch_is_not_built_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def ones(*_: object, **__: object) -> torch.Tensor:
        raise error

    _check_kernels(torch.device("cpu"))
    monkeypatch.setattr(torch, "ones", ones)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GTX 1080")
    error = RuntimeError("CUDA error: no kernel image is available\nCompile with TORCH_USE_CUDA_DSA")
    with pytest.raises(UserError, match=r"sm_61; it is built for sm_75, sm_80 \(CUDA error: no kernel") as caught:
        _check_kernels(torch.device("cuda:0"))
    (problem,) = caught.value.problems
    assert problem.where == "cuda:0 (GTX 1080)"
    assert "an older torch" in (problem.remedy or "")
    error = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        _check_kernels(torch.device("cuda:0"))


@pytest.mark.parametrize(
    ("precision", "device", "native", "told"),
    [
        ("bf16", "cuda", False, ["--mixed_precision=fp16"]),
        ("bf16", "cuda", True, []),
        ("fp16", "cuda", False, []),
        ("bf16", "cpu", False, []),
    ],
)
def test_bf16_that_a_gpu_emulates_is_told(
    precision: str, device: str, native: bool, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native or including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "RTX 2070")
    notices = list(_emulation_notices(RuntimeOptions(mixed_precision=precision), torch.device(device)))
    assert [notice.rpartition(" ")[2] for notice in notices] == told
    assert all("RTX 2070" in notice for notice in notices)


def test_tf32_is_set_on_a_gpu_and_nowhere_else(caplog: pytest.LogCaptureFixture) -> None:
    before = torch.get_float32_matmul_precision()
    try:
        assert before == "highest"
        _use_tf32("cpu")
        assert torch.get_float32_matmul_precision() == "highest"
        assert "--tf32" in caplog.text
        _use_tf32("cuda")
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def scaled_step(gradient: float, dtype: torch.dtype = torch.float16) -> tuple[torch.Tensor, Any, torch.Tensor]:
    """One SGD step of a weight of 1 on a gradient that a scaler has multiplied by 1024."""
    weight = nn.Parameter(torch.ones(4, dtype=dtype))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    _unscale_fp16_gradients(scaler)
    scaler.scale((weight.float() * gradient).sum()).backward()
    assert weight.grad is not None
    assert weight.grad.dtype == dtype
    scaler.unscale_(optimizer)
    unscaled = weight.grad.clone()
    scaler.step(optimizer)
    scaler.update()
    return weight.detach(), scaler, unscaled


def test_fp16_gradients_are_unscaled() -> None:
    weight, scaler, unscaled = scaled_step(0.25)
    assert torch.equal(unscaled, torch.full((4,), 0.25, dtype=torch.float16))
    assert torch.equal(weight, torch.full((4,), 0.875, dtype=torch.float16))
    assert scaler.get_scale() == 1024


def test_a_step_with_an_fp16_overflow_is_left_out_and_the_scale_halved() -> None:
    # 100 * 1024 is more than fp16 holds.
    weight, scaler, _ = scaled_step(100.0)
    assert torch.equal(weight, torch.ones(4, dtype=torch.float16))
    assert scaler.get_scale() == 512


def test_torch_itself_refuses_fp16_gradients() -> None:
    """Why the scaler is changed."""
    weight = nn.Parameter(torch.ones(4, dtype=torch.float16))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(weight.float().sum()).backward()
    with pytest.raises(ValueError, match="FP16"):
        scaler.unscale_(optimizer)


class Scaling:
    """As much of an accelerator with a scaler as an update uses."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        _unscale_fp16_gradients(self.scaler)
        self._optimizer = optimizer

    def clip_grad_norm_(self, parameters: Any, limit: float) -> torch.Tensor:
        self.scaler.unscale_(self._optimizer)
        return nn.utils.clip_grad_norm_(parameters, limit)


class ScaledOptimizer:
    """As Accelerate's: the scaler steps it, and tells whether it did."""

    def __init__(self, optimizer: torch.optim.Optimizer, scaler: Any) -> None:
        self.optimizer, self._scaler, self.step_was_skipped = optimizer, scaler, False

    def step(self) -> None:
        before = self._scaler.get_scale()
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.step_was_skipped = self._scaler.get_scale() < before

    def zero_grad(self, set_to_none: bool) -> None:
        self.optimizer.zero_grad(set_to_none=set_to_none)


@pytest.mark.parametrize(("gradient", "skipped", "expected"), [(0.25, False, 0.75), (100.0, True, 1.0)])
def test_an_update_of_fp16_weights(gradient: float, skipped: bool, expected: float) -> None:
    """The norm of the gradient is limited after unscaling: 4 values of 0.25 have the norm 0.5."""
    weight = nn.Parameter(torch.ones(4, dtype=torch.float16))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    accelerator = Scaling(optimizer)
    wrapped = ScaledOptimizer(optimizer, accelerator.scaler)
    runtime = Runtime(accelerator, torch.float16, seed=3, trains_narrow=True)
    update = WholeUpdate(wrapped, runtime, max_grad_norm=1.0)
    accelerator.scaler.scale((weight.float() * gradient).sum()).backward()
    norm = update.apply(FACTS)
    assert update.was_skipped == skipped
    assert weight.detach().tolist() == [expected] * 4
    if not skipped:
        assert norm == pytest.approx(0.5)
    assert weight.grad is None


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--deepspeed"], ["--deepspeed is not supported"]),
        (["--dataset_class=my.module.Class"], ["my.module.Class", "is not supported"]),
        (["--fp8_base"], ["--fp8_base needs mixed precision"]),
        (["--fp8_base_unet"], ["--fp8_base_unet needs mixed precision"]),
        (["--timestep_distribution=snr", "--min_snr_gamma=5"], ["--min_snr_gamma", "once more"]),
    ],
)
def test_what_is_refused(given: list[str], words: list[str]) -> None:
    (problem,) = problems_of(*given)
    for word in words:
        assert word in problem.what
    assert problem.remedy


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--cpu_offload_checkpointing"], "without effect without --gradient_checkpointing"),
        (["--lowram"], "--lowram changes nothing"),
        (["--dynamo_backend=eager"], "without effect without --torch_compile"),
        (["--zero_stage=3", "--zero3_init_flag"], "without --deepspeed: --zero_stage, --zero3_init_flag"),
        (["--fp8_base", "--fp8_base_unet", "--mixed_precision=bf16"], "--fp8_base_unet adds nothing"),
    ],
)
def test_what_has_no_effect_is_told(given: list[str], words: str) -> None:
    from train_network import Options

    told: list[str] = []
    parse_options(Options, given, prog="x", description="", announce=told.append)
    assert any(words in text for text in told)


def test_the_word_of_a_gui_for_no_backend_is_taken() -> None:
    assert parse("--dynamo_backend=no").runtime.dynamo_backend == "inductor"
    assert not DeepSpeedOptions().notices()
