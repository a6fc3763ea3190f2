"""The data loader: the same batches however many workers make them."""

import gc
import multiprocessing
import os
import signal
import sys
import traceback
from dataclasses import dataclass

import pytest
import torch
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from library.data.dataset import Batch, TrainingDataset
from library.data.epoch_plan import MicroBatch
from library.data.loader import available_processors, build_loader
from library.data.options import LoaderOptions
from library.data.spec import AugmentRules, CaptionRules
from library.errors import Problem, UserError
from tests.library.data.small_set import make_data, tokenize
from tests.library.data.test_dataset import same

KEYS = [MicroBatch(1, step, (step,)) for step in range(4)]


def options(workers):
    return LoaderOptions(max_data_loader_n_workers=workers)


def blank(key):
    return Batch(
        epoch=key.epoch,
        step=key.step,
        examples=key.examples,
        input_ids=torch.zeros(1, 1, 77, dtype=torch.int64),
        captions=("",),
        loss_weight=torch.ones(1),
    )


@dataclass
class Source:
    """Blank batches; what ``fate`` names happens at step 2."""

    fate: str = ""

    def __getitem__(self, key):
        if key.step == 2:
            if self.fate == "user":
                raise UserError.of([Problem("first", "a.png", "mend it"), Problem("second")])
            if self.fate == "defect":
                raise RuntimeError("our own mistake")
            if self.fate == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
        return blank(key)


@dataclass
class Inspecting:
    """Batches that tell about their worker."""

    def __getitem__(self, key):
        import cv2

        ignores_interrupt = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        facts = (os.getpid(), torch.get_num_threads(), cv2.getNumThreads(), ignores_interrupt)
        return Batch(
            epoch=key.epoch,
            step=key.step,
            examples=facts,
            input_ids=torch.zeros(1, 1, 77, dtype=torch.int64),
            captions=("",),
            loss_weight=torch.ones(1),
        )


@pytest.fixture
def two_processors(monkeypatch):
    monkeypatch.setattr("library.data.loader.available_processors", lambda: 2)


@pytest.mark.usefixtures("two_processors")
def test_the_number_of_workers_changes_nothing(tmp_path):
    rules = AugmentRules(flip_aug=True, color_aug=True)
    data = make_data(tmp_path, augment=rules, captions=CaptionRules(shuffle_caption=True), batch_size=2)
    plan = data.plan(3, accumulation=1, world=1)
    dataset = TrainingDataset(data=data, seed=3, total_steps=18, tokenize=tokenize)

    def batches(workers):
        return list(build_loader(dataset, lambda: plan.micro_batches(2, 3 * plan.steps_per_epoch, 0), options(workers)))

    alone, one, two = batches(0), batches(1), batches(2)
    assert [batch.step for batch in alone] == list(range(2, 3 * plan.steps_per_epoch))
    assert {batch.epoch for batch in alone} == {1, 2, 3}
    assert len(one) == len(two) == len(alone)
    assert all(same(x, y) and same(x, z) for x, y, z in zip(alone, one, two, strict=True))


@pytest.mark.usefixtures("two_processors")
def test_workers_live_for_the_whole_run_and_stay_in_their_place():
    keys = [MicroBatch(1 + step // 4, step, (step,)) for step in range(12)]
    seen = [batch.examples for batch in build_loader(Inspecting(), lambda: keys, options(2))]
    assert len({pid for pid, *_ in seen} - {os.getpid()}) == 2
    assert {facts for _, *facts in map(list, seen) for facts in [tuple(facts)]} == {(1, 1, True)}


@pytest.mark.usefixtures("two_processors")
@pytest.mark.parametrize("workers", [0, 1])
def test_a_users_mistake_comes_home_unchanged(workers):
    found = []
    with pytest.raises(UserError) as caught:
        found += [batch.step for batch in build_loader(Source("user"), lambda: KEYS, options(workers))]
    assert caught.value.problems == (Problem("first", "a.png", "mend it"), Problem("second"))
    assert "Traceback" not in str(caught.value)


@pytest.mark.usefixtures("two_processors")
@pytest.mark.parametrize("workers", [0, 1])
def test_our_own_mistake_keeps_its_traceback(workers):
    message = ""
    try:
        list(build_loader(Source("defect"), lambda: KEYS, options(workers)))
    except RuntimeError as error:
        message = str(error) + "".join(traceback.format_tb(error.__traceback__))
        # Torch's part of it is a cycle, and workers freed by the cycle collector take seconds to end.
        error.with_traceback(None)
    assert "our own mistake" in message
    assert "in __getitem__" in message


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
@pytest.mark.usefixtures("two_processors")
def test_a_killed_worker_is_explained(monkeypatch):
    # Torch looks after its workers every five seconds: too long for a test.
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.2,))
    with pytest.raises(UserError, match="ended unexpectedly") as caught:
        list(build_loader(Source("killed"), lambda: KEYS, options(1)))
    assert caught.value.problems[0].where == "--max_data_loader_n_workers"


@pytest.mark.parametrize(("asked", "processors", "expected"), [(8, 2, 2), (1, 4, 1), (0, 4, 0)])
def test_workers_are_capped_by_the_processors(monkeypatch, asked, processors, expected):
    started = []
    monkeypatch.setattr("library.data.loader.available_processors", lambda: processors)
    monkeypatch.setattr(
        "library.data.loader.DataLoader", lambda *args, num_workers, **kwargs: started.append(num_workers)
    )
    build_loader(Source(), lambda: KEYS, options(asked))
    assert started == [expected]
    assert available_processors() >= 1


def test_the_global_generator_is_not_drawn_from():
    before = torch.get_rng_state()
    assert [batch.step for batch in build_loader(Source(), lambda: KEYS, options(0))] == [0, 1, 2, 3]
    assert torch.equal(torch.get_rng_state(), before)


def test_keys_are_asked_for_as_they_are_needed():
    taken = []

    def keys():
        for key in KEYS:
            taken.append(key)
            yield key

    batches = iter(build_loader(Source(), keys, options(0)))
    next(batches)
    assert len(taken) == 1


@pytest.mark.usefixtures("two_processors")
def test_workers_end_when_iteration_is_left():
    batches = iter(build_loader(Source(), lambda: KEYS, options(2)))
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    batches.close()
    del batches
    gc.collect()
    assert not multiprocessing.active_children()


@pytest.mark.usefixtures("two_processors")
def test_workers_can_be_started_from_nothing(tmp_path):
    """As on Windows and macOS, where a worker inherits nothing and is sent everything."""
    data = make_data(tmp_path)
    dataset = TrainingDataset(data=data, seed=3, total_steps=5, tokenize=tokenize)
    former = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    try:
        made = list(build_loader(dataset, lambda: KEYS[:2], options(1)))
    finally:
        multiprocessing.set_start_method(former, force=True)
    assert all(same(batch, dataset[key]) for batch, key in zip(made, KEYS, strict=False))
    assert len(made) == 2
