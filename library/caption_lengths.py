"""Whether captions that share a batch have equally many tokens, for training without padding. Imports nothing heavy."""

from library.data.records import ImageRecord
from library.data.setup import TrainingData, prepare_data
from library.data.spec import DataSpec
from library.errors import Problem
from library.inputs import Inputs, caption_tokens
from library.models.caption_tokens import CaptionTokens
from library.models.options import PromptOptions


def length_problems(inputs: Inputs, prompts: PromptOptions) -> list[Problem]:
    """What stands against ``--no_token_padding``: captions of different lengths in the batches of the first epoch."""
    tokens = caption_tokens(prompts)
    found = _problems_of(inputs.spec, inputs.records, tokens)
    if inputs.held_out is not None:
        found += _problems_of(inputs.held_out.spec, inputs.held_out.records, tokens)
    return list(dict.fromkeys(found))


def _problems_of(spec: DataSpec, records: tuple[ImageRecord, ...], tokens: CaptionTokens) -> list[Problem]:
    data = prepare_data(spec, records)
    found = []
    for number, dataset in enumerate(spec.datasets):
        lengths = {
            min(len(tokens(caption)), tokens.limit)
            for bucket in data.buckets
            if bucket.dataset == number and bucket.plan.batch_size > 1
            for caption in _captions(data, bucket.plan.examples)
        }
        if len(lengths) > 1:
            found.append(
                Problem(
                    f"--no_token_padding: captions of {min(lengths)} to {max(lengths)} tokens cannot share a batch",
                    dataset.where or "--no_token_padding",
                    "Use batches of 1 (--gradient_accumulation_steps adds them up), or leave --no_token_padding out.",
                )
            )
    return found


def _captions(data: TrainingData, examples: tuple[int, ...]) -> set[str]:
    return {data.caption(example, seed=0, epoch=1, step=0, total_steps=1) for example in examples}
