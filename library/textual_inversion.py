"""Textual inversion: new words for a frozen model (Gal et al. 2022, arXiv 2208.01618)."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from library.conditioning import ClipConditioning
from library.data.dataset import Batch
from library.data.setup import TrainingData
from library.files import write_tensors
from library.inputs import Inputs
from library.models.checkpointing import use_checkpointing, use_text_checkpointing
from library.models.embedding_files import read_embedding
from library.models.embedding_options import EmbeddingOptions
from library.models.new_tokens import TokenRows, add_tokens, extend, random_rows, rows_of_words
from library.models.options import PromptOptions
from library.models.precision import save_dtype
from library.models.prompts import TokenizedCaption
from library.models.stable_diffusion import StableDiffusion
from library.new_words import NewWord
from library.results import Result
from library.run import train
from library.task import DenoisingTask
from library.textual_inversion_options import TextualInversionOptions

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class LearntWord:
    """A new word in a model.

    Attributes:
        word: Its tokens' names.
        first: Id of its first token.
        rows: Its trained embeddings.
    """

    word: NewWord
    first: int
    rows: TokenRows


def teach(model: StableDiffusion, options: EmbeddingOptions, *, seed: int, layers: int = 1) -> LearntWord:
    """Add the word of ``options`` to the tokenizer and the text encoder of ``model``.

    Its embeddings begin with a file's, with those of known words, or with numbers drawn by ``seed``.

    Args:
        model: The model; its text encoder's table of embeddings is replaced by one with trained rows.
        options: The word.
        seed: Seed of the run.
        layers: Embeddings of each token, one after the other for all tokens: layer by layer.

    Raises:
        UserError: The tokenizer has the word already, or the file does not fit.
    """
    word = NewWord.of(options)
    count = len(word.names)
    if options.weights is not None:
        width = model.variant.text_width
        rows = read_embedding(options.weights, vectors=count, width=width, layered=layers > 1)
        log.info("the new word begins with the embedding in %s", options.weights.name)
    elif options.init_word is not None:
        ids = model.tokenizer(options.init_word, add_special_tokens=False)["input_ids"]
        # Every layer begins with the same words.
        rows = rows_of_words(model.text_encoder, ids, count).repeat(layers, 1)
    else:
        rows = random_rows(model.text_encoder, count * layers, seed=seed)
    first = add_tokens(model.tokenizer, word.names)
    return LearntWord(word=word, first=first, rows=extend(model.text_encoder, rows, first=first))


@dataclass(frozen=True, kw_only=True, slots=True)
class WordConditioning:
    """Text through a text encoder that knows a new word; prompts name it by its first token alone.

    Attributes:
        clip: The model's own way.
        word: The new word.
    """

    clip: ClipConditioning
    word: NewWord

    @classmethod
    def of(cls, model: StableDiffusion, options: PromptOptions, word: NewWord) -> "WordConditioning":
        """The conditioning of ``model``, whose tokenizer knows ``word``."""
        return cls(clip=ClipConditioning.of(model, options), word=word)

    @property
    def encoder(self) -> nn.Module:
        """The text encoder."""
        encoder: nn.Module = self.clip.encoder
        return encoder

    @property
    def tokenize(self) -> Callable[[str], TokenizedCaption]:
        """Turns a caption, in which the word is written out, into tokens."""
        return self.clip.tokenize

    def encode(self, batch: Batch) -> Tensor:
        """The captions of ``batch``: (B, 75 * chunks + 2, text width)."""
        return self.clip.encode(batch)

    def encode_prompts(self, prompt: str, negative: str) -> tuple[Tensor, Tensor]:
        """A preview's prompt and negative prompt: (1, 77 * chunks, text width) each."""
        return self.clip.encode_prompts(self.word.written_out(prompt), self.word.written_out(negative))


class EmbeddingModule(nn.Module):
    """The trained computation: a batch to one loss an example; gradients go through the U-Net to the new rows."""

    def __init__(self, task: DenoisingTask) -> None:
        super().__init__()
        self.unet = task.model.unet
        self.text_encoder = task.text.encoder
        self._task = task

    def forward(self, batch: Batch) -> Tensor:
        """Weighted losses, (B,)."""
        return self._task.losses(batch, self._task.text.encode(batch))


class EmbeddingTraining:
    """Trains the embeddings of a new word; see :class:`library.training.method.TrainingMethod`.

    Args:
        learnt: The word.
        task: Losses with the model that knows it.
        contents: What a file with a given suffix holds of the trained rows, by name.
        learning_rate: Learning rate.
        gradient_checkpointing: Compute activations again in the backward pass.
        save_precision: dtype of files: "float", "fp16" or "bf16"; None is that of the rows, float32.
        offload_checkpoints: Keep what the U-Net is computed again from in main memory.
    """

    def __init__(
        self,
        learnt: LearntWord,
        task: DenoisingTask,
        contents: Callable[[Tensor, str], dict[str, Tensor]],
        *,
        learning_rate: float,
        gradient_checkpointing: bool,
        save_precision: str | None,
        offload_checkpoints: bool = False,
    ) -> None:
        self.trained: nn.Module = learnt.rows
        self.module: nn.Module = EmbeddingModule(task).eval()
        self._rows = learnt.rows
        self._contents = contents
        self._learning_rate = learning_rate
        self._dtype = save_dtype(save_precision)
        if gradient_checkpointing:
            use_checkpointing(task.model.unet, offload=offload_checkpoints)
            use_text_checkpointing(task.model.text_encoder)

    def param_groups(self) -> list[dict[str, Any]]:
        """The new rows."""
        return [{"params": [self._rows.weight], "lr": self._learning_rate, "name": "embedding"}]

    def after_step(self, step: int) -> dict[str, float]:
        """The size of the new embeddings, which tells early whether a learning rate is too high."""
        return {"norm/avg_embedding_norm": float(self._rows.weight.detach().norm(dim=1).mean())}

    def save(self, path: Path, metadata: Mapping[str, str], *, step: int, epoch: int) -> None:
        """Write the embeddings; a ``.safetensors`` file has the ``metadata``.

        Raises:
            UserError: A value is not finite, or the folder cannot be written to; the former file is kept.
        """
        tensors = self._contents(self._rows.weight.detach(), path.suffix.lower())
        write_tensors(path, tensors, metadata=metadata, dtype=self._dtype)


def train_new_word(
    learnt: LearntWord,
    task: DenoisingTask,
    contents: Callable[[Tensor, str], dict[str, Tensor]],
    options: TextualInversionOptions,
    *,
    script: str,
    inputs: Inputs,
    data: TrainingData,
) -> int:
    """Train a word's embeddings and save them; returns the exit code.

    Args:
        learnt: The word.
        task: Losses with the model that knows it.
        contents: What a file with a given suffix holds of the trained rows, by name.
        options: The script's options.
        script: Name of the script's file.
        inputs: The checked inputs.
        data: The training set.
    """
    method = EmbeddingTraining(
        learnt,
        task,
        contents,
        learning_rate=options.optimizer.learning_rate,
        gradient_checkpointing=options.runtime.gradient_checkpointing,
        save_precision=options.save.save_precision,
        offload_checkpoints=options.runtime.cpu_offload_checkpointing,
    )
    result = Result(
        script=script,
        kind="textual-inversion",
        suffix=f".{options.embedding.save_model_as}",
        tracker_name="textual_inversion",
    )
    return train(method, task, result, options=options, inputs=inputs, data=data)
