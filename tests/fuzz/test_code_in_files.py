"""Files that would run code when they are loaded: refused with advice by everything that takes such a file."""

import importlib
import io
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from library.errors import UserError
from tests.fuzz.strategies import Call, Name, pickled, stored_tensor, torch_file
from tests.fuzz.watch import Escaped
from tests.scripts.methods import SCRIPTS, method_arguments
from tests.scripts.runs import run_script, write_images
from tests.tiny import tiny_sd

NAMES = {
    "model": ("model.diffusion_model.input_blocks.0.0.weight", "cond_stage_model.transformer.text_model.a.weight"),
    "vae": ("encoder.conv_in.weight", "decoder.conv_in.weight"),
    "network": ("a.lora_down.weight", "a.lora_up.weight", "a.alpha"),
    "embedding": ("emb_params",),
    "blip": ("visual_encoder.cls_token", "text_decoder.cls.predictions.bias"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # With all 16 cross-attention blocks, which XTI asks for.
    return tiny_sd(tmp_path_factory.mktemp("models") / "sd1", "sd1")


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """A file that is there once the code in a file has run."""
    return tmp_path / "canary"


def evil(path: Path, kind: str, canary: Path) -> Path:
    """A file whose names are those of a sound one; loading it as pickles are loaded opens ``canary``."""
    call = Call(Name("builtins", "open"), (str(canary), "w"))
    tensor = stored_tensor("0", 1, (1,), (1,))
    path.write_bytes(torch_file({**dict.fromkeys(NAMES[kind], tensor), "more": call}, {"0": bytes(4)}))
    return path


def refusal(run: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        run()
    return str(caught.value)


def assert_refused(message: str, canary: Path) -> None:
    assert "could run code" in message
    assert "Convert it to .safetensors" in message
    assert not canary.exists()


def test_the_code_would_run(canary: Path) -> None:
    """Else nothing is shown by its not having run."""
    pickle.loads(pickled({"more": Call(Name("builtins", "open"), (str(canary), "w"))}))
    assert canary.exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_base_model(script: str, model: Path, canary: Path, tmp_path: Path) -> None:
    given = method_arguments(script, evil(tmp_path / "model.ckpt", "model", canary), tmp_path / "data")
    assert_refused(refusal(lambda: run_script(script, tmp_path / "out", *given)), canary)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_vae(script: str, model: Path, canary: Path, tmp_path: Path) -> None:
    given = method_arguments(script, model, tmp_path / "data")
    vae = evil(tmp_path / "vae.pt", "vae", canary)
    assert_refused(refusal(lambda: run_script(script, tmp_path / "out", *given, f"--vae={vae}")), canary)


def test_a_network_to_go_on_with(model: Path, canary: Path, tmp_path: Path) -> None:
    given = method_arguments("train_network", model, tmp_path / "data")
    weights = evil(tmp_path / "network.pt", "network", canary)
    run = lambda flag: run_script("train_network", tmp_path / "out", *given, f"--{flag}={weights}")  # noqa: E731
    for flag in ("network_weights", "base_weights"):
        assert_refused(refusal(lambda flag=flag: run(flag)), canary)  # type: ignore[misc]


@pytest.mark.parametrize("script", ["train_textual_inversion", "train_textual_inversion_XTI"])
@pytest.mark.parametrize("suffix", [".pt", ".bin"])
def test_an_embedding_to_go_on_with(script: str, suffix: str, model: Path, canary: Path, tmp_path: Path) -> None:
    given = method_arguments(script, model, tmp_path / "data")
    weights = evil(tmp_path / f"embedding{suffix}", "embedding", canary)
    assert_refused(refusal(lambda: run_script(script, tmp_path / "out", *given, f"--weights={weights}")), canary)


def test_a_part_of_a_model_folder(canary: Path, tmp_path: Path) -> None:
    folder = tiny_sd(tmp_path / "sd1", "sd1", layers_per_block=1)
    (folder / "unet/diffusion_pytorch_model.safetensors").unlink()
    evil(folder / "unet/diffusion_pytorch_model.bin", "vae", canary)
    given = method_arguments("train_network", folder, tmp_path / "data")
    assert_refused(refusal(lambda: run_script("train_network", tmp_path / "out", *given)), canary)


@pytest.mark.parametrize(
    ("tool", "kind", "arguments"),
    [
        ("tools.convert_diffusers20_original_sd", "model", ["{file}", "{folder}/converted.safetensors"]),
        ("finetune.make_captions", "blip", ["{folder}/images", "--caption_weights={file}"]),
        (
            "finetune.prepare_buckets_latents",
            "vae",
            ["{folder}/images", "{folder}/in.json", "{folder}/out.json", "{file}"],
        ),
        (
            "tools.cache_latents",
            "vae",
            [
                *("--vae={file}", "--pretrained_model_name_or_path={model}", "--resolution=64"),
                *("--train_data_dir={folder}/train", "--caption_extension=.txt"),
            ],
        ),
    ],
)
def test_a_tool(tool: str, kind: str, arguments: list[str], model: Path, canary: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "images", 1)
    write_images(tmp_path / "train" / "1_a", 1)
    (tmp_path / "in.json").write_text('{"00": {"caption": "a"}}')
    places = {"file": evil(tmp_path / "x.pth", kind, canary), "folder": tmp_path, "model": model}
    main = importlib.import_module(tool).main
    assert_refused(refusal(lambda: main([word.format(**places) for word in arguments])), canary)


def test_objects_in_latents(canary: Path, tmp_path: Path) -> None:
    """An array of objects is a pickle within the archive."""
    from library.data.latent_files import read_latents

    class Opens:
        def __reduce__(self) -> tuple[object, ...]:
            return open, (str(canary), "w")

    buffer = io.BytesIO()
    np.savez(buffer, latents=np.array([Opens()], dtype=object), original_size=[64, 64], crop_ltrb=[0, 0, 64, 64])
    (tmp_path / "0.npz").write_bytes(buffer.getvalue())
    assert "not a whole .npz file" in refusal(lambda: read_latents(tmp_path / "0.npz"))
    assert not canary.exists()
    np.load(io.BytesIO(buffer.getvalue()), allow_pickle=True)["latents"]
    assert canary.exists()


def test_a_configuration_that_names_code_of_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Transformers would fetch and run it for a text encoder."""
    import json

    from library.models.options import ModelOptions, PromptOptions
    from library.models.stable_diffusion import load_stable_diffusion

    folder = tiny_sd(tmp_path / "sd1", "sd1", layers_per_block=1)
    path = folder / "text_encoder/config.json"
    stated = json.loads(path.read_text()) | {
        "attn_implementation": "somebody/evil-kernel",
        "_attn_implementation": "somebody/evil-kernel",
        "auto_map": {"AutoModel": "evil.Model"},
        "return_dict": False,
    }
    path.write_text(json.dumps(stated))

    def fetched(*_: object, **__: object) -> None:
        raise Escaped("code of the hub was asked for")

    kernels = type(sys)("kernels")
    kernels.get_kernel = fetched  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kernels", kernels)
    loaded = load_stable_diffusion(ModelOptions(pretrained_model_name_or_path=str(folder)), PromptOptions())
    assert "evil" not in str(loaded.text_encoder.config.to_dict())


def test_no_reader_falls_back_to_plain_pickles(monkeypatch: pytest.MonkeyPatch, canary: Path, tmp_path: Path) -> None:
    """A bare pickle, as before archives, is refused too."""
    from library.files import read_tensors

    path = tmp_path / "old.bin"
    path.write_bytes(pickled({"a": Call(Name("builtins", "open"), (str(canary), "w"))}))
    message = refusal(lambda: read_tensors(path))
    assert "not a readable torch file" in message or "could run code" in message
    assert not canary.exists()
