"""The method of ``train_db.py`` and ``fine_tune.py``: the U-Net itself is trained, and the text encoder with it."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from library.data.dataset import Batch
from library.data.setup import TrainingData
from library.full_model_checks import FullModelOptions, format_of
from library.full_model_options import TrainedParts
from library.inputs import Inputs
from library.models.checkpointing import use_checkpointing, use_text_checkpointing
from library.models.formats import ModelFormat, suffix_of
from library.models.model_saving import save_model
from library.models.options import ModelOptions, PromptOptions
from library.models.precision import save_dtype
from library.models.stable_diffusion import StableDiffusion, load_stable_diffusion
from library.results import Result
from library.run import RunOptions, train
from library.runtime import Runtime
from library.task import DenoisingTask


class _Options(FullModelOptions, RunOptions, Protocol):
    """What a run that trains the model itself knows of its options."""


def load_trained_model(
    model: ModelOptions, prompts: PromptOptions, parts: TrainedParts, runtime: Runtime
) -> StableDiffusion:
    """The base model: parts that are trained in the dtype of trained weights, the others in that of frozen ones.

    Raises:
        UserError: See :func:`library.models.stable_diffusion.load_stable_diffusion`.
    """
    return load_stable_diffusion(
        model,
        prompts,
        dtype=runtime.weight_dtype,
        unet_dtype=runtime.trained_dtype if parts.unet else None,
        text_encoder_dtype=runtime.trained_dtype if parts.text_encoder else None,
    )


class FullModelModule(nn.Module):
    """The trained computation: a batch to one loss an example, through text encoder and U-Net."""

    def __init__(self, task: DenoisingTask, parts: TrainedParts) -> None:
        super().__init__()
        self.unet = task.model.unet
        self.text_encoder = task.text.encoder
        self._task = task
        self._parts = parts

    def forward(self, batch: Batch) -> Tensor:
        """Weighted losses, (B,)."""
        # Decided by the number of the step alone, so that a resumed run does the same.
        with torch.set_grad_enabled(self._parts.text_encoder_at(batch.step) and torch.is_grad_enabled()):
            context = self._task.text.encode(batch)
        return self._task.losses(batch, context)


class FullModelTraining:
    """Trains the model itself; see :class:`library.training.method.TrainingMethod`.

    Args:
        task: The losses, with a model from :func:`load_trained_model`.
        parts: What is trained.
        gradient_checkpointing: Compute activations again instead of keeping them.
        format: What the result is saved as.
        save_precision: Number format of the saved weights; as they are when absent.
        offload_checkpoints: Keep what the U-Net is computed again from in main memory.
    """

    def __init__(
        self,
        task: DenoisingTask,
        parts: TrainedParts,
        *,
        gradient_checkpointing: bool,
        format: ModelFormat,
        save_precision: str | None,
        offload_checkpoints: bool = False,
    ) -> None:
        self.module: nn.Module = FullModelModule(task, parts)
        self.trained: nn.Module = nn.ModuleDict(_trained(task.model, parts))
        self._model = task.model
        self._runtime = task.runtime
        self._zero_terminal_snr = task.zero_terminal_snr
        self._parts = parts
        self._format = format
        self._dtype = save_dtype(save_precision)
        self.module.requires_grad_(False).eval()
        self.trained.requires_grad_(True).train()
        if gradient_checkpointing:
            use_checkpointing(task.model.unet, offload=offload_checkpoints)
        if gradient_checkpointing and parts.text_encoder:
            use_text_checkpointing(task.model.text_encoder)

    def param_groups(self) -> list[dict[str, Any]]:
        """One group for all that is trained, named "unet"; a text encoder with a rate of its own is a second one."""
        parts = self._parts
        unet = list(self._model.unet.parameters()) if parts.unet else []
        text = list(self._model.text_encoder.parameters()) if parts.text_encoder else []
        if unet and not parts.separate:
            unet, text = unet + text, []
        groups = [
            {"params": unet, "lr": parts.unet_lr, "name": "unet"},
            {"params": text, "lr": parts.text_encoder_lr, "name": "text_encoder1"},
        ]
        return [group for group in groups if group["params"]]

    def after_step(self, step: int) -> dict[str, float]:
        """Nothing follows a step."""
        return {}

    def save(self, path: Path, metadata: Mapping[str, str], *, step: int, epoch: int) -> None:
        """Write the whole model.

        Raises:
            UserError: A weight is not finite, or the place cannot be written to; what was there is kept.
        """
        model = replace(self._model, zero_terminal_snr=self._zero_terminal_snr)
        # What the step has left, before parts of the source are mapped beside the model.
        self._runtime.release_memory()
        save_model(path, model, format=self._format, dtype=self._dtype, metadata=metadata, step=step, epoch=epoch)


def train_full_model(
    task: DenoisingTask, options: _Options, *, script: str, tracker_name: str, inputs: Inputs, data: TrainingData
) -> int:
    """Train the parts of the model that the options name, and save it whole; returns the exit code.

    Args:
        task: The losses, with a model from :func:`load_trained_model`.
        options: The script's options.
        script: Name of the script's file.
        tracker_name: Name of the log where the options give none.
        inputs: The checked inputs.
        data: The training set.
    """
    format = format_of(options)
    method = FullModelTraining(
        task,
        options.parts,
        gradient_checkpointing=options.runtime.gradient_checkpointing,
        format=format,
        save_precision=options.save.save_precision,
        offload_checkpoints=options.runtime.cpu_offload_checkpointing,
    )
    result = Result(
        script=script,
        kind="checkpoint" if suffix_of(format) else "diffusers",
        suffix=suffix_of(format),
        tracker_name=tracker_name,
        saved_values=number_of_values(task.model),
    )
    return train(method, task, result, options=options, inputs=inputs, data=data)


def number_of_values(model: StableDiffusion) -> int:
    """How many values a file of the whole model holds."""
    parts = (model.unet, model.text_encoder, model.deferred_vae.structure)
    return sum(tensor.numel() for part in parts for tensor in part.parameters())


def _trained(model: StableDiffusion, parts: TrainedParts) -> dict[str, nn.Module]:
    wanted = {"unet": (model.unet, parts.unet), "text_encoder": (model.text_encoder, parts.text_encoder)}
    return {name: part for name, (part, is_trained) in wanted.items() if is_trained}
