"""The method of ``train_network.py``: an adapter network is trained inside a frozen Stable Diffusion."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.data.dataset import Batch
from library.files import check_finite, written_whole
from library.models.checkpointing import use_checkpointing, use_text_checkpointing
from library.models.precision import save_dtype
from library.task import DenoisingTask
from networks.loading import parameter_groups
from networks.options import NetworkOptions


class NetworkModule(nn.Module):
    """The trained computation: a batch to one loss an example, through the adapted U-Net and text encoder."""

    def __init__(self, task: DenoisingTask, network: nn.Module, *, trains_text_encoder: bool) -> None:
        super().__init__()
        self.unet = task.model.unet
        self.text_encoder = task.text.encoder
        self.network = network
        self._task = task
        self._trains_text_encoder = trains_text_encoder

    def forward(self, batch: Batch) -> Tensor:
        """Weighted losses, (B,)."""
        with torch.set_grad_enabled(self._trains_text_encoder and torch.is_grad_enabled()):
            context = self._task.text.encode(batch)
        return self._task.losses(batch, context)


class NetworkTraining:
    """Trains an attached network; see :class:`library.training.method.TrainingMethod`."""

    def __init__(
        self,
        network: Any,
        task: DenoisingTask,
        options: NetworkOptions,
        *,
        learning_rate: float,
        gradient_checkpointing: bool,
        save_precision: str | None,
        offload_checkpoints: bool = False,
    ) -> None:
        text_lr = options.text_encoder_lr[0] if options.text_encoder_lr else None
        trains_text_encoder = not options.network_train_unet_only and text_lr != 0
        self.trained: nn.Module = network
        self.module: nn.Module = NetworkModule(task, network, trains_text_encoder=trains_text_encoder)
        self._network = network
        self._scale_weight_norms = options.scale_weight_norms
        self._device = task.runtime.device
        self._dtype = save_dtype(save_precision)
        unet, text_encoder = task.model.unet, task.model.text_encoder
        network.prepare_grad_etc(text_encoder, unet)
        for parameter in network.parameters():
            parameter.data = parameter.data.to(task.runtime.trained_dtype)
        self._groups = parameter_groups(network, text_encoder_lr=text_lr, unet_lr=options.unet_lr, lr=learning_rate)
        self.module.eval()
        network.on_epoch_start(text_encoder, unet)
        if gradient_checkpointing:
            use_checkpointing(unet, offload=offload_checkpoints)
            use_text_checkpointing(text_encoder)
            network.enable_gradient_checkpointing()
        network.on_step_start()

    def param_groups(self) -> list[dict[str, Any]]:
        """The network's groups."""
        return self._groups

    def after_step(self, step: int) -> dict[str, float]:
        """Keep the norms within ``--scale_weight_norms``."""
        self._network.on_step_start()
        if not self._scale_weight_norms:
            return {}
        scaled, mean, largest = self._network.apply_max_norm_regularization(self._scale_weight_norms, self._device)
        return {
            "max_norm/keys_scaled": float(scaled),
            "max_norm/max_key_norm": float(largest),
            "norm/avg_key_norm": float(mean),
        }

    def save(self, path: Path, metadata: Mapping[str, str], *, step: int, epoch: int) -> None:
        """Write the network file; its ``metadata`` name step and epoch.

        Raises:
            UserError: A weight is not finite, or the folder cannot be written to; the former file is kept.
        """
        tensors = self.trained.state_dict()
        check_finite(tensors, self._dtype, path)
        size = sum(tensor.numel() * (self._dtype or tensor.dtype).itemsize for tensor in tensors.values())
        with written_whole(path, size=size) as temporary:
            # Third-party modules write the file themselves.
            self._network.save_weights(str(temporary), self._dtype, dict(metadata))
