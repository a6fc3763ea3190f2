"""What a run tells while it trains: the average loss, and figures and previews for TensorBoard and Weights & Biases."""

import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from library.training.log_targets import LogTarget, TensorBoardLog, WandbLog, check_logging, tracker_settings
from library.training.log_thread import InBackground
from library.training.options import LoggingOptions
from library.training.privacy import shareable, shown_path
from library.training.speed import Speed, memory_figures

if TYPE_CHECKING:
    from PIL.Image import Image

    from library.training.progress import Moment
    from library.training.prompt_files import PreviewPrompt

__all__ = ["LossAverage", "Tracker", "check_logging"]

logger = logging.getLogger(__name__)


class LossAverage:
    """Mean over the latest loss of each step of an epoch: smooth, and never older than an epoch."""

    def __init__(self) -> None:
        self._losses: dict[int, float] = {}
        self._total = 0.0

    def add(self, *, step: int, loss: float) -> None:
        """Take in the loss of step ``step``, from 0, of its epoch; it replaces that of the epoch before.

        One that is not finite belongs to a step that was left out, and does not count.
        """
        if step == 0:
            # Summed anew once an epoch: rounding errors of a running sum would pile up.
            self._total = math.fsum(self._losses.values())
        self._total -= self._losses.pop(step, 0.0)
        if math.isfinite(loss):
            self._losses[step] = loss
            self._total += loss

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` goes on with."""
        return {"total": self._total, "losses": {str(step): loss for step, loss in self._losses.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken; an empty one changes nothing."""
        self._losses = {int(step): float(loss) for step, loss in state.get("losses", {}).items()}
        self._total = float(state.get("total", 0.0))

    @property
    def value(self) -> float:
        """The mean; NaN before the first loss."""
        return self._total / len(self._losses) if self._losses else math.nan


@dataclass(frozen=True, kw_only=True, slots=True)
class _FurtherTags:
    """Tags that users' dashboards know of a script, besides those that all scripts have.

    Attributes:
        loss: Of the loss of a step.
        rate: Of the rate of the first group.
        epoch: Of the average at the end of an epoch.
    """

    loss: str | None = None
    rate: str | None = None
    epoch: str | None = None


_SESSION: Final = "session"
_ONLINE: Final = "wandb"
_FULL: Final = _FurtherTags(loss="loss", epoch="loss/epoch")
_FURTHER_TAGS: Final[Mapping[str, _FurtherTags]] = MappingProxyType(
    {
        "dreambooth": _FULL,
        "finetuning": _FULL,
        "textual_inversion": _FurtherTags(loss="loss", rate="lr", epoch="loss/epoch"),
    }
)


class Tracker:
    """The hook that logs figures and previews, and the context that closes the logs.

    The x axis is the number of finished steps; that of ``loss/epoch``, ``.../epoch_average`` and
    ``.../epoch_divergence`` is the epoch. A log that fails is given up with a warning: the run goes on.

    Args:
        options: Folder and names.
        tracker_name: Name of the log where the options give none; it also says which script logs.
        config: Option values, shown in the log with --log_config, without secrets and paths.
        is_main: Only the main process writes.
        more: Further places to log to.
        speed: Measures the steps.
        former: Where an earlier part of the run was logged, as its ``place`` told; the log goes on there if it can.
        continued_at: Steps of that part.

    Attributes:
        folder: That of the event files; None where there are none.
        place: Where the run is logged, without paths.

    Raises:
        UserError: A log cannot be begun.
    """

    def __init__(
        self,
        options: LoggingOptions,
        *,
        tracker_name: str,
        config: Mapping[str, object] | None = None,
        is_main: bool = True,
        more: Sequence[LogTarget] = (),
        speed: Speed | None = None,
        former: Mapping[str, str] = MappingProxyType({}),
        continued_at: int = 0,
    ) -> None:
        self.folder: Path | None = None
        self.place: dict[str, str] = {}
        self._further = _FURTHER_TAGS.get(tracker_name, _FurtherTags())
        self._step = 0
        self._speed = speed
        self._targets: list[LogTarget] = []
        self._given_up: list[str] = []
        if not is_main:
            return
        self._targets += more
        name = options.log_tracker_name or tracker_name
        shown = shareable(config) if options.log_config and config is not None else None
        settings = tracker_settings(options)
        session: Path | None = None
        if options.logging_dir is not None:
            session = _session(options.logging_dir, options.log_prefix or "", former.get(_SESSION))
            self.place[_SESSION] = session.name
        if "tensorboard" in options.targets and session is not None:
            self.folder = session / name
            text = None if shown is None else _as_text(shown)
            after = continued_at if former.get(_SESSION) == session.name else None
            self._begin_tensorboard(self.folder, settings["tensorboard"], text, after)
        if "wandb" in options.targets:
            online = WandbLog(
                project=name,
                folder=session,
                settings=settings["wandb"],
                api_key=options.wandb_api_key,
                config=shown,
                former=former.get(_ONLINE),
            )
            self.place[_ONLINE] = online.number
            self._targets.append(online)

    def flush(self) -> None:
        """Write what has been logged so far."""
        self._tell(lambda target: target.flush())

    def _begin_tensorboard(
        self, folder: Path, settings: Mapping[str, Any], text: str | None, continued_at: int | None
    ) -> None:
        try:
            self._targets.append(InBackground(TensorBoardLog(folder, settings, text, continued_at=continued_at)))
            logger.info("logging to %s", shown_path(folder))
        except OSError as problem:
            self._give_up(TensorBoardLog.name, problem)

    def __call__(self, moment: "Moment") -> None:
        """Log the figures of ``moment``."""
        self._step = moment.step
        measured = self._speed.stop(moment) if self._speed is not None else {}
        if not self._targets:
            return
        further = self._further
        figures = {"loss/current": moment.loss, "loss/average": moment.average_loss, **moment.metrics}
        if measured:
            figures |= {**measured, **memory_figures()}
        figures |= {f"lr/{name}": rate for name, rate in moment.learning_rates.items()}
        if further.loss is not None:
            figures[further.loss] = moment.loss
        if further.rate is not None:
            figures[further.rate] = next(iter(moment.learning_rates.values()))
        self.add(figures, moment.step)
        if moment.epoch_ended or moment.finished:
            tags = ["loss/epoch_average", *([further.epoch] if further.epoch is not None else [])]
            self.add(dict.fromkeys(tags, moment.average_loss), moment.epoch)

    def add(self, figures: Mapping[str, float], at: int) -> None:
        """Log further figures, by tag, at a place of the x axis."""
        self._tell(lambda target: target.add(figures, at=at, step=self._step))

    def add_image(self, prompt: "PreviewPrompt", image: "Image", step: int) -> None:
        """Log a preview made after ``step`` steps."""
        self._tell(lambda target: target.add_image(prompt.index, image, prompt=prompt.prompt, step=step))

    def _tell(self, what: Callable[[LogTarget], None]) -> None:
        for target in tuple(self._targets):
            try:
                what(target)
            except Exception as error:
                self._targets.remove(target)
                self._give_up(target.name, error)
                # Its threads end; that it cannot write any more is known.
                with suppress(Exception):
                    target.close(failed=False)

    def _give_up(self, name: str, problem: Exception) -> None:
        self._given_up.append(f"the log in {name} ends after step {self._step}: {_reason(problem)}")
        logger.warning("nothing more is logged to %s, and the run goes on: %s", name, _reason(problem))
        logger.debug("logging failed", exc_info=True)

    def __enter__(self) -> Self:
        """The hook itself."""
        if self._speed is not None:
            self._speed.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Write what is left, also when the run failed."""
        for target in self._targets:
            try:
                target.close(failed=kind is not None)
            except Exception as failure:
                logger.warning("the end of the log is missing in %s: %s", target.name, _reason(failure))
        self._targets.clear()
        for what in self._given_up:
            logger.warning(what)


def _reason(problem: Exception) -> str:
    return str(getattr(problem, "strerror", None) or problem)


def _session(folder: Path, prefix: str, former: str | None) -> Path:
    """The folder of this run's logs: that of its earlier part where it is still there, a new one otherwise."""
    if former is not None and (folder / Path(former).name).is_dir():
        return folder / Path(former).name
    return folder / (prefix + time.strftime("%Y%m%d%H%M%S"))


def _as_text(config: Mapping[str, object]) -> str:
    """Option values as an indented block."""
    lines = json.dumps(dict(config), indent=2, sort_keys=True, default=str).splitlines()
    return "\n".join(f"    {line}" for line in lines)
