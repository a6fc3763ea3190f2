"""Properties of the epoch plan over random buckets."""

import pickle
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from library.data.epoch_plan import EpochPlan, PlanBucket

SEEDS = st.integers(0, 2**32 - 1)


def make_buckets(sizes, batch_sizes):
    buckets, first = [], 0
    for size, batch_size in zip(sizes, batch_sizes, strict=True):
        buckets.append(PlanBucket(tuple(range(first, first + size)), batch_size))
        first += size
    return buckets


@st.composite
def bucket_lists(draw, max_size=30):
    sizes = draw(st.lists(st.integers(1, max_size), min_size=1, max_size=6))
    return make_buckets(sizes, [draw(st.integers(1, 5)) for _ in sizes])


def sets_per_step(plan, epoch):
    return [Counter(x for batch in step.micro_batches for x in batch.examples) for step in plan.epoch(epoch)]


@settings(max_examples=150, deadline=None)
@given(
    buckets=bucket_lists(), seed=SEEDS, accumulation=st.integers(1, 4), world=st.integers(1, 4), epoch=st.integers(1, 9)
)
def test_every_epoch_lists_every_example_exactly_once(buckets, seed, accumulation, world, epoch):
    plan = EpochPlan(buckets, seed, accumulation, world)
    steps = plan.epoch(epoch)
    seen = [x for step in steps for batch in step.micro_batches for x in batch.examples]
    assert sorted(seen) == list(range(sum(len(bucket.examples) for bucket in buckets)))

    batches = sum(-(-len(bucket.examples) // bucket.batch_size) for bucket in buckets)
    group = accumulation * world
    assert plan.batches_per_epoch == batches
    assert len(steps) == plan.steps_per_epoch == (batches + group - 1) // group
    assert all(1 <= len(step.micro_batches) <= group for step in steps)
    assert all(step.size == sum(len(batch.examples) for batch in step.micro_batches) for step in steps)


@settings(max_examples=100, deadline=None)
@given(buckets=bucket_lists(), seed=SEEDS, accumulation=st.integers(1, 3), world=st.integers(1, 3))
def test_a_batch_stays_within_a_bucket_and_its_batch_size(buckets, seed, accumulation, world):
    home = {x: bucket for bucket in buckets for x in bucket.examples}
    for step in EpochPlan(buckets, seed, accumulation, world).epoch(1):
        for batch in step.micro_batches:
            bucket = home[batch.examples[0]]
            assert all(home[x] is bucket for x in batch.examples)
            assert 1 <= len(batch.examples) <= bucket.batch_size


@settings(max_examples=100, deadline=None)
@given(buckets=bucket_lists(), seed=SEEDS, accumulation=st.integers(1, 3), world=st.integers(1, 4))
def test_processes_share_each_step_without_overlap(buckets, seed, accumulation, world):
    plan = EpochPlan(buckets, seed, accumulation, world)
    last = 2 * plan.steps_per_epoch
    ranks = [list(plan.micro_batches(0, last, rank)) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    for step in range(last):
        mine = [[batch for batch in batches if batch.step == step] for batches in ranks]
        assert {len(batches) for batches in mine} == {plan.slots(step)}
        assert plan.slots(step) <= accumulation
        real = [batch for batches in mine for batch in batches if not batch.is_padding]
        expected = plan.epoch(plan.epoch_of(step))[step % plan.steps_per_epoch]
        assert Counter(real) == Counter(expected.micro_batches)
        assert sum(len(batch.examples) for batch in real) == plan.step_size(step)
        # Padding fills no more than the last slot, and only where that slot has work on some process.
        for batches in mine:
            assert all(not batch.is_padding for batch in batches[:-1])
        assert any(not batches[-1].is_padding for batches in mine)
        padding = [batch for batches in mine for batch in batches if batch.is_padding]
        assert all(batch.examples == expected.micro_batches[0].examples for batch in padding)


@settings(max_examples=100, deadline=None)
@given(
    groups=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    batch_size=st.integers(1, 3),
    n=st.integers(1, 4),
    seed=SEEDS,
)
def test_large_batches_processes_and_accumulation_train_on_the_same_sets(groups, batch_size, n, seed):
    """Batch N*B == B on N processes == B accumulated N times, step by step, where buckets fill whole groups."""
    sizes = [count * batch_size * n for count in groups]
    single = EpochPlan(make_buckets(sizes, [batch_size * n] * len(sizes)), seed, 1, 1)
    small = make_buckets(sizes, [batch_size] * len(sizes))
    for epoch in (1, 2):
        expected = sets_per_step(single, epoch)
        assert sets_per_step(EpochPlan(small, seed, 1, n), epoch) == expected
        assert sets_per_step(EpochPlan(small, seed, n, 1), epoch) == expected


def test_two_processes_with_accumulation_equal_four_accumulated():
    buckets = make_buckets([8, 16, 24], [2, 2, 2])
    assert sets_per_step(EpochPlan(buckets, 3, 2, 2), 1) == sets_per_step(EpochPlan(buckets, 3, 4, 1), 1)


@settings(max_examples=60, deadline=None)
@given(buckets=bucket_lists(), seed=SEEDS, accumulation=st.integers(1, 3), world=st.integers(1, 3), data=st.data())
def test_starting_late_gives_the_tail_of_the_full_sequence(buckets, seed, accumulation, world, data):
    plan = EpochPlan(buckets, seed, accumulation, world)
    end = 3 * plan.steps_per_epoch
    start = data.draw(st.integers(0, end))
    for rank in range(world):
        full = list(plan.micro_batches(0, end, rank))
        tail = list(EpochPlan(buckets, seed, accumulation, world).micro_batches(start, end, rank))
        assert tail == [batch for batch in full if batch.step >= start]


def test_steps_and_epochs_are_numbered_through():
    plan = EpochPlan(make_buckets([5, 3], [2, 2]), 1, 1, 1)
    batches = list(plan.micro_batches(0, 2 * plan.steps_per_epoch, 0))
    assert plan.steps_per_epoch == 5
    assert [batch.step for batch in batches] == list(range(10))
    assert [batch.epoch for batch in batches] == [1] * 5 + [2] * 5
    assert [plan.epoch_of(step) for step in range(10)] == [1] * 5 + [2] * 5


def test_the_plan_is_pure_and_depends_on_seed_and_epoch():
    buckets = make_buckets([40, 24], [4, 4])
    plan = EpochPlan(buckets, 7, 1, 1)
    first, second = plan.epoch(1), plan.epoch(2)
    assert plan.epoch(1) == first == EpochPlan(buckets, 7, 1, 1).epoch(1) == pickle.loads(pickle.dumps(plan)).epoch(1)
    assert sets_per_step(plan, 1) != sets_per_step(plan, 2)
    assert first != second
    assert EpochPlan(buckets, 8, 1, 1).epoch(1) != first


def test_buckets_are_mixed_within_an_epoch():
    """Groups of all buckets are shuffled together: no bucket comes as one block."""
    plan = EpochPlan(make_buckets([50, 50], [1, 1]), 0, 1, 1)
    sides = [step.micro_batches[0].examples[0] < 50 for step in plan.epoch(1)]
    assert sum(a != b for a, b in zip(sides, sides[1:], strict=False)) > 20


def test_a_short_step_pads_the_processes_that_have_no_batch():
    plan = EpochPlan([PlanBucket((0, 1, 2), 1)], 0, 1, 2)
    ranks = [list(plan.micro_batches(0, 2, rank)) for rank in (0, 1)]
    padded = [batch for batches in ranks for batch in batches if batch.is_padding]
    assert len(padded) == 1
    assert plan.step_size(padded[0].step) == 1


@pytest.mark.parametrize(("accumulation", "world"), [(0, 1), (1, 0)])
def test_senseless_splits_are_our_own_mistake(accumulation, world):
    with pytest.raises(AssertionError):
        EpochPlan([PlanBucket((0,), 1)], 0, accumulation, world)
