"""Arguments of a LoRA network."""

import pytest

from library.errors import UserError
from networks.lora_settings import Dropouts, Rank, read_settings


def test_defaults():
    settings = read_settings(None, 1.0, None, {"dropout": None})
    assert settings.base == Rank(4, 1.0)
    assert settings.conv is settings.blocks is settings.conv_blocks is settings.block_lr is None
    assert settings.dropouts == Dropouts()
    assert not settings.targets_convolutions


@pytest.mark.parametrize("alpha", [0, None])
def test_no_alpha_means_the_rank(alpha):
    assert read_settings(16, alpha, None, {}).base == Rank(16, 16.0)
    blocks = read_settings(16, alpha, None, {"block_dims": ",".join(["8"] * 25)}).blocks
    assert set(blocks) == {Rank(8, 8.0)}


def test_convolution_ranks():
    assert read_settings(4, 1.0, None, {"conv_dim": "8"}).conv == Rank(8, 1.0)
    assert read_settings(4, 1.0, None, {"conv_dim": "8", "conv_alpha": "2.5"}).conv == Rank(8, 2.5)
    assert read_settings(4, 1.0, None, {"conv_dim": "8", "conv_alpha": "0"}).conv == Rank(8, 8.0)
    assert read_settings(4, 1.0, None, {"conv_dim": "0", "conv_alpha": "1"}).conv is None


def test_block_ranks():
    dims, alphas = range(25), [0.5] * 25
    settings = read_settings(
        4, 1.0, None, {"block_dims": ",".join(map(str, dims)), "block_alphas": ",".join(map(str, alphas))}
    )
    assert settings.blocks == tuple(Rank(dim, 0.5) for dim in dims)
    assert settings.conv_blocks is None
    with_conv = read_settings(4, 1.0, None, {"block_dims": ",".join(["2"] * 25), "conv_dim": "3", "conv_alpha": "2"})
    assert set(with_conv.conv_blocks) == {Rank(3, 2.0)}
    only_alphas = read_settings(4, 1.0, None, {"block_alphas": ",".join(["2"] * 25)})
    assert set(only_alphas.blocks) == {Rank(4, 2.0)}


def test_blocks_without_learning_rate_get_no_rank():
    settings = read_settings(4, 1.0, None, {"mid_lr_weight": "0", "conv_dim": "2"})
    assert settings.blocks[12].dim == settings.conv_blocks[12].dim == 0
    assert settings.blocks[11] == Rank(4, 1.0)


def test_loraplus_specific_ratio_wins():
    settings = read_settings(4, 1.0, None, {"loraplus_lr_ratio": "16", "loraplus_text_encoder_lr_ratio": "4"})
    assert (settings.loraplus_unet, settings.loraplus_text_encoder) == (16.0, 4.0)


def test_all_problems_are_reported_together():
    arguments = {
        "conv_dmi": "4",
        "conv_alpha": "1",
        "rank_dropout": "1.5",
        "module_dropout": "x",
        "block_dims": "1,2",
        "down_lr_weight": "foo",
        "loraplus_lr_ratio": "0",
    }
    with pytest.raises(UserError) as caught:
        read_settings(4, 1.0, 0.1, {**arguments, "dropout": "0.2"})
    text = str(caught.value)
    assert len(caught.value.problems) == 8
    for part in (
        "no argument 'conv_dmi'",
        "Did you mean conv_dim?",
        "conv_alpha has no ranks",
        "rank_dropout=1.5",
        "module_dropout=x",
        "it has 2 values",
        "down_lr_weight=foo",
        "loraplus_lr_ratio=0",
        "contradicts --network_dropout=0.1",
    ):
        assert part in text


@pytest.mark.parametrize(("dim", "alpha", "dropout"), [(0, 1.0, None), (4, -1.0, None), (4, 1.0, 1.0)])
def test_impossible_values(dim, alpha, dropout):
    with pytest.raises(UserError, match="is not possible"):
        read_settings(dim, alpha, dropout, {})
