"""DyLoRA: a LoRA that can be cut down to a smaller rank afterwards (``--network_module networks.dylora``).

In every step each module trains one block of ``unit`` ranks, drawn at random, with the ranks below it in use but held,
and those above it left out; the change is multiplied by ``sqrt(rank / ranks in use)``. So the first ranks carry most of
what is learnt. Previews, validation and the file use all of them. Valipour et al. 2022,
https://arxiv.org/abs/2210.07558 (the variant there called frozen).
"""

from networks.lora_module import Variant, draw_uniform
from networks.lora_settings import DYLORA
from networks.low_rank import LowRankFamily

_FAMILY = LowRankFamily(
    module=DYLORA, name="DyLoRA", variant=lambda settings: Variant(draw_down=draw_uniform, unit=settings.unit)
)

create_network = _FAMILY.create_network
create_network_from_weights = _FAMILY.create_network_from_weights
