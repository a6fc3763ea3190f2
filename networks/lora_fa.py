"""LoRA-FA: the down weights stay as they were drawn, only up is trained (``--network_module networks.lora_fa``).

Half of the trained values of a LoRA, and less memory for the backward pass; the file is a LoRA like any other. Zhang et
al. 2023, https://arxiv.org/abs/2308.03303.
"""

import math

import torch
from torch import Tensor, nn

from networks.lora_module import Variant
from networks.lora_settings import LORA_FA
from networks.low_rank import LowRankFamily


def draw_normal(down: Tensor, generator: torch.Generator | None) -> None:
    """Fill ``down`` from N(0, s^2), ``s = sqrt(2 / (in + rank))``, where in counts channels of a convolution."""
    rank, inputs = down.shape[:2]
    nn.init.normal_(down, std=math.sqrt(2 / (inputs + rank)), generator=generator)


_VARIANT = Variant(draw_down=draw_normal, trains_down=False)
_FAMILY = LowRankFamily(module=LORA_FA, name="LoRA-FA", variant=lambda _settings: _VARIANT)

create_network = _FAMILY.create_network
create_network_from_weights = _FAMILY.create_network_from_weights
