"""``train_textual_inversion.py`` end to end, on small random models."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from library.errors import UserError
from library.files import read_metadata, read_tensors
from tests.scripts.runs import Run, run_script, tensor_hash, write_dataset
from tests.tiny import TEXT_WIDTH, Kind, tiny_ldm, tiny_sd

ROOT = Path(__file__).parents[2]
ASSETS = Path(__file__).parent / "losses"
FLAGS: dict[Kind, list[str]] = {"sd1": [], "sd2": ["--v2"], "sd2_v": ["--v2", "--v_parameterization"]}
SCRIPT = "train_textual_inversion"
STEPS = 4


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: tiny_sd(folder / kind, kind, layers_per_block=1) for kind in FLAGS}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


def dataset(folder: Path, *, batch_size: int = 2, more: str = "caption_prefix = 'zwx'\n") -> Path:
    """Captions such as "zwx a thing, number 3"."""
    return write_dataset(folder, batch_size=batch_size, more=more)


def arguments(model: Path, config: Path, *more: str, kind: Kind = "sd1", steps: int = STEPS) -> list[str]:
    return [
        f"--pretrained_model_name_or_path={model}",
        f"--dataset_config={config}",
        "--token_string=zwx",
        "--num_vectors_per_token=2",
        "--init_word=dog",
        "--learning_rate=1e-2",
        f"--max_train_steps={steps}",
        "--max_data_loader_n_workers=0",
        *FLAGS[kind],
        *more,
    ]


@pytest.fixture(scope="module")
def plain(models: dict[str, Path], data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run that others are compared with."""
    return run_script(SCRIPT, tmp_path_factory.mktemp("plain"), *arguments(models["sd1"], dataset(data)))


@pytest.mark.parametrize("kind", FLAGS)
def test_losses_are_the_stored_ones(kind: Kind, models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    run = run_script(SCRIPT, tmp_path, *arguments(models[kind], dataset(data), kind=kind))
    stored = [float(line) for line in (ASSETS / f"{SCRIPT}-{kind}.txt").read_text().split()]
    assert run.code == 0
    assert run.losses == pytest.approx(stored, rel=1e-4)
    assert run.files - {path for path in run.files if path.startswith("log/")} == {
        *("zwx.pt", "zwx-report.html", "zwx.run.json")
    }


def test_the_first_loss_is_that_of_the_init_word(plain: Run, models: dict[str, Path], data: Path) -> None:
    """Computed here with diffusers' own classes, the documented keys and captions that say "dog dog"."""
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from PIL import Image
    from transformers import CLIPTextModel, CLIPTokenizer

    from library.data.epoch_plan import EpochPlan, PlanBucket
    from library.randomness import torch_generator

    folder = models["sd1"]
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    schedule = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    plan = EpochPlan([PlanBucket(tuple(range(8)), 2)], 7, 1, 1)
    losses = []
    with torch.no_grad():
        for example in plan.epoch(1)[0].micro_batches[0].examples:

            def draw(purpose: str, number: int = example) -> torch.Tensor:
                return torch.randn(4, 8, 8, generator=torch_generator(7, purpose, 1, number))[None]

            pixels = np.asarray(Image.open(data / "images" / f"{example:02d}.png"), dtype=np.float32) / 127.5 - 1
            posterior = vae.encode(torch.from_numpy(pixels).permute(2, 0, 1)[None]).latent_dist
            latents = (posterior.mean + posterior.std * draw("posterior")) * 0.18215
            timestep = torch.randint(0, 1000, (), generator=torch_generator(7, "timestep", 1, example))[None]
            noise = draw("noise")
            caption = f"dog dog a thing, number {example}"
            ids = tokenizer(caption, padding="max_length", max_length=77, return_tensors="pt")
            context = text_encoder(ids.input_ids).last_hidden_state
            found = unet(schedule.add_noise(latents, noise, timestep), timestep, context).sample
            losses.append(((found - noise) ** 2).mean().item())
    assert plain.losses[0] == pytest.approx(np.mean(losses), rel=1e-4)


def trained_rows(name: str, output: Path, monkeypatch: pytest.MonkeyPatch, *given: str) -> tuple[torch.Tensor, Run]:
    """Run a script, assert that nothing but the new rows has changed by a bit, and return these rows."""
    from library.models.stable_diffusion import load_stable_diffusion

    loaded = []

    def remember(*given: object, **named: object) -> object:
        model = load_stable_diffusion(*given, **named)
        state = {part: _copy(getattr(model, part)) for part in ("text_encoder", "unet", "vae")}
        loaded.append((model, state))
        return model

    monkeypatch.setattr("library.models.stable_diffusion.load_stable_diffusion", remember)
    done = run_script(name, output, *given)
    model, before = loaded[0]
    table = "embeddings.token_embedding"
    after = _copy(model.text_encoder)
    rows = after.pop(f"{table}.rows.weight")
    after[f"{table}.weight"] = after.pop(f"{table}.table.weight")
    assert _equal(after, before["text_encoder"])
    assert _equal(_copy(model.unet), before["unet"])
    assert _equal(_copy(model.vae), before["vae"])
    # The number of "dog", with which they began.
    assert not torch.isclose(rows, before["text_encoder"][f"{table}.weight"][1929]).any()
    return rows, done


def test_training_moves_the_new_rows_and_nothing_else(
    models: dict[str, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the optimizer does with weight decay and moments."""
    more = ["--optimizer_type=AdamW", "--optimizer_args", "weight_decay=0.5", "--save_model_as=safetensors"]
    rows, run = trained_rows(SCRIPT, tmp_path, monkeypatch, *arguments(models["sd1"], dataset(data), *more))
    assert torch.equal(read_tensors(run.folder / "zwx.safetensors").tensors["emb_params"], rows)


def _copy(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def _equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("suffix", ["pt", "ckpt", "safetensors", "bin"])
def test_diffusers_loads_every_format(
    suffix: str, plain: Run, models: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    from diffusers import StableDiffusionPipeline

    given = arguments(models["sd1"], dataset(data), f"--save_model_as={suffix}")
    run = run_script(SCRIPT, tmp_path, *given)
    file = run.folder / f"zwx.{suffix}"
    rows = next(iter(read_tensors(file).tensors.values()))
    assert torch.equal(rows, read_tensors(plain.folder / "zwx.pt").tensors["emb_params"])
    pipeline = StableDiffusionPipeline.from_pretrained(models["sd1"], safety_checker=None)
    # The only suffix that diffusers does not know; the content is that of a .pt file.
    known = shutil.copy(file, tmp_path / "copy.pt") if suffix == "ckpt" else file
    pipeline.load_textual_inversion(str(known), token="zwx")
    ids = pipeline.tokenizer("zwx zwx_1", add_special_tokens=False)["input_ids"]
    table = pipeline.text_encoder.get_input_embeddings().weight
    assert torch.equal(table[ids].detach(), rows)


def test_a_safetensors_file_has_a_card_and_no_path(models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    given = arguments(models["sd1"], dataset(data), "--save_model_as=safetensors", "--output_name=thing", steps=1)
    run = run_script(SCRIPT, tmp_path, *given, "--save_precision=fp16", "--metadata_author=me")
    file = run.folder / "thing.safetensors"
    metadata = read_metadata(file)
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/textual-inversion"
    assert metadata["modelspec.title"] == "thing"
    assert metadata["modelspec.author"] == "me"
    assert str(tmp_path) not in str(metadata)
    assert read_tensors(file).tensors["emb_params"].dtype == torch.float16


def test_batch_and_accumulation_agree(models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    whole = run_script(SCRIPT, tmp_path / "4", *arguments(models["sd1"], dataset(data, batch_size=4)))
    split = run_script(
        SCRIPT,
        tmp_path / "2x2",
        *arguments(models["sd1"], dataset(data), "--gradient_accumulation_steps=2"),
    )
    assert split.losses == pytest.approx(whole.losses, abs=1e-4)


def test_a_resumed_run_equals_the_uninterrupted_one(models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    """Stopped in the middle of an epoch; with templates, a schedule and a short last group."""
    given = arguments(
        models["sd1"],
        dataset(data),
        "--use_object_template",
        "--lr_scheduler=cosine",
        "--gradient_accumulation_steps=3",
        steps=5,
    )
    whole = run_script(SCRIPT, tmp_path / "whole", *given, "--save_state", "--save_every_n_steps=3")
    state = whole.folder / "zwx-step00000003-state"
    assert {name: tuple(value.shape) for name, value in read_tensors(state / "model.safetensors").tensors.items()} == {
        "weight": (2, 64)
    }
    resumed = run_script(SCRIPT, tmp_path / "resumed", *given, f"--resume={state}")
    assert resumed.losses == whole.losses[3:]
    assert resumed.tensor_hash("zwx.pt") == whole.tensor_hash("zwx.pt")


def test_a_file_is_gone_on_from(plain: Run, models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    weights = f"--weights={plain.folder / 'zwx.pt'}"
    given = arguments(models["sd1"], dataset(data), weights, "--learning_rate=1e-30", steps=1)
    run = run_script(SCRIPT, tmp_path, *given)
    assert run.tensor_hash("zwx.pt") == plain.tensor_hash("zwx.pt")


def test_previews_change_nothing_and_know_the_word(
    plain: Run, models: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    from PIL import Image

    prompts = tmp_path / "prompts.txt"
    lines = ["a (zwx:1.3) thing", "a (zwx zwx1:1.3) thing", "a thing"]
    prompts.write_text("".join(f"{line} --w 64 --h 64 --s 2 --d 3\n" for line in lines), encoding="utf-8")
    run = run_script(
        SCRIPT,
        tmp_path / "out",
        *arguments(models["sd1"], dataset(data), "--sample_every_n_steps=4", f"--sample_prompts={prompts}"),
    )
    assert run.tensor_hash("zwx.pt") == plain.tensor_hash("zwx.pt")
    short, long, without = (
        np.asarray(Image.open(path)) for path in sorted((run.folder / "sample").glob("zwx_000004_*.png"))
    )
    assert np.array_equal(short, long)
    assert not np.array_equal(short, without)


def test_bf16_and_checkpointing_train(plain: Run, models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    given = arguments(models["sd1"], dataset(data), "--mixed_precision=bf16", "--save_precision=bf16")
    run = run_script(SCRIPT, tmp_path, *given, "--gradient_checkpointing", "--cache_latents")
    assert run.losses == pytest.approx(plain.losses, rel=0.05)
    assert read_tensors(run.folder / "zwx.pt").tensors["emb_params"].dtype == torch.bfloat16


def test_checkpointing_and_caching_change_nothing(
    plain: Run, models: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    given = arguments(models["sd1"], dataset(data), "--gradient_checkpointing", "--cache_latents")
    run = run_script(SCRIPT, tmp_path, *given)
    assert run.losses == pytest.approx(plain.losses, rel=1e-4)
    rows = [read_tensors(one.folder / "zwx.pt").tensors["emb_params"] for one in (run, plain)]
    assert torch.allclose(*rows, atol=1e-4)


def test_workers_and_weighted_captions(models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    """The word keeps its vectors inside brackets, in a worker as without one."""
    weighted = dataset(data, more="caption_prefix = '(zwx:1.5)'\n")
    given = arguments(models["sd1"], weighted, "--weighted_captions", "--max_data_loader_n_workers=1", steps=2)
    first = run_script(SCRIPT, tmp_path / "1.5", *given)
    other = dataset(data, more="caption_prefix = '(zwx zwx1:1.5)'\n")
    again = arguments(models["sd1"], other, "--weighted_captions", steps=2)
    assert run_script(SCRIPT, tmp_path / "again", *again).tensor_hash("zwx.pt") == first.tensor_hash("zwx.pt")


def test_without_init_word_the_seed_decides(models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    given = [word for word in arguments(models["sd1"], dataset(data), steps=1) if not word.startswith("--init_word")]
    runs = [run_script(SCRIPT, tmp_path / name, *given) for name in ("a", "b")]
    assert runs[0].tensor_hash("zwx.pt") == runs[1].tensor_hash("zwx.pt")
    rows = read_tensors(runs[0].folder / "zwx.pt").tensors["emb_params"]
    assert not torch.equal(rows[0], rows[1])


def test_a_dry_run_shows_captions_as_they_are_trained(
    models: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_script(SCRIPT, tmp_path / "a", *arguments(models["sd1"], dataset(data), "--dry_run")).code == 0
    assert "00.png: zwx zwx1 a thing, number 0" in capsys.readouterr().out
    given = arguments(models["sd1"], dataset(data), "--dry_run", "--use_style_template")
    assert run_script(SCRIPT, tmp_path / "b", *given).code == 0
    assert "in the style of zwx zwx1" in capsys.readouterr().out


@pytest.mark.parametrize(("script", "vectors"), [(SCRIPT, 2), (f"{SCRIPT}_XTI", 32)])
@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_a_dry_run_knows_how_much_is_trained(
    kind: Kind, script: str, vectors: int, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a single file, whose names for the embeddings are those of its kind."""
    model = tiny_ldm(tmp_path, kind, layers_per_block=1)
    given = arguments(model, dataset(data), "--dry_run", "--save_state", kind=kind)
    assert run_script(script, tmp_path / "out", *given).code == 0
    values = vectors * TEXT_WIDTH[kind]
    shown = capsys.readouterr().out
    assert f"1 model of {_shown(values * 4)}, 1 state of up to {_shown(values * 12)}" in shown


def _shown(size: int) -> str:
    return f"{size} B" if size < 1000 else f"{size / 1000:.3g} kB"


def test_the_page_of_the_data_set_shows_the_tokens(models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    run = run_script(SCRIPT, tmp_path, *arguments(models["sd1"], dataset(data), "--debug_dataset"))
    pages = "".join(path.read_text(encoding="utf-8") for path in run.folder.rglob("*.html"))
    assert "zwx1" in pages


def test_checking_the_data_set_misses_the_word(
    models: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = arguments(models["sd1"], dataset(data), "--validate_dataset=text", "--token_string=zwy")
    assert run_script(SCRIPT, tmp_path, *given).code == 2
    assert "no caption contains the new word 'zwy'" in capsys.readouterr().out


def refusal(tmp_path: Path, model: Path, config: Path, *more: str) -> str:
    with pytest.raises(UserError) as error:
        run_script(SCRIPT, tmp_path / "out", *arguments(model, config), *more)
    assert not (tmp_path / "out").exists()
    for problem in error.value.problems:
        assert problem.where, problem
        assert problem.remedy, problem
    return str(error.value)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--token_string=cat"], "vocabulary already"),
        (["--token_string=my word"], "has ' ' in it"),
        (["--token_string=zwy"], "no caption contains the new word 'zwy'"),
        (["--init_word= "], "--init_word is empty"),
        (["--weights=nowhere.pt"], "embedding file not found"),
        (["--caption_dropout_rate=0.1"], "this method needs every caption"),
        (["--num_vectors_per_token=0"], "num_vectors_per_token"),
        (["--learning_rate=0"], "nothing is trained"),
    ],
)
def test_wrong_use_is_refused(more: list[str], told: str, models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    assert told in refusal(tmp_path, models["sd1"], dataset(data), *more)


def test_another_number_of_vectors_is_refused_before_anything_is_loaded(
    models: dict[str, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import save_file

    file = tmp_path / "three.safetensors"
    save_file({"emb_params": torch.zeros(3, 64)}, file)
    monkeypatch.setattr("library.models.stable_diffusion.load_stable_diffusion", None)
    told = refusal(tmp_path, models["sd1"], dataset(data), f"--weights={file}")
    assert "3 vectors, the new word 2" in told
    assert "--num_vectors_per_token=3" in told


def test_a_missing_word_is_refused(models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    given = [word for word in arguments(models["sd1"], dataset(data)) if not word.startswith("--token_string")]
    with pytest.raises(UserError, match="--token_string is missing"):
        run_script(SCRIPT, tmp_path, *given)


def test_an_embedding_of_another_model_is_refused(models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    file = tmp_path / "sd2.pt"
    torch.save({"emb_params": torch.zeros(2, 96)}, file)
    with pytest.raises(UserError, match="96 wide"):
        run_script(SCRIPT, tmp_path / "out", *arguments(models["sd1"], dataset(data), f"--weights={file}"))


def test_no_path_is_in_a_torch_file(plain: Run) -> None:
    assert tensor_hash(plain.folder / "zwx.pt")
    assert str(plain.folder).encode() not in (plain.folder / "zwx.pt").read_bytes()


@pytest.mark.parametrize("script", [SCRIPT, "train_textual_inversion_XTI"])
def test_help_and_mistakes_import_nothing_heavy(script: str, models: dict[str, Path], data: Path) -> None:
    given = arguments(models["sd1"], dataset(data), "--output_dir=out", "--token_string=zwy")
    code = (
        "import sys\n"
        f"from {script} import main\n"
        "from library.errors import UserError\n"
        "try:\n"
        f"    main({given!r})\n"
        "except UserError as error:\n"
        "    assert 'no caption contains' in str(error)\n"
        "    print(sorted({'torch', 'diffusers', 'transformers', 'accelerate', 'cv2'} & sys.modules.keys()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_folders_name_the_word(models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    """The word stands in the folder's name; regularisation images keep their own."""
    dataset(data)
    for folder in ("train/2_zwx thing", "reg/1_thing"):
        shutil.copytree(data / "images", tmp_path / folder, ignore=shutil.ignore_patterns("*.txt"))
    given = [
        f"--pretrained_model_name_or_path={models['sd1']}",
        f"--train_data_dir={tmp_path / 'train'}",
        f"--reg_data_dir={tmp_path / 'reg'}",
        *("--resolution=64", "--token_string=zwx", "--max_train_steps=1", "--max_data_loader_n_workers=0"),
    ]
    assert run_script(SCRIPT, tmp_path / "out", *given, "--use_object_template").code == 0
    assert run_script(SCRIPT, tmp_path / "out2", *given, "--prior_loss_weight=0.5").code == 0
