"""The lines a run begins with on the console."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class StartFacts:
    """The size of a run.

    Attributes:
        train_images: Training images times repeats.
        reg_images: Regularisation images times repeats.
        validation_images: Validation images times repeats.
        batches_per_epoch: Batches of an epoch, over all processes.
        epochs: Epochs begun in the run.
        batch_sizes: Batch size of each data set, per process.
        accumulation: Batches added up for an optimizer step, per process.
        processes: Number of processes.
        steps_per_epoch: Optimizer steps of an epoch.
        total_steps: Optimizer steps of the run.
        start_step: Steps already done by an earlier run.
        epochs_asked: Number of epochs that set the length, where epochs were asked for.
    """

    train_images: int
    reg_images: int
    validation_images: int = 0
    batches_per_epoch: int
    epochs: int
    batch_sizes: tuple[int, ...]
    accumulation: int
    processes: int
    steps_per_epoch: int
    total_steps: int
    start_step: int = 0
    epochs_asked: int | None = None


def startup_lines(facts: StartFacts) -> list[str]:
    """What a run is about to do, one line each."""
    sizes = ", ".join(str(size) for size in facts.batch_sizes)
    lines = [
        "running training",
        f"  num train images * repeats: {facts.train_images}",
        f"  num validation images * repeats: {facts.validation_images}",
        f"  num reg images: {facts.reg_images}",
        f"  num batches per epoch: {facts.batches_per_epoch}",
        f"  num epochs: {facts.epochs}",
        f"  batch size per device: {sizes}",
        f"  gradient accumulation steps: {facts.accumulation}",
        f"  num processes: {facts.processes}",
        f"  total optimization steps: {facts.total_steps}",
    ]
    lines += _arithmetic(facts)
    if facts.epochs_asked is not None:
        lines.insert(0, f"override steps. steps for {facts.epochs_asked} epochs is: {facts.total_steps}")
    if facts.start_step:
        lines.append(f"  continuing after step: {facts.start_step}")
    return lines


def _arithmetic(facts: StartFacts) -> list[str]:
    """How the number of steps comes about."""
    batches, steps, total = facts.batches_per_epoch, facts.steps_per_epoch, facts.total_steps
    group = facts.accumulation * facts.processes
    epoch = f"  an epoch: {batches} batches / ({facts.accumulation} accumulated x {facts.processes} processes)"
    rounded = " (rounded up)" if batches % group else ""
    if facts.epochs_asked is not None:
        run = f"{facts.epochs_asked} epochs x {steps} steps = {total} steps"
    else:
        exact = total / steps
        run = f"{total} steps / {steps} steps an epoch = {exact:g} epochs"
    return [f"{epoch} = {steps} steps{rounded}", f"  the run: {run}"]
