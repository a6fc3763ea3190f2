"""Show which words a LoRA changes most: it tells what an unknown file was trained on.

Usage, from anywhere: ``python networks/lora_interrogator.py --sd_model MODEL --model LORA.safetensors``.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from library.errors import Problem, UserError, problems_of, raise_if_any, run_script  # noqa: E402
from library.models.detect import SourceFacts  # noqa: E402
from library.models.options import ModelOptions  # noqa: E402
from library.options import option, parse_options  # noqa: E402
from library.runtime import set_up_logging  # noqa: E402
from library.runtime_options import ConsoleOptions  # noqa: E402
from networks.lora_contents import Contents, check_lora, describe, family_problem  # noqa: E402
from networks.lora_files import read_lora  # noqa: E402
from networks.tool_models import described_model, loaded_model  # noqa: E402
from networks.tool_options import required  # noqa: E402

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

DESCRIPTION = (
    "Show the tokens whose encoding a LoRA for Stable Diffusion 1.x or 2.x changes most, in the mean over all values."
)
FLAG: Final = "--sd_model"
_SHOWN: Final = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class InputOptions:
    """Model and network."""

    sd_model: str | None = option(
        None, metavar="PATH", help="Model that the network is for: a checkpoint file or a Diffusers folder."
    )
    model: Path | None = option(None, metavar="FILE", help="LoRA file with a part for the text encoder.")
    v2: bool = option(False, help="The model is Stable Diffusion 2.x.")
    batch_size: int = option(16, minimum=1, help="Tokens that are encoded at once.")
    clip_skip: int | None = option(
        None, minimum=1, metavar="N", help="Compare the N-th layer counted from the end; the output when absent."
    )

    def problems(self) -> list[Problem]:
        """What is missing."""
        return required(self.sd_model, FLAG, "model.safetensors") + required(self.model, "--model", "lora.safetensors")


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """The tool's options."""

    inputs: InputOptions


def main(argv: list[str]) -> int:
    """Print the tokens; returns the exit code."""
    set_up_logging(ConsoleOptions())
    options = parse_options(Options, argv, prog=Path(__file__).name, description=DESCRIPTION).inputs
    assert options.sd_model is not None, "asked for with the options"
    assert options.model is not None, "asked for with the options"
    model = _checked(options.sd_model, options.model, v2=options.v2)
    _interrogate(model, options.model, batch_size=options.batch_size, clip_skip=options.clip_skip)
    return 0


def _checked(source: str, path: Path, *, v2: bool) -> ModelOptions:
    """How the model is loaded; both it and the network are looked at."""
    models: list[tuple[SourceFacts, ModelOptions]] = []
    networks: list[Contents] = []
    problems = problems_of(
        [
            lambda: models.append(described_model(source, FLAG, v2=v2)),
            lambda: networks.append(describe(path, "--model")),
        ]
    )
    raise_if_any(problems)
    check_lora(networks[0])
    raise_if_any(family_problem(networks[0], "sd2" if v2 else "sd1", FLAG))
    return models[0][1]


def _interrogate(options: ModelOptions, path: Path, *, batch_size: int, clip_skip: int | None) -> None:
    from networks import lora
    from networks.base import named_text_encoder
    from networks.low_rank import TEXT_ENCODER_PREFIX

    file = read_lora(path)
    if not any(name.startswith(TEXT_ENCODER_PREFIX) for name in file.changes):
        raise UserError(
            f"{path.name} has no part for the text encoder, so it changes no word",
            where="--model",
            remedy="Give a LoRA whose training was not for the U-Net alone.",
        )
    model = loaded_model(options, FLAG)
    text_encoder = named_text_encoder(model.text_encoder)
    network, _ = lora.create_network_from_weights(1.0, str(path), None, text_encoder, model.unet, for_inference=True)
    network.apply_to(text_encoder, model.unet, apply_text_encoder=True, apply_unet=False)
    network.load_weights(str(path))
    changes = list(_changes(model.tokenizer, model.text_encoder, network, batch_size, clip_skip))
    print(f"the {min(_SHOWN, len(changes))} of {len(changes)} tokens that {path.name} changes most:")
    for place, (change, token) in enumerate(sorted(changes, key=lambda one: (-one[0], one[1]))[:_SHOWN]):
        print(f"[{place:3d}]: {token:5d} {model.tokenizer.convert_ids_to_tokens(token):<20s}: {change:.5f}")


def _changes(
    tokenizer: Any, text_encoder: "nn.Module", network: Any, batch_size: int, clip_skip: int | None
) -> Iterator[tuple[float, int]]:
    """Mean absolute change of a text of one token, for every token."""
    import torch
    from tqdm import tqdm

    for tokens in tqdm(torch.split(torch.arange(len(tokenizer)), batch_size), desc="encoding"):
        begin, end = (torch.full_like(tokens, one) for one in (tokenizer.bos_token_id, tokenizer.eos_token_id))
        ids = torch.stack([begin, tokens, end], dim=1)[:, None]
        before, after = (_encoded(text_encoder, network, ids, clip_skip, strength) for strength in (0.0, 1.0))
        yield from zip((after - before).abs().mean(dim=(1, 2)).tolist(), tokens.tolist(), strict=True)


def _encoded(
    text_encoder: "nn.Module", network: Any, ids: "torch.Tensor", clip_skip: int | None, strength: float
) -> "Tensor":
    import torch

    from library.models.prompts import encode_tokens

    network.set_multiplier(strength)
    with torch.no_grad():
        return encode_tokens(text_encoder, ids, clip_skip=clip_skip)


if __name__ == "__main__":
    run_script(main)
