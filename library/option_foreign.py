"""Options that other programs of this field write or take and that mean nothing here, each with the reason.

They are accepted with one warning, so that configuration files made elsewhere run unchanged. An option that a script
declares itself is never foreign there. :data:`FOREIGN_KEYS` are taken as flags, too, :data:`FILE_KEYS` in files only.
"""

from collections.abc import Iterable, Mapping
from typing import Final

_GUI: Final = "the GUI's own"
_STOP: Final = "only train_db.py stops training the text encoder at a step"
_STEPS: Final = "the length is set by max_train_steps or max_train_epochs"
_LORAPLUS: Final = "LoRA+ is set in network_args"
_SDXL: Final = "SDXL"
_SD3: Final = "Stable Diffusion 3"
_FLUX: Final = "Flux and Chroma"
_LUMINA: Final = "Lumina"
_HUNYUAN: Final = "HunyuanImage"
_ANIMA: Final = "Anima"
_SEVERAL: Final = "larger model families"
_NETWORK: Final = "options of train_network.py"
_WHOLE: Final = "options of scripts that train whole models"
_NEW_WORD: Final = "options of textual inversion"
_CYCLES: Final = "cycles are set by lr_scheduler_num_cycles"


def _table(reasons: dict[str, str]) -> dict[str, str]:
    return {name: reason for reason, names in reasons.items() for name in names.split()}


FOREIGN_KEYS: Final = _table(
    {
        _GUI: "noise_offset_type lowvram train_inpainting",
        _STOP: "stop_text_encoder_training",
        _STEPS: "epoch",
        _LORAPLUS: "loraplus_lr_ratio loraplus_unet_lr_ratio loraplus_text_encoder_lr_ratio",
        _SDXL: (
            "sdxl sdxl_cache_text_encoder_outputs sdxl_no_half_vae learning_rate_te1 learning_rate_te2 block_lr "
            "fused_optimizer_groups"
        ),
        _SD3: (
            "clip_l clip_g t5xxl t5xxl_device t5xxl_dtype t5xxl_max_token_length train_t5xxl save_clip save_t5xxl "
            "apply_lg_attn_mask clip_l_dropout_rate clip_g_dropout_rate t5_dropout_rate pos_emb_random_crop_rate "
            "enable_scaled_pos_embed training_shift num_last_block_to_freeze"
        ),
        _FLUX: (
            "flux ae apply_t5_attn_mask guidance_scale double_blocks_to_swap single_blocks_to_swap "
            "blockwise_fused_optimizers split_mode split_qkv train_blocks bypass_flux_guidance model_type "
            "controlnet_model_name_or_path"
        ),
        _LUMINA: (
            "gemma2 gemma2_max_token_length system_prompt use_flash_attn use_sage_attn sample_batch_size cfg_trunc "
            "renorm_cfg"
        ),
        _HUNYUAN: "byt5 text_encoder text_encoder_cpu vae_chunk_size fp8_scaled fp8_vl",
        _ANIMA: (
            "qwen3 qwen3_max_token_length llm_adapter_path llm_adapter_lr t5_tokenizer_path t5_max_token_length "
            "self_attn_lr cross_attn_lr mlp_lr mod_lr vae_disable_cache split_attn attn_mode "
            "unsloth_offload_checkpointing"
        ),
        _SEVERAL: (
            "cache_text_encoder_outputs_to_disk text_encoder_batch_size "
            "disable_mmap_load_safetensors weighting_scheme logit_mean logit_std mode_scale blocks_to_swap "
            "timestep_sampling sigmoid_scale model_prediction_type discrete_flow_shift"
        ),
    }
)

FILE_KEYS: Final = _table(
    {
        _GUI: (
            "enable_contrastive negative_sampling_method noise_strength contrastive_weight contrastive_warmup_steps "
            "tag_occurrence network_train_text_encoder model_train_type"
        ),
        _CYCLES: "lr_restart_cycles",
        _STOP: "stop_train_text_encoder",
        _NETWORK: (
            "network_module network_dim network_alpha network_args network_dropout network_weights dim_from_weights "
            "network_train_unet_only network_train_text_encoder_only unet_lr text_encoder_lr base_weights "
            "base_weights_multiplier scale_weight_norms no_metadata training_comment"
        ),
        _WHOLE: "learning_rate_te train_text_encoder use_safetensors no_token_padding diffusers_xformers",
        _NEW_WORD: "token_string init_word num_vectors_per_token weights use_object_template use_style_template",
    }
)
"""One file often serves several scripts, or was written for another one."""


def foreign_notice(names: Iterable[str], reasons: Mapping[str, str] = FOREIGN_KEYS) -> list[str]:
    """One line that lists the options which were given and are ignored, by reason; empty when there are none."""
    by_reason: dict[str, list[str]] = {}
    for name in sorted(set(names)):
        by_reason.setdefault(reasons[name], []).append(name)
    if not by_reason:
        return []
    listed = "; ".join(f"{', '.join(found)} ({reason})" for reason, found in by_reason.items())
    return [f"ignored, since they mean nothing here: {listed}"]
