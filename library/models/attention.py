"""Which attention the U-Net and the VAE compute: PyTorch's own, xformers', or one that needs least memory."""

import logging
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, Final

import torch
from torch import Tensor

from library.models.deferred import DeferredModule
from library.models.options import AttentionOptions

_LOG = logging.getLogger(__name__)
_QUERY_CHUNK: Final = 1024
_KEY_CHUNK: Final = 1024


def use_attention(unet: Any, vae: DeferredModule, options: AttentionOptions, *, dtype: torch.dtype) -> str:
    """Set the attention of the U-Net and the VAE.

    ``--mem_eff_attn`` wins over ``--xformers``, which wins over ``--sdpa``; without any of them it is SDPA. Where
    xformers cannot run, SDPA takes its place and one warning says why.

    Args:
        unet: A ``UNet2DConditionModel``.
        vae: An ``AutoencoderKL``, which may take its weights later.
        options: What was asked for.
        dtype: What the U-Net computes attention in.

    Returns:
        What the U-Net uses: ``"mem_eff_attn"``, ``"xformers"`` or ``"sdpa"``.
    """
    from diffusers.models.attention_processor import AttnProcessor2_0, XFormersAttnProcessor

    name, of_unet, of_vae = "sdpa", AttnProcessor2_0, AttnProcessor2_0
    if options.mem_eff_attn:
        name, of_unet, of_vae = "mem_eff_attn", MemoryEfficientProcessor, MemoryEfficientProcessor
    elif options.xformers:
        if fault := _fault(lambda: _attend_as_unet(dtype)):
            _LOG.warning(
                "--xformers cannot be used (%s); PyTorch's scaled dot product attention is used instead", fault
            )
        else:
            name, of_unet, of_vae = "xformers", XFormersAttnProcessor, XFormersAttnProcessor
            if fault := _fault(lambda: _attend_as_vae(vae.dtype)):
                of_vae = AttnProcessor2_0
                _LOG.warning(
                    "--xformers is used for the U-Net alone; the VAE uses PyTorch's scaled dot product attention (%s)",
                    fault,
                )
    unet.set_attn_processor(of_unet())
    vae.structure.set_attn_processor(of_vae())
    return name


def _fault(attend: Callable[[], None]) -> str | None:
    """Why xformers does not compute ``attend`` here, or None: it must import, have a GPU, and run."""
    if not torch.cuda.is_available():
        return "it needs a CUDA device"
    try:
        attend()
    except ImportError:
        return "it is not installed"
    except (RuntimeError, NotImplementedError, ValueError, OSError) as error:
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    return None


def _attend_as_unet(dtype: torch.dtype) -> None:
    import xformers.ops

    query = torch.randn(1, 16, 2, 40, device="cuda", dtype=dtype, requires_grad=True)
    xformers.ops.memory_efficient_attention(query, query, query).sum().backward()


def _attend_as_vae(dtype: torch.dtype) -> None:
    """One head, larger than some kernels take; the VAE is not trained."""
    import xformers.ops

    query = torch.randn(1, 64, 1, 512, device="cuda", dtype=dtype)
    xformers.ops.memory_efficient_attention(query, query, query)


def memory_efficient_attention(
    query: Tensor, key: Tensor, value: Tensor, *, query_chunk: int = _QUERY_CHUNK, key_chunk: int = _KEY_CHUNK
) -> Tensor:
    """Softmax attention that never holds the whole score matrix, forwards or backwards.

    Scores are made a block at a time with a running maximum and sum, and made again for the gradient (Rabe and Staats
    2021, arXiv:2112.05682; Dao et al. 2022, arXiv:2205.14135).

    Args:
        query: (B, heads, N, D).
        key: (B, heads, M, D).
        value: (B, heads, M, D).
        query_chunk: Queries in a block.
        key_chunk: Keys in a block.

    Returns:
        (B, heads, N, D), scores scaled by 1/sqrt(D).
    """
    result: Tensor = _BlockwiseAttention.apply(query, key, value, query_chunk, key_chunk)  # type: ignore[no-untyped-call]
    return result


class _BlockwiseAttention(torch.autograd.Function):
    """Attention by blocks of queries and keys; keeps the log of the softmax sums in place of the scores."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, query_chunk: int, key_chunk: int) -> Tensor:
        blocks = list(zip(torch.split(key, key_chunk, 2), torch.split(value, key_chunk, 2), strict=True))
        with torch.autocast(query.device.type, enabled=False):
            rows = [_attend(queries, blocks) for queries in torch.split(query, query_chunk, 2)]
        result = torch.cat([output for output, _ in rows], 2)
        ctx.save_for_backward(query, key, value, result, torch.cat([log_sum for _, log_sum in rows], 2))
        ctx.chunks = query_chunk, key_chunk
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, result, log_sum = ctx.saved_tensors
        (gradient,) = gradients
        query_chunk, key_chunk = ctx.chunks
        scale = query.shape[-1] ** -0.5
        by_query, by_key, by_value = (torch.zeros_like(t, dtype=torch.float32) for t in (query, key, value))
        # The softmax's own part of the gradient is the same for every key of a query.
        shared = (gradient.float() * result.float()).sum(-1, keepdim=True)
        with torch.autocast(query.device.type, enabled=False):
            for first, start in product(range(0, query.shape[2], query_chunk), range(0, key.shape[2], key_chunk)):
                rows, columns = slice(first, first + query_chunk), slice(start, start + key_chunk)
                queries, keys, upstream = query[:, :, rows], key[:, :, columns], gradient[:, :, rows]
                weights = torch.exp(_scores(queries, keys, scale) - log_sum[:, :, rows])
                by_value[:, :, columns] += weights.to(upstream.dtype).mT @ upstream
                by_weights = (upstream @ value[:, :, columns].mT).float()
                by_scores = (weights * (by_weights - shared[:, :, rows]) * scale).to(query.dtype)
                by_query[:, :, rows] += by_scores @ keys
                by_key[:, :, columns] += by_scores.mT @ queries
        return by_query.to(query.dtype), by_key.to(key.dtype), by_value.to(value.dtype), None, None


def _attend(queries: Tensor, blocks: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Output of some queries over all blocks of keys and values, and the log of the sum of their exponentials."""
    scale = queries.shape[-1] ** -0.5
    maximum = queries.new_full((*queries.shape[:3], 1), -torch.inf, dtype=torch.float32)
    total = torch.zeros_like(maximum)
    output = torch.zeros(queries.shape, dtype=torch.float32, device=queries.device)
    for keys, values in blocks:
        scores = _scores(queries, keys, scale)
        new_maximum = torch.maximum(maximum, scores.amax(-1, keepdim=True))
        weights = torch.exp(scores - new_maximum)
        shrink = torch.exp(maximum - new_maximum)
        total = total * shrink + weights.sum(-1, keepdim=True)
        output = output * shrink + weights.to(values.dtype) @ values
        maximum = new_maximum
    return (output / total).to(queries.dtype), maximum + total.log()


def _scores(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    # In 32 bits whatever the inputs are: a softmax of scores rounded to 16 bits is visibly off.
    return (queries.float() * scale) @ keys.float().mT


class MemoryEfficientProcessor:
    """:func:`memory_efficient_attention` as a processor of diffusers' ``Attention``."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Attend from ``hidden_states`` to ``encoder_hidden_states``, or to itself.

        Args:
            attn: The ``Attention`` module.
            hidden_states: (B, N, C), or an image (B, C, H, W) in the VAE.
            encoder_hidden_states: (B, M, C') or None.
            attention_mask: Always None in Stable Diffusion.
            temb: Not used by Stable Diffusion's attention.

        Returns:
            The shape of ``hidden_states``.
        """
        assert attention_mask is None, "Stable Diffusion attends without a mask"
        tokens = hidden_states.flatten(2).mT if hidden_states.ndim == 4 else hidden_states
        if attn.group_norm is not None:
            tokens = attn.group_norm(tokens.mT).mT
        context = tokens if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            projected.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for projected in (attn.to_q(tokens), attn.to_k(context), attn.to_v(context))
        )
        result = memory_efficient_attention(query, key, value).transpose(1, 2).flatten(2)
        for layer in attn.to_out:
            result = layer(result)
        if hidden_states.ndim == 4:
            result = result.mT.reshape(hidden_states.shape)
        if attn.residual_connection:
            result = result + hidden_states
        output: Tensor = result / attn.rescale_output_factor
        return output
