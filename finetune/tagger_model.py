"""A tagger in ONNX Runtime: its files, its input and its outputs."""

import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from finetune.processes import Processes
from finetune.tagger_labels import Label, read_csv, read_mapping
from library.data.images import Pixels, decode, resize
from library.data.spec import Size
from library.errors import UserError, first_line

PACKAGE: Final = "onnxruntime==1.31.1"

_USUAL_SIDE: Final = 448
"""Pixels of an image's side, for a model that leaves it open."""

_WHITE: Final = 255
_PROVIDERS: Final = ("OpenVINOExecutionProvider", "CUDAExecutionProvider", "ROCMExecutionProvider")
"""What is used before the processor, best first."""

_PROCESSOR: Final[tuple[str, dict[str, Any]]] = ("CPUExecutionProvider", {})

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TaggerImage:
    """An image as a tagger takes it.

    Attributes:
        pixels: (side, side, 3), blue, green, red, 0..255.
        size: Size of the image file as displayed.
    """

    pixels: Pixels
    size: Size


@dataclass(frozen=True, slots=True)
class Layout:
    """The files of one kind of tagger.

    Attributes:
        model: The network.
        labels: What its outputs stand for.
    """

    model: str
    labels: str


USUAL: Final = Layout("model.onnx", "selected_tags.csv")
"""Takes pixels in 0..255, gives probabilities."""

MAPPED: Final = Layout("model_optimized.onnx", "tag_mapping.json")
"""Takes pixels in -1..1, gives logits."""


def layout_of(folder: Path) -> Layout | None:
    """The kind of the tagger in ``folder``; None if there is no whole one."""
    for layout in (USUAL, MAPPED):
        if (folder / layout.model).is_file() and (folder / layout.labels).is_file():
            return layout
    return None


def preprocess(rgb: Pixels, side: int) -> Pixels:
    """``rgb`` (height, width, 3), centred on a white square, resized to ``side``, with the channels turned round."""
    height, width = rgb.shape[:2]
    longest = max(height, width)
    top, left = (longest - height) // 2, (longest - width) // 2
    square = np.full((longest, longest, 3), _WHITE, np.uint8)
    square[top : top + height, left : left + width] = rgb
    return np.ascontiguousarray(resize(square, (side, side))[..., ::-1])


def require_onnxruntime() -> None:
    """Refuse to go on without ONNX Runtime.

    Raises:
        UserError: It is not installed.
    """
    from importlib.util import find_spec

    if find_spec("onnxruntime") is None:
        raise UserError(
            "the tagger needs ONNX Runtime, which is not installed",
            where="onnxruntime",
            remedy=f"Run: pip install {PACKAGE} (with an NVIDIA GPU: pip install {PACKAGE.replace('=', '-gpu=', 1)})",
        )


class Tagger:
    """A tagger, ready to run."""

    def __init__(self, session: Any, labels: Sequence[Label], layout: Layout, where: Path) -> None:
        """Take over a session of ONNX Runtime."""
        self.labels = labels
        self._session = session
        self._layout = layout
        self._where = where
        given = session.get_inputs()[0]
        self._name: str = given.name
        shape = [length if isinstance(length, int) and length > 0 else None for length in given.shape]
        if len(shape) != 4:
            raise self._unfit(f"its input has {len(shape)} dimensions instead of 4")
        self._channels_first = shape[1] == 3 or (layout == MAPPED and shape[3] != 3)
        self.side: int = shape[2] or _USUAL_SIDE
        self.fixed_batch: int | None = shape[0]

    def read(self, path: Path) -> TaggerImage:
        """The image ``path`` as the tagger takes it.

        Raises:
            UserError: It cannot be read.
        """
        image = decode(path)
        return TaggerImage(preprocess(image.rgb, self.side), image.size)

    def probabilities(self, images: Sequence[TaggerImage]) -> NDArray[np.float32]:
        """(images, labels), each in 0..1.

        Raises:
            UserError: The model fails, or gives something else.
        """
        batch = np.empty((len(images), *images[0].pixels.shape), np.float32)
        for place, image in enumerate(images):
            batch[place] = image.pixels
        if self.fixed_batch is not None and len(batch) < self.fixed_batch:
            batch = np.concatenate([batch, np.repeat(batch[-1:], self.fixed_batch - len(batch), axis=0)])
        if self._channels_first:
            batch = np.ascontiguousarray(batch.transpose(0, 3, 1, 2))
        if self._layout == MAPPED:
            batch = batch / 127.5 - 1
        try:
            outputs: NDArray[np.float32] = self._session.run(None, {self._name: batch})[0][: len(images)]
        except Exception as error:  # the runtime's own errors share no other class
            raise self._unfit(first_line(error)) from error
        if outputs.shape != (len(images), len(self.labels)):
            what = f"it gives {outputs.shape[-1]} values an image, and {self._layout.labels} names {len(self.labels)}"
            raise self._unfit(what)
        if not np.isfinite(outputs).all():
            raise self._unfit("it gives values that are not finite")
        return _sigmoid(outputs) if self._layout == MAPPED else outputs

    def _unfit(self, reason: str) -> UserError:
        return UserError(
            f"the tagger cannot be used: {reason}",
            where=str(self._where / self._layout.model),
            remedy="Add --force_download, or choose another --repo_id.",
        )


def load_tagger(folder: Path, processes: Processes) -> Tagger:
    """The tagger in ``folder``, on the best device that ONNX Runtime has.

    Raises:
        UserError: A file is missing, damaged or of another kind.
    """
    import onnxruntime  # type: ignore[import-untyped]

    layout = layout_of(folder)
    assert layout is not None, "the files have been fetched"
    labels = read_csv(folder / layout.labels) if layout == USUAL else read_mapping(folder / layout.labels)
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3  # errors
    available = onnxruntime.get_available_providers()
    chosen = next((name for name in _PROVIDERS if name in available), None)
    if processes.world > 1 and chosen is None:
        settings.intra_op_num_threads = max((os.cpu_count() or 1) // processes.world, 1)
    if chosen is None and shutil.which("nvidia-smi"):
        log.warning(
            "the tagger runs on the processor although there seems to be a GPU; for it: pip uninstall onnxruntime, "
            "then pip install %s",
            PACKAGE.replace("=", "-gpu=", 1),
        )
    session = None
    if chosen is not None:
        try:
            session = _session(folder / layout.model, settings, (chosen, _settings_of(chosen)), _PROCESSOR)
        except UserError as error:
            log.warning("%s is not used: %s", chosen, error.problems[0].what)
    session = session or _session(folder / layout.model, settings, _PROCESSOR)
    log.info("tagger %s: %d tags, %s", folder.name, len(labels), session.get_providers()[0])
    return Tagger(session, labels, layout, folder)


def _session(model: Path, settings: Any, *providers: tuple[str, dict[str, Any]]) -> Any:
    import onnxruntime

    try:
        return onnxruntime.InferenceSession(str(model), settings, providers=list(providers))
    except Exception as error:  # the runtime's own errors share no other class
        raise UserError(
            f"cannot read the tagger: {first_line(error)}",
            where=str(model),
            remedy="The file is damaged or of another kind: add --force_download, or put the right one there.",
        ) from error


def _settings_of(provider: str) -> dict[str, Any]:
    if provider == "OpenVINOExecutionProvider":
        # In 16 bits it is known to give wrong tags.
        return {"device_type": "GPU", "precision": "FP32"}
    return {"device_id": int(os.environ.get("LOCAL_RANK", "0"))}


def _sigmoid(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    # Far from zero the exponential would overflow.
    probabilities: NDArray[np.float32] = 1 / (1 + np.exp(-logits.clip(-80, 80)))
    return probabilities
