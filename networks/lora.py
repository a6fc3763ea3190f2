"""LoRA for Stable Diffusion's U-Net and text encoder (``--network_module networks.lora``).

Hu et al. 2021, https://arxiv.org/abs/2106.09685; LoRA+: https://arxiv.org/abs/2402.12354.
"""

from networks.lora_module import PLAIN
from networks.lora_settings import LORA
from networks.low_rank import LowRankFamily

_FAMILY = LowRankFamily(module=LORA, name="LoRA", variant=lambda _settings: PLAIN)

create_network = _FAMILY.create_network
create_network_from_weights = _FAMILY.create_network_from_weights
