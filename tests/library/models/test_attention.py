import logging
import sys
from types import ModuleType

import pytest
import torch
from torch.nn import functional

from library.models.attention import memory_efficient_attention, use_attention
from library.models.deferred import DeferredModule
from library.models.options import AttentionOptions
from tests.tiny import tiny_parts


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("queries", "keys"), [(50, 37), (16, 10), (7, 77)])
def test_blockwise_attention_equals_sdpa_forwards_and_backwards(queries, keys):
    inputs = [normal(2, 3, n, 8, seed=n).requires_grad_() for n in (queries, keys, keys + 1000)]
    inputs[2] = normal(2, 3, keys, 8, seed=99).requires_grad_()
    upstream = normal(2, 3, queries, 8, seed=5)

    ours = memory_efficient_attention(*inputs, query_chunk=16, key_chunk=10)
    theirs = functional.scaled_dot_product_attention(*inputs)

    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    for mine, expected in zip(
        torch.autograd.grad(ours, inputs, upstream), torch.autograd.grad(theirs, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-5)


def test_blockwise_attention_survives_large_scores():
    query = normal(1, 1, 20, 8) * 100
    torch.testing.assert_close(
        memory_efficient_attention(query, query, query, key_chunk=6),
        functional.scaled_dot_product_attention(query, query, query),
        atol=1e-4,
        rtol=1e-4,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_blockwise_attention_keeps_16_bits(dtype):
    query = (normal(1, 2, 30, 8) * 4).to(dtype).requires_grad_()
    result = memory_efficient_attention(query, query, query, key_chunk=7)
    assert result.dtype == dtype
    expected = functional.scaled_dot_product_attention(query.float(), query.float(), query.float())
    torch.testing.assert_close(result.float(), expected, atol=0.02, rtol=0.02)
    assert torch.autograd.grad(result.sum(), query)[0].dtype == dtype


def test_blockwise_attention_computes_scores_in_full_precision_under_autocast():
    query = normal(1, 2, 30, 8) * 4
    with torch.autocast("cpu", torch.bfloat16):
        result = memory_efficient_attention(query, query, query, key_chunk=7)
    torch.testing.assert_close(result, functional.scaled_dot_product_attention(query, query, query))


def gradients_and_outputs(parts):
    latents = normal(2, 4, 8, 8).requires_grad_()
    context = normal(2, 77, 64, seed=1).requires_grad_()
    prediction = parts.unet(latents, torch.tensor([3, 700]), context).sample
    pixels = parts.vae.decode(latents).sample
    posterior = parts.vae.encode(normal(1, 3, 64, 64, seed=2)).latent_dist.mean
    by_latents, by_context = torch.autograd.grad(
        prediction.square().mean() + pixels.square().mean(), [latents, context]
    )
    return prediction, pixels, posterior, by_latents, by_context


def set_attention(parts, options, dtype=torch.float32):
    return use_attention(parts.unet, DeferredModule.of(parts.vae), options, dtype=dtype)


def processors(module):
    return {type(one).__name__ for one in module.attn_processors.values()}


def test_mem_eff_attn_equals_sdpa_in_unet_and_vae():
    parts = tiny_parts("sd1")
    assert set_attention(parts, AttentionOptions()) == "sdpa"
    expected = gradients_and_outputs(parts)

    assert set_attention(parts, AttentionOptions(mem_eff_attn=True, xformers=True)) == "mem_eff_attn"

    assert processors(parts.unet) == {"MemoryEfficientProcessor"}
    for ours, theirs in zip(gradients_and_outputs(parts), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_mem_eff_attn_works_inside_gradient_checkpointing():
    parts = tiny_parts("sd1")
    set_attention(parts, AttentionOptions(mem_eff_attn=True))
    expected = gradients_and_outputs(parts)

    parts.unet.enable_gradient_checkpointing()
    parts.unet.train()

    for ours, theirs in zip(gradients_and_outputs(parts), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


@pytest.mark.skipif(torch.cuda.is_available(), reason="without CUDA xformers cannot run, which this is about")
def test_xformers_falls_back_to_sdpa_with_one_warning(caplog):
    parts = tiny_parts("sd1")
    with caplog.at_level(logging.WARNING):
        used = set_attention(parts, AttentionOptions(xformers=True))
    assert used == "sdpa"
    assert len(caplog.records) == 1
    assert "CUDA" in caplog.text
    assert processors(parts.unet) == {"AttnProcessor2_0"}


@pytest.fixture
def tried(monkeypatch):
    """A stand-in for xformers on a GPU, which takes heads of up to 256 and no float16; the shapes that it was given."""
    shapes, draw = [], torch.randn

    def attend(query, key, value):
        shapes.append((*query.shape[2:], query.dtype))
        if query.shape[-1] > 256 or query.dtype == torch.float16:
            raise NotImplementedError("No operator found\nfor this head")
        return functional.scaled_dot_product_attention(query, key, value)

    package, ops = ModuleType("xformers"), ModuleType("xformers.ops")
    package.ops, ops.memory_efficient_attention = ops, attend
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "randn", lambda *shape, device, **more: draw(*shape, **more))
    return shapes


def test_xformers_is_tried_as_the_run_needs_it_and_the_vae_can_go_without(tried, caplog):
    parts = tiny_parts("sd1")
    parts.vae.to(torch.bfloat16)
    with caplog.at_level(logging.WARNING):
        assert set_attention(parts, AttentionOptions(xformers=True)) == "xformers"
    assert tried == [(2, 40, torch.float32), (1, 512, torch.bfloat16)]
    assert processors(parts.unet) == {"XFormersAttnProcessor"}
    assert processors(parts.vae) == {"AttnProcessor2_0"}
    (record,) = (record for record in caplog.records if record.name == "library.models.attention")
    assert "the VAE uses PyTorch's scaled dot product attention (No operator found)" in record.getMessage()


def test_xformers_without_a_kernel_for_the_precision_is_left_out(tried, caplog):
    parts = tiny_parts("sd1")
    with caplog.at_level(logging.WARNING):
        assert set_attention(parts, AttentionOptions(xformers=True), torch.float16) == "sdpa"
    assert len(caplog.records) == 1
    assert processors(parts.unet) == processors(parts.vae) == {"AttnProcessor2_0"}
