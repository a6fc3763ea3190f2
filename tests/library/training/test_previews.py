import re

import pytest
from PIL import Image

from library.randomness import key
from library.training.options import PreviewOptions
from library.training.previews import Previews
from library.training.progress import RunLength
from library.training.prompt_files import PreviewPrompt
from tests.library.training.moments import moments

PROMPTS = (PreviewPrompt(prompt="a cat", seed=11), PreviewPrompt(prompt="ein Käfer", negative_prompt="bad", index=1))


@pytest.fixture(autouse=True)
def fixed_time(monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")


def previews(folder, generate=None, *, prompts=PROMPTS, name="toy", is_main=True, show=None, continued_at=0, **options):
    return Previews(
        PreviewOptions(**options),
        prompts,
        generate or (lambda prompt: Image.new("RGB", (8, 8))),
        output_dir=folder,
        output_name=name,
        seed=5,
        is_main=is_main,
        show=show or (lambda prompt, image, step: None),
        continued_at=continued_at,
    )


def run(hook, total_steps=6, steps_per_epoch=3):
    hook.before_training(RunLength(total_steps=total_steps, steps_per_epoch=steps_per_epoch))
    for moment in moments(total_steps, steps_per_epoch):
        hook(moment)


def written(folder):
    return sorted(path.name for path in (folder / "sample").iterdir()) if (folder / "sample").exists() else []


def test_names_of_epoch_previews(tmp_path):
    run(previews(tmp_path, sample_every_n_epochs=2, sample_every_n_steps=1, sample_at_first=True))
    assert written(tmp_path) == [
        "toy_e000000_00_20231114221320_11.png",
        "toy_e000000_01_20231114221320.png",
        "toy_e000002_00_20231114221320_11.png",
        "toy_e000002_01_20231114221320.png",
        "toy_grid.png",
    ]


def test_names_of_step_previews_without_output_name(tmp_path):
    run(previews(tmp_path, prompts=PROMPTS[1:], name=None, sample_every_n_steps=4))
    assert written(tmp_path) == ["000004_00_20231114221320.png"]


@pytest.mark.parametrize("options", [{}, {"sample_every_n_steps": 0}, {"sample_every_n_epochs": -1}])
def test_no_previews_unless_asked(tmp_path, options):
    run(previews(tmp_path, **options))
    assert written(tmp_path) == []


def test_only_the_main_process_makes_them(tmp_path):
    run(previews(tmp_path, sample_every_n_steps=1, is_main=False))
    assert written(tmp_path) == []


def test_prompts_without_a_seed_get_the_same_one_every_time(tmp_path):
    seen = []

    def generate(prompt):
        seen.append((prompt.prompt, prompt.seed))
        return Image.new("RGB", (8, 8))

    run(previews(tmp_path, generate, sample_every_n_steps=3))
    assert seen == [("a cat", 11), ("ein Käfer", key(5, "preview", 1))] * 2


def test_parameters_are_inside_the_png(tmp_path):
    run(previews(tmp_path, sample_every_n_steps=6))
    with Image.open(tmp_path / "sample" / "toy_000006_01_20231114221320.png") as image:
        assert image.text == {
            "prompt": "ein Käfer",
            "negative-prompt": "bad",
            "seed": str(key(5, "preview", 1)),
            "sampler": "ddim",
            "steps": "30",
            "scale": "7.5",
            "size": "512x512",
            "step": "6",
        }


def test_a_failing_prompt_does_not_stop_the_others(tmp_path, caplog):
    def generate(prompt):
        if prompt.prompt == "a cat":
            raise RuntimeError("out of memory")
        return Image.new("RGB", (8, 8))

    hook = previews(tmp_path, generate, sample_every_n_steps=6)
    run(hook)
    assert written(tmp_path) == ["toy_000006_01_20231114221320.png"]
    assert [path.name for path in hook.written] == ["toy_000006_01_20231114221320.png"]
    errors = [record.message for record in caplog.records if record.levelname == "ERROR"]
    assert errors == ["the preview of prompt 1 failed: out of memory"]


def test_an_image_that_cannot_be_written_leaves_nothing_behind(tmp_path):
    class Broken(Image.Image):
        def save(self, path, **values):
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")

    run(previews(tmp_path, lambda prompt: Broken(), sample_every_n_steps=6))
    assert written(tmp_path) == []


def test_interrupting_is_not_a_failing_prompt(tmp_path):
    def generate(prompt):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(previews(tmp_path, generate, sample_every_n_steps=6))


def test_names_keep_their_form_with_the_real_clock(tmp_path, monkeypatch):
    monkeypatch.delenv("SOURCE_DATE_EPOCH")
    run(previews(tmp_path, prompts=PROMPTS[:1], sample_every_n_steps=6))
    (name,) = written(tmp_path)
    assert re.fullmatch(r"toy_000006_00_20\d{12}_11\.png", name)


def test_a_grid_of_all_previews_is_replaced_as_they_come(tmp_path):
    seen = []

    def generate(prompt):
        return Image.new("RGB", (64, 32), (10 * len(seen), 0, 0))

    hook = previews(tmp_path, generate, sample_every_n_steps=2, show=lambda *one: seen.append(one))
    grid = tmp_path / "sample" / "toy_grid.png"
    hook(moments(2, 3)[1])
    assert not grid.exists()
    sizes = []
    for moment in moments(6, 3)[3::2]:
        hook(moment)
        with Image.open(grid) as image:
            sizes.append(image.size)
    # Another column for another time.
    assert sizes[1][0] - sizes[0][0] == 64 + 6
    assert sizes[0][1] == sizes[1][1]
    assert [(prompt.index, step) for prompt, _, step in seen] == [(0, 2), (1, 2), (0, 4), (1, 4), (0, 6), (1, 6)]


def test_the_grid_of_a_resumed_run_goes_on(tmp_path):
    run(previews(tmp_path, sample_every_n_steps=2))
    hook = previews(tmp_path, sample_every_n_steps=2, continued_at=4)
    hook(moments(6, 3)[5])
    # Those after 2 and 4 steps and the new ones; what the earlier run made after 6 steps was given up.
    assert hook._grid.steps == (2, 4, 6)
