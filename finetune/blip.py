"""Captions by BLIP (Li et al. 2022, arXiv:2201.12086), through transformers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from finetune.blip_weights import read_weights, structure_of, words_of_vocabulary
from finetune.hub_models import NO_CODE, fetch, model_folder, tokenizer_files
from finetune.nucleus import KeyedNucleus
from library.data.images import decode
from library.errors import UserError, first_line
from library.randomness import torch_generator

if TYPE_CHECKING:
    import torch

FLAG: Final = "--caption_weights"
PROMPT: Final = "a picture of "
"""What every caption begins with for the model; it is no part of the result."""

BERT: Final = "google-bert/bert-base-uncased"
"""Hub id of the vocabulary of BLIP's own checkpoints."""

_MEAN: Final = (0.48145466, 0.4578275, 0.40821073)
_DEVIATION: Final = (0.26862954, 0.26130258, 0.27577711)
"""Of the images that CLIP and BLIP were trained on: red, green, blue in 0..1."""

_REPETITION_PENALTY: Final = 1.1
"""Of BLIP's sampling; its beam search has none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Search:
    """How captions are searched for.

    Attributes:
        beams: Beams of a beam search; None samples from the nucleus instead.
        top_p: Probability of the nucleus.
        min_length: Shortest caption in tokens, the prompt included.
        max_length: Longest caption in tokens, the prompt included.
        seed: Seed of the draws.
    """

    beams: int | None
    top_p: float
    min_length: int
    max_length: int
    seed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Blip:
    """A captioning model.

    Attributes:
        model: ``BlipForConditionalGeneration``.
        tokenizer: Its tokenizer.
        device: Where it is.
    """

    model: Any
    tokenizer: Any
    device: "torch.device"

    @property
    def image_size(self) -> int:
        """Side of the images the model takes, in pixels."""
        return int(self.model.config.vision_config.image_size)

    def read(self, path: Path) -> NDArray[np.float32]:
        """The image ``path`` as the model takes it."""
        return preprocess(decode(path).rgb, self.image_size)

    def caption(self, names: Sequence[str], images: Sequence[NDArray[np.float32]], search: Search) -> list[str]:
        """A caption for each of ``images``.

        Args:
            names: What the draws for each image are keyed by.
            images: What :meth:`read` gives.
            search: How to search.
        """
        import torch

        prompt = torch.tensor([self.tokenizer(PROMPT).input_ids], device=self.device)
        pixels = torch.from_numpy(np.stack(images)).to(self.device)
        with torch.inference_mode():
            tokens = self.model.generate(
                pixels, input_ids=prompt.repeat(len(images), 1), **_generation(names, search), do_sample=False
            )
        # The prompt has one token less than its ids: generating leaves out the one that ends it.
        return [_text(self.tokenizer, row[prompt.shape[1] - 1 :]) for row in tokens]


def preprocess(rgb: NDArray[np.uint8], size: int) -> NDArray[np.float32]:
    """An image (height, width, 3) as (3, size, size): stretched by a bicubic filter, whatever its shape, normalised."""
    resized = np.asarray(Image.fromarray(rgb).resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32)
    normalised = (resized / 255 - np.array(_MEAN, np.float32)) / np.array(_DEVIATION, np.float32)
    return np.ascontiguousarray(normalised.transpose(2, 0, 1))


def load_blip(source: str, device: "torch.device") -> Blip:
    """A BLIP captioning model, in float32.

    Args:
        source: A folder or hub id with a model of transformers, or BLIP's own checkpoint as a file or an address.
        device: Where to put it.

    Raises:
        UserError: It cannot be found, fetched or read, or is something else.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if source.startswith(("http://", "https://")):
        model, tokenizer = _from_checkpoint(download(source))
    elif Path(source).suffix.lower() in (".pth", ".pt", ".safetensors") or Path(source).is_file():
        model, tokenizer = _from_checkpoint(Path(source))
    else:
        model, tokenizer = _from_folder(model_folder(source, flag=FLAG), source)
    return Blip(model=model.to(device).eval(), tokenizer=tokenizer, device=device)


def check_length(blip: Blip, search: Search) -> None:
    """Refuse captions longer than the model has places for.

    Raises:
        UserError: They are.
    """
    most = int(blip.model.config.text_config.max_position_embeddings)
    if search.max_length > most:
        raise UserError(
            f"--max_length {search.max_length} is more than the {most} tokens of this model",
            where="--max_length",
            remedy=f"Use {most} at the most.",
        )


def download(url: str) -> Path:
    """The checkpoint at ``url``, fetched into torch's cache unless it is there.

    Raises:
        UserError: It cannot be fetched.
    """
    import torch

    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Written under another name first, so what has this name is whole.
        torch.hub.download_url_to_file(url, str(path))
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"cannot download the BLIP model: {first_line(error)}",
            where=f"{FLAG} {url}",
            remedy=f"Connect to the internet once, put the file into {path.parent.name} of torch's cache yourself, or "
            f"give {FLAG} a file, a folder or a hub id such as Salesforce/blip-image-captioning-large.",
        ) from error
    return path


def _generation(names: Sequence[str], search: Search) -> dict[str, Any]:
    lengths = {"min_length": search.min_length, "max_length": search.max_length}
    if search.beams is not None:
        return {**lengths, "num_beams": search.beams}
    generators = [torch_generator(search.seed, "caption", name) for name in names]
    return {
        **lengths,
        "num_beams": 1,
        "repetition_penalty": _REPETITION_PENALTY,
        "logits_processor": [KeyedNucleus(generators, top_p=search.top_p)],
    }


def _text(tokenizer: Any, tokens: Any) -> str:
    return str(tokenizer.decode(tokens.tolist(), skip_special_tokens=True)).strip()


def _from_folder(folder: Path, source: str) -> tuple[Any, Any]:
    from transformers import AutoTokenizer, BlipForConditionalGeneration

    model, tokenizer = loaded(
        lambda: (
            BlipForConditionalGeneration.from_pretrained(folder, dtype="float32", **NO_CODE),
            AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False),
        ),
        what="BLIP model",
        where=f"{FLAG} {source}",
    )
    return model, tokenizer


def _from_checkpoint(path: Path) -> tuple[Any, Any]:
    from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration

    weights = read_weights(path)
    vocabulary = _vocabulary(path)
    tokenizer = loaded(lambda: BertTokenizer(vocab=str(vocabulary)), what="vocabulary", where=str(vocabulary))
    if len(tokenizer) != words_of_vocabulary(weights):
        raise UserError(
            f"the vocabulary has {len(tokenizer)} words, the model {words_of_vocabulary(weights)}",
            where=str(vocabulary),
            remedy=f"Put the vocab.txt of {BERT} beside the model.",
        )
    model = BlipForConditionalGeneration(BlipConfig(**structure_of(weights, sep_token_id=tokenizer.sep_token_id)))
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(
            f"not all of a BLIP captioning model: {' '.join(str(error).split())[:200]}",
            where=str(path),
            remedy="The file is damaged or another model: download it again.",
        ) from error
    return model.float(), tokenizer


def _vocabulary(path: Path) -> Path:
    """BERT's vocabulary: beside the checkpoint, or from the hub."""
    beside = path.with_name("vocab.txt")
    return beside if beside.is_file() else fetch(BERT, tokenizer_files, flag=f"{FLAG}: its vocabulary") / "vocab.txt"


def loaded(load: Callable[[], Any], *, what: str, where: str) -> Any:
    """What ``load`` gives.

    Raises:
        UserError: The files are damaged, incomplete or something else; ``what`` they should be, and ``where`` they are.
    """
    try:
        return load()
    except UserError:
        raise
    except Exception as error:  # whatever the files make the library stumble over
        raise UserError(
            f"cannot read the {what}: {first_line(error)}",
            where=where,
            remedy="The files are damaged, incomplete or another kind of model: download them again.",
        ) from error
