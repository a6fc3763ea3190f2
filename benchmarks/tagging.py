"""How much of the tagger's time is spent outside the network, and whether its memory grows.

Run ``python benchmarks/tagging.py`` from the project's folder (needs ``requirements-dev.txt``). It makes 2,000 small
JPEG and PNG files and a network with the taggers' input (448 x 448) that takes 2.9 billion multiplications an image. A
real tagger (ConvNeXt-B, 15.4 billion at 224 x 224 by its paper, 62 billion at 448 x 448) takes twenty times as many on
the same processor, so that the share outside the network is smaller there.

The whole tool is timed, from its options to its last file. "Inside" is the time in the network, measured around it in
the same run; "alone" is the time of as many images through the network with nothing else going on, measured before and
after. Prints both shares, and the resident memory after 500 images and at the end.
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

WIDTH = 64
LAYERS = 6
"""Convolutions of 3 x 3 on 112 x 112 places, WIDTH channels: 0.46 billion multiplications each."""

SAMPLE = 64
"""Images that the network is measured with alone."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--batch_size", type=int, default=4)
    chosen = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="tagging-"))
    try:
        write_images(folder / "images", chosen.images)
        write_tagger(folder / "model")
        measure(folder, chosen.images, chosen.batch_size)
    finally:
        shutil.rmtree(folder)


def write_images(folder: Path, count: int) -> None:
    """Pictures of 256 to 383 pixels a side, half of them JPEG, half PNG."""
    import numpy as np
    from PIL import Image

    folder.mkdir()
    generator = np.random.default_rng(0)
    for index in range(count):
        small = generator.integers(0, 256, (12, 12, 3)).astype(np.uint8)
        size = (256 + index % 128, 256 + index * 7 % 128)
        suffix = ".jpg" if index % 2 else ".png"
        Image.fromarray(small).resize(size).save(folder / f"{index:05d}{suffix}")


def write_tagger(folder: Path) -> None:
    """The network, with random weights, and a table of 8,000 tags."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    folder.mkdir()
    generator = np.random.default_rng(0)
    tags, constants, nodes = 8000, {}, [helper.make_node("Transpose", ["input"], ["x"], perm=[0, 3, 1, 2])]
    constants["patches"] = generator.normal(0, 1e-3, (WIDTH, 3, 4, 4))
    nodes.append(helper.make_node("Conv", ["x", "patches"], ["x0"], strides=[4, 4]))
    for layer in range(LAYERS):
        constants[f"w{layer}"] = generator.normal(0, 0.05, (WIDTH, WIDTH, 3, 3))
        nodes.append(helper.make_node("Conv", [f"x{layer}", f"w{layer}"], [f"c{layer}"], pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("Relu", [f"c{layer}"], [f"x{layer + 1}"]))
    constants["head"] = generator.normal(0, 0.5, (WIDTH, tags))
    nodes += [
        helper.make_node("GlobalAveragePool", [f"x{LAYERS}"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("MatMul", ["flat", "head"], ["logits"]),
        helper.make_node("Sigmoid", ["logits"], ["output"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tagger",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 448, 448, 3])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", tags])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, str(folder / "model.onnx"))
    rows = [f"{number},tag_{number},{9 if number < 4 else 0},1\n" for number in range(tags)]
    (folder / "selected_tags.csv").write_text("tag_id,name,category,count\n" + "".join(rows))


def measure(folder: Path, count: int, batch_size: int) -> None:
    """Run the tool with a clock around its network, and the network alone before and after."""
    import onnxruntime
    import psutil

    from finetune import tag_images_by_wd14_tagger as tool
    from finetune.processes import Processes
    from finetune.tagger_model import load_tagger

    inside, memory = [0.0], {}
    session, process = onnxruntime.InferenceSession, psutil.Process()
    run = session.run
    done = 0

    def timed(self: object, outputs: object, inputs: "Mapping[str, NDArray[np.float32]]") -> object:
        nonlocal done
        began = time.perf_counter()
        found = run(self, outputs, inputs)
        inside[0] += time.perf_counter() - began
        images = len(inputs["input"])
        done += images
        if done % 500 < images:
            memory[done // 500 * 500] = process.memory_info().rss / 2**20
        return found

    def alone() -> float:
        tagger = load_tagger(folder / "model", Processes())
        images = [tagger.read(path) for path in sorted((folder / "images").iterdir())[:SAMPLE] if path.suffix != ".txt"]
        tagger.probabilities(images[:batch_size])
        inside[0] = 0.0
        for start in range(0, len(images), batch_size):
            tagger.probabilities(images[start : start + batch_size])
        return inside[0] / len(images)

    session.run = timed
    before = alone()
    inside[0], done = 0.0, 0
    memory.clear()
    began = time.perf_counter()
    code = tool.main(
        [
            str(folder / "images"),
            "--model_dir",
            str(folder / "model"),
            "--batch_size",
            str(batch_size),
            "--thresh",
            "0.9",
        ]
    )
    total, within = time.perf_counter() - began, inside[0]
    after = alone()
    assert code == 0
    assert len(list((folder / "images").glob("*.txt"))) == count
    print(f"{count} images in {total:.1f} s, {count / total:.1f} a second, batches of {batch_size}")
    print(f"inside the network: {within:.1f} s; outside: {100 * (1 - within / total):.1f} % of the time")
    print(f"alone: {1000 * before:.1f} and {1000 * after:.1f} ms an image; the tool: {1000 * total / count:.1f} ms")
    print("memory, MiB: " + ", ".join(f"{value:.0f} after {place}" for place, value in memory.items()))


if __name__ == "__main__":
    main()
