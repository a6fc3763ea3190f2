"""Measure a model of the world of shapes: does a picture show what its prompt asks for?

    python measure.py FOLDER --sheet samples.png

Makes one picture for each shape in each colour, each on one of the backgrounds, recognises them, and prints the share
that is right.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from shapes_world import BACKGROUNDS, COLOURS, SHAPES, Pixels, Scene, classify, contact_sheet, with_article


def every_scene() -> list[Scene]:
    """Each shape in each colour, 64 in all, going through the backgrounds."""
    colours, grounds = list(COLOURS), list(BACKGROUNDS)
    return [
        Scene(
            shape=shape,
            colour=colours[(row + column) % len(colours)],
            background=grounds[(row * 3 + column) % len(grounds)],
        )
        for row in range(len(colours))
        for column, shape in enumerate(SHAPES)
    ]


def prompt_for(scene: Scene) -> str:
    """The plain sentence that asks for ``scene``."""
    return f"{with_article(scene.colour)} {scene.shape} on a {scene.background} background"


def generate(
    pipeline: Any, prompts: list[str], *, steps: int, guidance: float, seed: int, at_once: int = 16
) -> list[Pixels]:
    """One 128x128 picture a prompt, by the pipeline's own sampler."""
    pictures: list[Pixels] = []
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, len(prompts), at_once):
        result = pipeline(
            prompts[start : start + at_once],
            num_inference_steps=steps,
            guidance_scale=guidance,
            width=128,
            height=128,
            generator=generator,
            output_type="np",
        )
        pictures += [np.round(picture * 255).astype(np.uint8) for picture in result.images]
    return pictures


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Shares of pictures, 0..1; ``overlap`` is the mean fit of the outline."""

    shape: float
    colour: float
    background: float
    overlap: float


def score(scenes: list[Scene], pictures: list[Pixels]) -> Score:
    """How many ``pictures`` show what their scene asks for; one without an object is wrong in everything."""
    seen = [classify(picture) for picture in pictures]
    pairs = list(zip(scenes, seen, strict=True))
    return Score(
        shape=float(np.mean([found is not None and found.scene.shape == scene.shape for scene, found in pairs])),
        colour=float(np.mean([found is not None and found.scene.colour == scene.colour for scene, found in pairs])),
        background=float(
            np.mean([found is not None and found.scene.background == scene.background for scene, found in pairs])
        ),
        overlap=float(np.mean([found.overlap if found else 0.0 for found in seen])),
    )


def main() -> None:
    """Generate, recognise, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="diffusers folder")
    parser.add_argument("--sheet", type=Path, help="picture of all pictures to write")
    parser.add_argument("--steps", type=int, default=20, help="sampling steps")
    parser.add_argument("--guidance", type=float, default=4.0, help="classifier-free guidance scale")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    pipeline = StableDiffusionPipeline.from_pretrained(options.model, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    scenes = every_scene()
    begun = time.perf_counter()
    pictures = generate(
        pipeline, [prompt_for(s) for s in scenes], steps=options.steps, guidance=options.guidance, seed=options.seed
    )
    seconds = (time.perf_counter() - begun) / len(pictures)
    result = score(scenes, pictures)
    print(
        f"{len(scenes)} prompts: shape {result.shape:.2f}  colour {result.colour:.2f}"
        f"  background {result.background:.2f}  overlap {result.overlap:.2f}  {seconds:.2f} s a picture"
    )
    if options.sheet:
        cv2.imwrite(str(options.sheet), contact_sheet(pictures, len(SHAPES))[..., ::-1])


if __name__ == "__main__":
    main()
