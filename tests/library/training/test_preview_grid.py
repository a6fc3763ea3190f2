from PIL import Image
from PIL.PngImagePlugin import PngInfo

from library.training.preview_grid import MOST_COLUMNS, MOST_ROWS, SIDE, PreviewGrid
from library.training.prompt_files import PreviewPrompt

PROMPTS = tuple(PreviewPrompt(prompt=f"prompt {number}", index=number) for number in range(2))


def plain(colour, size=(512, 256)):
    return Image.new("RGB", size, colour)


def test_rows_are_prompts_and_columns_are_times():
    grid = PreviewGrid(PROMPTS)
    for step, colour in ((20, "blue"), (10, "red")):
        grid.add(0, plain(colour), step)
    grid.add(1, plain("lime"), 20)
    assert grid.steps == (10, 20)
    picture = grid.picture()
    small = (SIDE, SIDE // 2)
    assert picture.size == (6 + 2 * (small[0] + 6), 22 + 2 * (20 + small[1] + 6))
    middle = [picture.getpixel((6 + SIDE // 2 + column * (SIDE + 6), 22 + 20 + 40)) for column in range(2)]
    assert middle == [(255, 0, 0), (0, 0, 255)]
    lower = [picture.getpixel((6 + SIDE // 2 + column * (SIDE + 6), 22 + 20 + 40 + 20 + 96 + 6)) for column in range(2)]
    assert lower == [(255, 255, 255), (0, 255, 0)]


def test_there_is_an_end_to_its_size():
    grid = PreviewGrid([PreviewPrompt(prompt="x", index=number) for number in range(MOST_ROWS + 3)])
    for step in range(0, 10_000, 100):
        for row in range(MOST_ROWS + 3):
            grid.add(row, plain("red", (64, 64)), step)
        assert len(grid.steps) <= MOST_COLUMNS
    assert len(grid.prompts) == MOST_ROWS
    assert grid.steps[0] == 0
    assert grid.steps[-1] == 9_900
    # Spread over the run.
    assert max(after - before for before, after in zip(grid.steps, grid.steps[1:], strict=False)) <= 2_000


def test_labels_of_any_letters_are_drawn():
    grid = PreviewGrid([PreviewPrompt(prompt="猫 Käfer\n<b>" + "x" * 5_000)])
    grid.add(0, plain("red"), 1)
    picture = grid.picture()
    assert picture.size[0] == 6 + SIDE + 6
    # The prompt is cut before the edge of the picture.
    edge = picture.crop((6 + SIDE, 22, picture.width, 22 + 20))
    assert edge.getcolors() == [(6 * 20, (255, 255, 255))]


def test_files_of_an_earlier_part(tmp_path):
    def write(name, prompt, step):
        info = PngInfo()
        info.add_itxt("prompt", prompt)
        info.add_itxt("step", step)
        plain("red").save(tmp_path / name, pnginfo=info)

    write("toy_000010_00_20260101000000.png", "prompt 0", "10")
    write("toy_e000001_01_20260101000000_7.png", "prompt 1", "20")
    write("toy_000030_00_20260101000000.png", "prompt 0", "30")
    write("toy_000020_01_20260101000000.png", "another prompt", "5")
    write("other_000020_01_20260101000000.png", "prompt 1", "6")
    write("toy_000020_07_20260101000000.png", "prompt 7", "7")
    write("toy_000020_00_20260101000000.png", "prompt 0", "none")
    (tmp_path / "toy_000011_00_20260101000000.png").write_bytes(b"no picture")
    grid = PreviewGrid(PROMPTS)
    grid.add_files(tmp_path, "toy_", up_to=20)
    assert grid.steps == (10, 20)
    assert grid.at(1, 20) is not None
    assert grid.at(1, 10) is None
    grid.add_files(tmp_path / "missing", "toy_", up_to=20)
