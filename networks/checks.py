"""What is wrong with the arguments and files of our own networks, told before anything heavy is imported."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Final

from library.errors import Problem, UserError, problems_of
from networks.adapter_files import (
    Shape,
    is_pointwise_shape,
    kind_of,
    lora_dims,
    oft_blocks,
    require_lora,
    require_oft,
    shapes_in_file,
)
from networks.arguments import split_arguments
from networks.lora_settings import ARGUMENTS_OF, DEFAULT_DIM, DYLORA, RANK_ARGUMENTS, read_settings
from networks.oft_settings import DEFAULT_BLOCKS, OFT, TARGETS, read_oft_settings
from networks.options import NetworkOptions

OWN: Final = (*ARGUMENTS_OF, OFT)
"""Import paths of the network modules of this project."""
LYCORIS: Final = "lycoris"
_NOT_FROM_LYCORIS: Final = {
    "dylora": (
        "LyCORIS's dylora previews with random ranks and cannot read back what it saved",
        f"Use --network_module {DYLORA} with --network_args unit=4.",
    ),
    "tlora": (
        "LyCORIS's tlora needs a trainer that tells it the timestep, which is not done here",
        "Use another algorithm, for example algo=lora.",
    ),
}


def own_problems(options: NetworkOptions) -> list[Problem]:
    """What is wrong with the network's options and its files, if it is one of :data:`OWN`."""
    if options.network_module in ARGUMENTS_OF:
        return problems_of([partial(_check_low_rank_settings, options)]) + _file_problems(options, _check_lora_weights)
    if options.network_module == OFT:
        return (
            _oft_option_problems(options)
            + problems_of([partial(_check_oft_settings, options)])
            + _file_problems(options, _check_oft_weights)
        )
    return []


def lycoris_problems(options: NetworkOptions) -> list[Problem]:
    """Algorithms of LyCORIS that would train something else than they promise."""
    algorithm = str(split_arguments(options.network_args).get("algo")).lower()
    package = (options.network_module or "").split(".")[0]
    if package != LYCORIS or algorithm not in _NOT_FROM_LYCORIS:
        return []
    what, remedy = _NOT_FROM_LYCORIS[algorithm]
    return [Problem(what, "--network_args", remedy)]


def base_weight_problems(options: NetworkOptions) -> list[Problem]:
    """What is wrong with the files of ``--base_weights``, which are merged whatever network is trained."""
    return problems_of(partial(_check_base_weights, path) for path in options.base_weights)


def _file_problems(options: NetworkOptions, check: Callable[[Path, NetworkOptions], object]) -> list[Problem]:
    return (
        problems_of([partial(check, options.network_weights, options)]) if options.network_weights is not None else []
    )


def _arguments(options: NetworkOptions, of_the_file: tuple[str, ...]) -> dict[str, object]:
    """``--network_args`` without those that the file decides."""
    arguments = split_arguments(options.network_args)
    decided = of_the_file if options.dim_from_weights else ()
    return {name: value for name, value in arguments.items() if name not in decided}


def _check_low_rank_settings(options: NetworkOptions) -> None:
    assert options.network_module is not None
    ranks: set[int] | None = None
    if options.dim_from_weights and options.network_weights is not None and options.network_weights.is_file():
        ranks = set(lora_dims(_shapes(options.network_weights)).values())
    read_settings(
        options.network_dim,
        options.network_alpha,
        options.network_dropout,
        _arguments(options, RANK_ARGUMENTS),
        module=options.network_module,
        ranks=ranks,
    )


def _check_oft_settings(options: NetworkOptions) -> None:
    read_oft_settings(options.network_dim, options.network_alpha, options.network_dropout, _arguments(options, TARGETS))


def _oft_option_problems(options: NetworkOptions) -> list[Problem]:
    found = []
    if options.network_train_text_encoder_only:
        found.append(
            Problem(
                f"{OFT} has no part for the text encoder",
                "--network_train_text_encoder_only",
                "Leave it out, or use networks.lora.",
            )
        )
    if options.scale_weight_norms:
        found.append(
            Problem(
                f"the rotations of {OFT} cannot be scaled down",
                "--scale_weight_norms",
                "Leave it out: --network_alpha limits them.",
            )
        )
    return found


def _shapes(path: Path) -> dict[str, Shape]:
    """Names and shapes in a file, empty where only loading it can tell."""
    try:
        return shapes_in_file(path)
    except UserError:
        return {}


def _check_base_weights(path: Path) -> None:
    shapes = shapes_in_file(path)
    if shapes and kind_of(shapes) != "OFT":
        require_lora(shapes, where=str(path))


def _check_lora_weights(path: Path, options: NetworkOptions) -> None:
    """Refuse a file that is no LoRA, or whose rank the new network will not have."""
    shapes = shapes_in_file(path)
    if shapes:
        require_lora(shapes, where=str(path))
    if not options.dim_from_weights and "block_dims" not in split_arguments(options.network_args):
        _check_size(path, "rank", _base_dims(shapes), options.network_dim or DEFAULT_DIM)


def _check_oft_weights(path: Path, options: NetworkOptions) -> None:
    """Refuse a file that is no OFT, or whose number of blocks the new network will not have."""
    shapes = shapes_in_file(path)
    if shapes:
        require_oft(shapes, where=str(path))
    if not options.dim_from_weights:
        _check_size(path, "number of blocks", list(oft_blocks(shapes).values()), options.network_dim or DEFAULT_BLOCKS)


def _check_size(path: Path, what: str, in_file: list[int], own: int) -> None:
    if in_file and own not in in_file:
        given = max(in_file, key=in_file.count)
        raise UserError(
            f"the network file has {what} {given}, the new network {what} {own}",
            where=f"--network_weights {path}",
            remedy=f"Add --dim_from_weights to take the {what} of the file, or set --network_dim {given}.",
        )


def _base_dims(shapes: Mapping[str, Shape]) -> list[int]:
    """Ranks of the linear layers and 1x1 convolutions in a LoRA file."""
    return list(lora_dims({name: shape for name, shape in shapes.items() if is_pointwise_shape(shape)}).values())
