"""What the tests of saving share: train a little, save, load, compare."""

import torch

from library.models.formats import suffix_of
from library.models.model_saving import save_model
from library.models.options import ModelOptions, PromptOptions
from library.models.stable_diffusion import load_stable_diffusion

FORMATS = ["ckpt", "safetensors", "diffusers", "diffusers_safetensors"]
FOLDERS = FORMATS[2:]
KINDS = ["sd1", "sd2", "sd2_v"]
METADATA = {"modelspec.title": "T", "ss_steps": "3"}
PARTS = ("unet", "vae", "text_encoder")


def load(source, kind="sd1", *, vae=None, **dtypes):
    options = ModelOptions(
        pretrained_model_name_or_path=str(source),
        v2=kind != "sd1",
        v_parameterization=kind == "sd2_v",
        vae=vae and str(vae),
    )
    return load_stable_diffusion(options, PromptOptions(), **dtypes)


def trained(model):
    """The model with other weights in U-Net and text encoder, as after training."""
    generator = torch.Generator().manual_seed(5)
    for module in (model.unet, model.text_encoder):
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype), alpha=0.01)
    return model


def save(folder, model, format, *, dtype=None, step=3, epoch=2):
    path = folder / f"result{suffix_of(format)}"
    save_model(path, model, format=format, dtype=dtype, metadata=METADATA, step=step, epoch=epoch)
    return path


def weights(model):
    return {f"{part}.{name}": tensor for part in PARTS for name, tensor in getattr(model, part).state_dict().items()}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert not [name for name in expected if not torch.equal(found[name], expected[name])]
