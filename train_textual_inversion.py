"""Train a new word for Stable Diffusion (textual inversion).

Usage: ``python train_textual_inversion.py --dataset_config x.toml --token_string zwx --init_word dog ...``, or with
``accelerate launch``; ``--help`` lists every option.
"""

from typing import TYPE_CHECKING

from library.errors import run_script
from library.models.embedding_files import embedding_tensors
from library.new_words import Rewording, check_word, word_support
from library.runtime import start_runtime
from library.script_options import read_options
from library.textual_inversion_options import TextualInversionOptions as Options
from library.textual_inversion_options import named

if TYPE_CHECKING:
    from library.inputs import Inputs


def main(argv: list[str]) -> int:
    """Check everything quickly, then train; returns the exit code."""
    options = named(read_options(Options, argv, prog="train_textual_inversion.py", description=__doc__.splitlines()[0]))
    # Looking at data needs NumPy; --help and mistakes in options do not wait for it.
    from library.inspection import inspect_data
    from library.new_word_checks import new_word_dry_run, new_word_inputs

    rewording = Rewording.of(options.embedding)
    inspected = inspect_data(options, support=word_support(options.embedding), rewording=rewording)
    if inspected is not None:
        return inspected
    inputs = new_word_inputs(options, rewording, more=check_word(options.embedding, layered=False))
    if options.check.dry_run:
        return new_word_dry_run(options, inputs, rewording)
    return train(options, inputs, rewording)


def train(options: Options, inputs: "Inputs", rewording: Rewording) -> int:
    """Train the word; everything heavy is imported from here on."""
    from library.data.setup import prepare_data
    from library.models.attention import use_attention
    from library.models.fp8 import narrow_base
    from library.models.stable_diffusion import load_stable_diffusion
    from library.task import DenoisingTask
    from library.textual_inversion import WordConditioning, teach, train_new_word
    from library.training.rates import try_rates

    # Every step's gradient reaches every row, if only as a zero.
    runtime = start_runtime(options.runtime, find_unused_parameters=False, seed=inputs.seed)
    try_rates(options, runtime.device)
    data = prepare_data(inputs.spec, inputs.records, reword=rewording)

    # The model: frozen, in the precision of the run. The new word's embeddings stay in fp32.
    model = load_stable_diffusion(options.model, options.prompts, dtype=runtime.weight_dtype)
    narrow_base(model, options.runtime, dtype=runtime.weight_dtype)
    use_attention(model.unet, model.deferred_vae, options.attention, dtype=runtime.weight_dtype)
    learnt = teach(model, options.embedding, seed=runtime.seed)

    task = DenoisingTask.of(
        model,
        WordConditioning.of(model, options.prompts, learnt.word),
        runtime,
        noise=options.noise,
        loss=options.loss,
        vae_batch_size=options.cache.vae_batch_size,
    )
    return train_new_word(
        learnt,
        task,
        lambda rows, suffix: embedding_tensors(rows, token=learnt.word.token, suffix=suffix),
        options,
        script="train_textual_inversion.py",
        inputs=inputs,
        data=data,
    )


if __name__ == "__main__":
    run_script(main)
