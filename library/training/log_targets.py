"""Where figures and previews of a run are logged: TensorBoard, Weights & Biases. Imports nothing heavy by itself."""

import importlib
import importlib.util
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import TYPE_CHECKING, Any, Final, Protocol

from library.disk_space import may_write
from library.documents import DocumentError, decode_text, parse_toml
from library.errors import Problem, UserError, raise_if_any
from library.options import did_you_mean
from library.training.options import LoggingOptions

if TYPE_CHECKING:
    from PIL.Image import Image

_WRITER_SETTINGS: Final = MappingProxyType(
    {"flush_secs": (int | float, "a number"), "max_queue": (int, "a whole number"), "filename_suffix": (str, "text")}
)
"""What TensorBoard's writer can be given: the kind of each, and what it is called."""
_SECTIONS: Final = ("tensorboard", "wandb")
_INSTALL: Final = MappingProxyType(
    {
        "tensorboard": ("--logging_dir", "pip install tensorboard   (or leave --logging_dir out)"),
        "wandb": ("--log_with", "pip install wandb   (or --log_with tensorboard)"),
    }
)


class LogTarget(Protocol):
    """One place that a run is logged to. Whatever goes wrong is raised; the tracker decides what that means.

    Attributes:
        name: What it is called in messages.
    """

    name: str

    def add(self, figures: Mapping[str, float], *, at: int, step: int) -> None:
        """Take in figures by tag.

        Args:
            figures: The values.
            at: Their place on the x axis, a step or an epoch.
            step: Finished steps.
        """

    def add_image(self, number: int, image: "Image", *, prompt: str, step: int) -> None:
        """Take in the preview of prompt ``number``, from 0, made after ``step`` steps."""

    def flush(self) -> None:
        """Write what has been taken in so far."""

    def close(self, *, failed: bool) -> None:
        """Write what is left; ``failed`` says that the run ended with an error."""


class TensorBoardLog:
    """Event files for TensorBoard.

    Args:
        folder: Their folder.
        settings: Further arguments of torch's ``SummaryWriter``.
        config: Text shown with the log.
        continued_at: Steps of an earlier part of the run that is logged there; what it logged later does not count.
    """

    name = "TensorBoard"

    def __init__(
        self, folder: Path, settings: Mapping[str, Any], config: str | None, *, continued_at: int | None = None
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder
        first = None if continued_at is None else continued_at + 1
        with _machine_unnamed():
            self._writer = SummaryWriter(str(folder), purge_step=first, **settings)
        self._prompts_told: set[int] = set()
        self._former_hook = threading.excepthook
        threading.excepthook = self._thread_failed
        if config is not None:
            self._writer.add_text("config", config)

    def add(self, figures: Mapping[str, float], *, at: int, step: int) -> None:
        """As :class:`LogTarget`."""
        self._check()
        for tag, value in figures.items():
            self._writer.add_scalar(tag, value, at)

    def add_image(self, number: int, image: "Image", *, prompt: str, step: int) -> None:
        """As :class:`LogTarget`; the prompt is among the texts, once."""
        import numpy as np

        self._check()
        tag = f"sample/{number:02d}"
        self._writer.add_image(tag, np.asarray(image.convert("RGB")), step, dataformats="HWC")
        if number not in self._prompts_told:
            # Texts are Markdown, in which four blanks keep a line as it is.
            self._writer.add_text(tag, f"    {' '.join(prompt.split())}", step)
            self._prompts_told.add(number)

    def flush(self) -> None:
        """As :class:`LogTarget`."""
        self._check()
        self._writer.flush()

    def close(self, *, failed: bool) -> None:
        """As :class:`LogTarget`."""
        try:
            self._writer.close()
        finally:
            threading.excepthook = self._former_hook

    def _thread_failed(self, failed: threading.ExceptHookArgs) -> None:
        # The thread that writes keeps its error, which is raised with the next figure: no need for its traceback.
        if type(failed.thread).__name__ != "_AsyncWriterThread":
            self._former_hook(failed)

    def _check(self) -> None:
        # On Linux, writing to a file that somebody has deleted succeeds.
        if not self._folder.is_dir():
            raise FileNotFoundError("its folder is gone")


@contextmanager
def _machine_unnamed() -> Iterator[None]:
    """Keep the name of this machine out of that of an event file."""
    from tensorboard.summary.writer import event_file_writer

    known = event_file_writer.socket
    event_file_writer.socket = SimpleNamespace(gethostname=lambda: "run")
    try:
        yield
    finally:
        event_file_writer.socket = known


class WandbLog:
    """A run at Weights & Biases; its x axis is the number of finished steps throughout.

    Args:
        project: Name of the project, unless the settings give one.
        folder: Where its files go before they are sent; its own choice when None.
        settings: Further arguments of ``wandb.init``.
        api_key: Logs in with this key; as the package is set up when None.
        config: Option values that are shown.
        former: Its number there, where an earlier part of the run was logged.

    Attributes:
        number: Its number there.

    Raises:
        UserError: The run cannot be begun.
    """

    name = "Weights & Biases"

    def __init__(
        self,
        *,
        project: str,
        folder: Path | None,
        settings: Mapping[str, Any],
        api_key: str | None,
        config: Mapping[str, object] | None,
        former: str | None = None,
    ) -> None:
        self._wandb: Any = importlib.import_module("wandb")
        continued = {} if former is None else {"id": former, "resume": "allow"}
        arguments: dict[str, Any] = {"project": project, **continued, **settings}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            arguments.setdefault("dir", str(folder))
        if config is not None:
            arguments["config"] = {**dict(config), **arguments.get("config", {})}
        try:
            if api_key is not None:
                self._wandb.login(key=api_key)
            self._run: Any = self._wandb.init(**arguments)
        except Exception as error:
            secret = str(error).replace(api_key, "***") if api_key else str(error)
            raise UserError(
                f"Weights & Biases cannot be logged to: {secret}",
                where="--log_with, --log_tracker_config",
                remedy="Run `wandb login`, set WANDB_MODE=offline to log without a connection, or use tensorboard.",
            ) from error
        self.number = str(getattr(self._run, "id", "") or "")

    def add(self, figures: Mapping[str, float], *, at: int, step: int) -> None:
        """As :class:`LogTarget`."""
        self._run.log(dict(figures), step=step)

    def add_image(self, number: int, image: "Image", *, prompt: str, step: int) -> None:
        """As :class:`LogTarget`."""
        self._run.log({f"sample_{number}": self._wandb.Image(image, caption=prompt)}, step=step)

    def flush(self) -> None:
        """As :class:`LogTarget`; what is logged is sent as it comes."""

    def close(self, *, failed: bool) -> None:
        """As :class:`LogTarget`."""
        self._run.finish(exit_code=int(failed))


def check_logging(options: LoggingOptions) -> list[Problem]:
    """What stands against logging as asked; imports nothing heavy."""
    problems = [
        Problem(f"{flag} needs the package {name}, which is not installed", where=flag, remedy=remedy)
        for name, (flag, remedy) in _INSTALL.items()
        if name in options.targets and importlib.util.find_spec(name) is None
    ]
    folder = options.logging_dir
    if folder is not None and folder.exists() and not folder.is_dir():
        problems.append(Problem(f"{folder} is a file, not a folder", "--logging_dir", "Choose another folder."))
    elif folder is not None and not may_write(folder):
        problems.append(
            Problem(f"{folder} cannot be written to", "--logging_dir", "Choose another folder, or allow it.")
        )
    try:
        tracker_settings(options)
    except UserError as error:
        problems += error.problems
    return problems


def tracker_settings(options: LoggingOptions) -> dict[str, dict[str, Any]]:
    """The settings of ``--log_tracker_config`` by tracker, with ``--wandb_run_name`` among those of wandb.

    Raises:
        UserError: With everything that is wrong with the file.
    """
    settings: dict[str, dict[str, Any]] = {name: {} for name in _SECTIONS}
    if options.log_tracker_config is not None:
        table = _read(options.log_tracker_config)
        raise_if_any(_problems(table, options.log_tracker_config))
        settings |= table
    if options.wandb_run_name is not None:
        settings["wandb"] = {**settings["wandb"], "name": options.wandb_run_name}
    return settings


def _read(path: Path) -> dict[str, Any]:
    try:
        return parse_toml(decode_text(path.read_bytes()))
    except OSError as error:
        reason = error.strerror or error
        where = "--log_tracker_config"
        raise UserError(f"{path} cannot be read: {reason}", where=where, remedy="Check the path.") from error
    except DocumentError as error:
        raise UserError(f"the file cannot be used: {error}", where=str(path), remedy="Mend the line.") from error


def _problems(table: Mapping[str, Any], path: Path) -> list[Problem]:
    problems = []
    for name, section in table.items():
        if name not in _SECTIONS or not isinstance(section, dict):
            remedy = did_you_mean(name, _SECTIONS) or "Sections: [tensorboard] and [wandb]."
            problems.append(Problem(f"there is no section [{name}]", str(path), remedy))
    tensorboard = table.get("tensorboard")
    for name, value in tensorboard.items() if isinstance(tensorboard, dict) else ():
        if name not in _WRITER_SETTINGS:
            remedy = did_you_mean(name, _WRITER_SETTINGS) or f"Settings: {', '.join(sorted(_WRITER_SETTINGS))}."
            problems.append(Problem(f"there is no setting {name} of [tensorboard]", str(path), remedy))
            continue
        kind, called = _WRITER_SETTINGS[name]
        if not isinstance(value, kind) or isinstance(value, bool):
            what = f"{name} of [tensorboard] expects {called}, not {value!r}"
            problems.append(Problem(what, str(path), "Correct it, or leave the line out."))
    return problems
