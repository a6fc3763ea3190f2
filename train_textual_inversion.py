"""Train a new word for Stable Diffusion (textual inversion).

Usage: ``python train_textual_inversion.py --dataset_config x.toml --token_string zwx --init_word dog ...``, or with
``accelerate launch``; ``--help`` lists every option.
"""

import logging
from typing import TYPE_CHECKING

from library.errors import run_script
from library.inputs import check_inputs
from library.models.embedding_files import embedding_tensors
from library.new_words import Rewording, check_captions, check_word, word_notices
from library.options import parse_options
from library.runtime import set_up_logging, start_runtime
from library.textual_inversion_options import TextualInversionOptions as Options
from library.textual_inversion_options import named

if TYPE_CHECKING:
    from library.inputs import Inputs

log = logging.getLogger("train_textual_inversion")


def main(argv: list[str]) -> int:
    """Check everything quickly, then train; returns the exit code."""
    notices: list[str] = []
    options = named(
        parse_options(
            Options,
            argv,
            prog="train_textual_inversion.py",
            description=__doc__.splitlines()[0],
            announce=notices.append,
        )
    )
    set_up_logging(options.console)
    for notice in notices:
        log.warning(notice)
    # Looking at data needs NumPy; --help and mistakes in options do not wait for it.
    from library.data.findings import warnings_of
    from library.data.support import TEXTUAL_INVERSION
    from library.inspection import dry_run, inspect_data
    from library.models.size import text_width_of_model

    rewording = Rewording.of(options.embedding)
    inspected = inspect_data(options, support=TEXTUAL_INVERSION, rewording=rewording)
    if inspected is not None:
        return inspected
    inputs = check_inputs(options, more=check_word(options.embedding, layered=False), support=TEXTUAL_INVERSION)
    for finding in warnings_of(check_captions(rewording, inputs.spec, inputs.records)):
        log.warning("%s", finding)
    for notice in word_notices(options.embedding):
        log.warning(notice)
    if options.check.dry_run:
        width = text_width_of_model(options.model.pretrained_model_name_or_path)
        return dry_run(
            options,
            inputs,
            suffix=f".{options.embedding.save_model_as}",
            trained_values=None if width is None else options.embedding.num_vectors_per_token * width,
            rewording=rewording,
        )
    return train(options, inputs, rewording)


def train(options: Options, inputs: "Inputs", rewording: Rewording) -> int:
    """Train the word; everything heavy is imported from here on."""
    from library.data.setup import prepare_data
    from library.models.attention import use_attention
    from library.models.fp8 import narrow_base
    from library.models.stable_diffusion import load_stable_diffusion
    from library.results import Result
    from library.run import train as run
    from library.task import DenoisingTask
    from library.textual_inversion import EmbeddingTraining, WordConditioning, teach
    from library.training.rates import try_rates

    # Every step's gradient reaches every row, if only as a zero.
    runtime = start_runtime(options.runtime, find_unused_parameters=False, seed=inputs.seed)
    try_rates(options, runtime.device)
    data = prepare_data(inputs.spec, inputs.records, reword=rewording)

    # The model: frozen, in the precision of the run. The new word's embeddings stay in fp32.
    model = load_stable_diffusion(options.model, options.prompts, dtype=runtime.weight_dtype)
    narrow_base(model, options.runtime, dtype=runtime.weight_dtype)
    use_attention(model.unet, model.vae, options.attention)
    learnt = teach(model, options.embedding, seed=runtime.seed)

    task = DenoisingTask.of(
        model,
        WordConditioning.of(model, options.prompts, learnt.word),
        runtime,
        noise=options.noise,
        loss=options.loss,
        vae_batch_size=options.cache.vae_batch_size,
    )
    method = EmbeddingTraining(
        learnt,
        task,
        lambda rows, suffix: embedding_tensors(rows, token=learnt.word.token, suffix=suffix),
        learning_rate=options.optimizer.learning_rate,
        gradient_checkpointing=options.runtime.gradient_checkpointing,
        save_precision=options.save.save_precision,
        offload_checkpoints=options.runtime.cpu_offload_checkpointing,
    )
    result = Result(
        script="train_textual_inversion.py",
        kind="textual-inversion",
        suffix=f".{options.embedding.save_model_as}",
        tracker_name="textual_inversion",
    )
    return run(method, task, result, options=options, inputs=inputs, data=data)


if __name__ == "__main__":
    run_script(main)
