"""Training from the latent cache on disk, and the tool that fills it ahead."""

import os
import subprocess
import sys
from difflib import get_close_matches
from pathlib import Path

import pytest

from library.errors import UserError
from library.options import declared_flags, parse_options
from tests.scripts.runs import Run, read_losses, run_script, script, write_dataset, write_images
from tests.scripts.test_train_network import arguments
from tests.tiny import tiny_sd

ROOT = Path(__file__).parents[2]
DISK = "--cache_latents_to_disk"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd(tmp_path_factory.mktemp("models") / "sd1", "sd1", layers_per_block=1)


def dataset(folder: Path) -> Path:
    """The data set in ``folder``, whose images are written once."""
    config = folder / "dataset-2.toml"
    return config if config.exists() else write_dataset(folder, more="flip_aug = true\n")


@pytest.fixture(scope="module")
def in_memory(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("memory")
    return run_script("train_network", folder / "out", *arguments(model, dataset(folder), "--cache_latents"))


def entries(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (folder / "images").glob("*.npz")}


def tool(*given: str | Path) -> int:
    code: int = script("tools.cache_latents").main([str(word) for word in given])
    return code


def tool_arguments(model: Path, folder: Path) -> list[str]:
    return [f"--pretrained_model_name_or_path={model}", f"--dataset_config={dataset(folder)}"]


def test_the_cache_on_disk_trains_as_the_one_in_memory(model: Path, in_memory: Run, tmp_path: Path) -> None:
    given = arguments(model, dataset(tmp_path), DISK)
    first = run_script("train_network", tmp_path / "first", *given)
    made = entries(tmp_path)
    assert set(made) == {f"{number:02d}_0064x0064_sd.npz" for number in range(8)}
    second = run_script("train_network", tmp_path / "second", *given)
    trusting = run_script("train_network", tmp_path / "trusting", *given, "--skip_cache_check")
    assert entries(tmp_path) == made
    for run in (first, second, trusting):
        assert run.losses == in_memory.losses
        assert run.tensor_hash() == in_memory.tensor_hash()


def test_the_cache_on_disk_trains_as_no_cache(model: Path, in_memory: Run, tmp_path: Path) -> None:
    without = run_script("train_network", tmp_path / "out", *arguments(model, dataset(tmp_path)))
    assert in_memory.losses == pytest.approx(without.losses, abs=1e-4)


def test_a_worker_reads_the_cache_on_disk(
    model: Path, in_memory: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("library.data.loader.available_processors", lambda: 2)
    given = arguments(model, dataset(tmp_path), DISK, "--max_data_loader_n_workers=2")
    run = run_script("train_network", tmp_path / "out", *given)
    assert run.tensor_hash() == in_memory.tensor_hash()


def test_the_tool_fills_what_training_then_uses(model: Path, in_memory: Run, tmp_path: Path) -> None:
    assert tool(*arguments(model, dataset(tmp_path)), "--skip_existing") == 0
    made = entries(tmp_path)
    assert len(made) == 8
    run = run_script("train_network", tmp_path / "out", *arguments(model, dataset(tmp_path), DISK))
    assert entries(tmp_path) == made
    assert run.tensor_hash() == in_memory.tensor_hash()


def test_the_tool_runs_from_any_folder(model: Path, tmp_path: Path) -> None:
    given = tool_arguments(model, tmp_path)
    command = [sys.executable, str(ROOT / "tools" / "cache_latents.py"), *given]
    subprocess.run(command, check=True, cwd=tmp_path / "images", timeout=120)
    assert len(entries(tmp_path)) == 8


def test_verify_says_what_is_not_valid(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = tool_arguments(model, tmp_path)
    assert tool("verify", *given) == 1
    assert "8 to be made: not cached yet" in capsys.readouterr().out
    tool("fill", *given)
    assert tool("verify", *given) == 0
    assert "8 of 8 entries are valid" in capsys.readouterr().out
    entry = tmp_path / "images" / "03_0064x0064_sd.npz"
    entry.write_bytes(entry.read_bytes()[:-10])
    before = entries(tmp_path)
    assert tool("verify", *given) == 1
    shown = capsys.readouterr().out
    assert "03.png: damaged" in shown
    assert "7 of 8 entries are valid" in shown
    assert entries(tmp_path) == before


def test_explain_tells_why_an_image_is_made_anew(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = tool_arguments(model, tmp_path)
    image = tmp_path / "images" / "02.png"
    assert tool("explain", image, *given) == 0
    assert "it will be made: not cached yet" in capsys.readouterr().out
    tool("fill", *given)
    tool("explain", image, *given)
    assert "used: 02_0064x0064_sd.npz" in capsys.readouterr().out
    write_images(tmp_path / "images", 8, seed=1)
    tool("explain", image, *given)
    assert "it will be made: the image has changed" in capsys.readouterr().out
    with pytest.raises(UserError, match="not in the data set"):
        tool("explain", tmp_path / "other.png", *given)


def test_clean_removes_what_is_not_used_and_nothing_else(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tiny_sd(tmp_path / "other", "sd1", layers_per_block=1, seed=1)
    given = tool_arguments(model, tmp_path)
    tool("fill", *given)
    kept = entries(tmp_path)
    tool("fill", *tool_arguments(other, tmp_path))
    tool("fill", *given)
    assert len(entries(tmp_path)) == 16
    (tmp_path / "images" / "notes.npz").write_bytes(b"mine")
    write_images(tmp_path / "images", 8)
    before = {path.name for path in (tmp_path / "images").iterdir() if path.suffix != ".npz"}
    assert tool("clean", *given) == 0
    assert "8 files removed" in capsys.readouterr().out
    assert set(entries(tmp_path)) == {*kept, "notes.npz"}
    assert {path.name for path in (tmp_path / "images").iterdir() if path.suffix != ".npz"} == before


@pytest.mark.parametrize("given", [["fil"], ["explain"], ["explain", "--seed=1"]])
def test_a_command_that_does_not_exist_is_refused(given: list[str]) -> None:
    with pytest.raises(UserError):
        tool(*given)


@pytest.mark.slow
def test_two_processes_of_a_run_share_the_work(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d"]
    whole = write_dataset(tmp_path, batch_size=4, more="flip_aug = true\n")
    command = [
        *(sys.executable, *launcher, "--rdzv_endpoint=localhost:0", str(ROOT / "train_network.py")),
        *(f"--output_dir={output}", "--seed=7", f"--logging_dir={output / 'log'}"),
        *arguments(model, dataset(tmp_path), DISK),
    ]
    one = run_script("train_network", tmp_path / "1", *arguments(model, whole, DISK))
    for path in (tmp_path / "images").glob("*.npz"):
        path.unlink()
    run = subprocess.run(
        command,
        check=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
        capture_output=True,
        text=True,
    )
    assert "0 entries are used, 4 are made" in run.stderr
    assert len(entries(tmp_path)) == 8
    assert read_losses(output / "log") == pytest.approx(one.losses, abs=1e-4)


def test_the_tool_refuses_images_that_change_each_time(model: Path, tmp_path: Path) -> None:
    config = write_dataset(tmp_path, more="random_crop = true\n")
    with pytest.raises(UserError, match="random_crop"):
        tool(f"--pretrained_model_name_or_path={model}", f"--dataset_config={config}")


def test_mistakes_are_answered_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from tools.cache_latents import main\n"
        "from library.errors import UserError\n"
        "try: main(['--dataset_config=nowhere.toml'])\n"
        "except UserError: print([name for name in ('torch', 'diffusers', 'transformers') if name in sys.modules])\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout.strip() == "[]"


TRAINING = ("train_network", "train_db", "fine_tune", "train_textual_inversion", "train_textual_inversion_XTI")


@pytest.mark.parametrize("name", TRAINING)
def test_the_tool_mistakes_no_option_of_training_for_one_of_its_own(name: str) -> None:
    own = declared_flags(script("tools.cache_latents").Options)
    others = declared_flags(script(name).Options) - own
    assert others
    assert not [flag for flag in others if get_close_matches(flag, own, 1, cutoff=0.8)]
    assert not [flag for flag in others if any(one.startswith(flag) for one in own)]


def test_the_tool_names_options_that_it_does_not_use(model: Path, tmp_path: Path) -> None:
    config = tmp_path / "training.toml"
    config.write_text("max_train_epochs = 3\n[saving]\noutput_name = 'x'\n", encoding="utf-8")
    notices: list[str] = []
    given = [f"--config_file={config}", "--network_dim=4", "--network_args", "a=1", "b=2", "--resolution=64"]
    options = parse_options(
        script("tools.cache_latents").Options,
        given,
        prog="tool",
        description="",
        announce=notices.append,
        skips_others=True,
    )
    assert options.image.resolution == (64, 64)
    assert notices == ["not used here: max_train_epochs, network_args, network_dim, output_name"]


@pytest.mark.parametrize("slip", ["--resoluton=64", "--enable_buckets"])
def test_the_tool_refuses_a_slip_of_the_pen(model: Path, tmp_path: Path, slip: str) -> None:
    with pytest.raises(UserError, match="there is no option"):
        tool(*tool_arguments(model, tmp_path), slip)
