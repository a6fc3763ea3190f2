"""Train a new word with embeddings for each layer of the U-Net (extended textual inversion, XTI or P+).

Usage: ``python train_textual_inversion_XTI.py --dataset_config x.toml --token_string zwx --init_word dog ...``, or with
``accelerate launch``; ``--help`` lists every option.
"""

from typing import TYPE_CHECKING

from library.errors import Problem, run_script
from library.models.embedding_files import LAYERS, layered_tensors
from library.new_words import Rewording, check_word, word_support
from library.runtime import start_runtime
from library.script_options import read_options
from library.textual_inversion_options import TextualInversionOptions as Options
from library.textual_inversion_options import named

if TYPE_CHECKING:
    from library.inputs import Inputs


def main(argv: list[str]) -> int:
    """Check everything quickly, then train; returns the exit code."""
    options = named(
        read_options(Options, argv, prog="train_textual_inversion_XTI.py", description=__doc__.splitlines()[0])
    )
    # Looking at data needs NumPy; --help and mistakes in options do not wait for it.
    from library.inspection import inspect_data
    from library.new_word_checks import new_word_dry_run, new_word_inputs

    rewording = Rewording.of(options.embedding)
    inspected = inspect_data(options, support=word_support(options.embedding), rewording=rewording)
    if inspected is not None:
        return inspected
    inputs = new_word_inputs(options, rewording, more=layered_problems(options))
    if options.check.dry_run:
        return new_word_dry_run(options, inputs, rewording, layers=len(LAYERS))
    return train(options, inputs, rewording)


def layered_problems(options: Options) -> list[Problem]:
    """What is wrong with the word, and what cannot be done layer by layer."""
    found = check_word(options.embedding, layered=True)
    if options.prompts.weighted_captions:
        found.append(
            Problem(
                "--weighted_captions is not available with embeddings for each layer",
                "--weighted_captions",
                "Leave it out, or use train_textual_inversion.py.",
            )
        )
    if options.embedding.save_model_as == "bin":
        found.append(
            Problem(
                "a .bin file holds one embedding, and here is one for each layer",
                "--save_model_as bin",
                "Use --save_model_as safetensors.",
            )
        )
    return found


def train(options: Options, inputs: "Inputs", rewording: Rewording) -> int:
    """Train the word; everything heavy is imported from here on."""
    from library.data.setup import prepare_data
    from library.layered_conditioning import LayeredConditioning, give_layers_their_text
    from library.models.attention import use_attention
    from library.models.fp8 import narrow_base
    from library.models.stable_diffusion import load_stable_diffusion
    from library.task import DenoisingTask
    from library.textual_inversion import teach, train_new_word
    from library.training.rates import try_rates

    # Every step's gradient reaches every row, if only as a zero.
    runtime = start_runtime(options.runtime, find_unused_parameters=False, seed=inputs.seed)
    try_rates(options, runtime.device)
    data = prepare_data(inputs.spec, inputs.records, reword=rewording)

    # The model: frozen, in the precision of the run. The new word's embeddings stay in fp32.
    model = load_stable_diffusion(options.model, options.prompts, dtype=runtime.weight_dtype)
    narrow_base(model, options.runtime, dtype=runtime.weight_dtype)
    use_attention(model.unet, model.deferred_vae, options.attention, dtype=runtime.weight_dtype)
    give_layers_their_text(model.unet)
    learnt = teach(model, options.embedding, seed=runtime.seed, layers=len(LAYERS))

    task = DenoisingTask.of(
        model,
        LayeredConditioning.of(model, options.prompts, learnt),
        runtime,
        noise=options.noise,
        loss=options.loss,
        vae_batch_size=options.cache.vae_batch_size,
    )
    return train_new_word(
        learnt,
        task,
        lambda rows, suffix: layered_tensors(rows),
        options,
        script="train_textual_inversion_XTI.py",
        inputs=inputs,
        data=data,
    )


if __name__ == "__main__":
    run_script(main)
