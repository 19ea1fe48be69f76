from __future__ import annotations

import numpy as np
import torch
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given
from hypothesis import strategies as st
from transformers import default_data_collator

from bkd_hf.sampling import CollateSampled, GlobalBatchSampler, SampledExamples

ways_to_cut = st.sampled_from([(24, 1, 1), (8, 3, 1), (12, 1, 2), (4, 3, 2), (2, 4, 3), (1, 8, 3), (3, 1, 8)])


def steps(sampler: GlobalBatchSampler, size: int) -> list[list[int]]:
    """The real examples of each optimizer step, in order."""
    per_step = sampler.accumulation_steps * sampler.num_processes
    batches = list(sampler)
    return [
        [i for batch in batches[start : start + per_step] for i in batch if i >= 0]
        for start in range(0, len(batches), per_step)
    ]


@given(size=st.integers(1, 200), cut=ways_to_cut, epoch=st.integers(0, 5))
def test_steps_do_not_depend_on_how_they_are_cut(size, cut, epoch):
    whole, parts = GlobalBatchSampler(size, 24, seed=3), GlobalBatchSampler(size, *cut, seed=3)
    for sampler in (whole, parts):
        sampler.set_epoch(epoch)
    assert steps(parts, size) == steps(whole, size)
    assert sorted(i for step in steps(parts, size) for i in step) == list(range(size))


@given(size=st.integers(1, 200), cut=ways_to_cut)
def test_every_process_gets_as_many_batches_none_empty(size, cut):
    sampler = GlobalBatchSampler(size, *cut)
    shards = [list(BatchSamplerShard(sampler, cut[2], rank)) for rank in range(cut[2])]
    assert {len(shard) for shard in shards} == {len(sampler) // cut[2]}
    assert all(0 < len(batch) <= cut[0] for shard in shards for batch in shard)
    seen = [i for shard in shards for batch in shard for i in batch if i >= 0]
    assert sorted(seen) == list(range(size))


def test_order_changes_with_epoch_and_seed_only():
    def order(seed: int, epoch: int, shuffle: bool = True) -> list[int]:
        sampler = GlobalBatchSampler(50, 50, seed=seed, shuffle=shuffle)
        sampler.set_epoch(epoch)
        return next(iter(sampler))

    assert order(0, 1) == order(0, 1) != order(0, 2)
    assert order(0, 1) != order(1, 1)
    assert order(0, 1, shuffle=False) == list(range(50))


def test_drop_last_drops_the_short_step():
    sampler = GlobalBatchSampler(76, 8, 2, 2, drop_last=True)
    assert [len(step) for step in steps(sampler, 76)] == [32, 32]
    assert len(sampler) == 8


def test_idle_processes_get_ignored_copies():
    data = SampledExamples([{"x": torch.tensor(i), "labels": i} for i in range(9)])
    sampler = GlobalBatchSampler(9, 2, 1, 4)
    collate = CollateSampled(default_data_collator)
    last = [collate(data.__getitems__(batch)) for batch in list(sampler)[4:]]
    assert [len(batch["labels"]) for batch in last] == [1, 1, 1, 1]
    assert [batch["labels"].item() == -100 for batch in last] == [False, True, True, True]
    assert data[3]["labels"] == 3


def test_copies_are_ignored_whatever_makes_the_labels():
    data = SampledExamples([(torch.tensor([i]), i) for i in range(9)])
    collate = CollateSampled(
        lambda pairs: {"x": torch.cat([x for x, _ in pairs]), "labels": torch.tensor(pairs)[:, 1]}
    )
    batch = collate(data.__getitems__([4, -3, 5]))
    assert (batch["x"].tolist(), batch["labels"].tolist()) == ([4, 2, 5], [4, -100, 5])


@given(size=st.integers(1, 200), cut=ways_to_cut, epoch=st.integers(0, 5))
def test_padded_steps_are_the_same_in_micro_batches_of_one_size(size, cut, epoch):
    plain, padded = (GlobalBatchSampler(size, *cut, seed=3, pad_last=pad) for pad in (False, True))
    for sampler in (plain, padded):
        sampler.set_epoch(epoch)
    if size >= 24:  # or there is one step only, and nothing to be equal to
        assert {len(batch) for batch in padded} == {cut[0]}
    real = [[sum(i >= 0 for i in batch) for batch in sampler] for sampler in (padded, plain)]
    assert real[0] == real[1]  # copies go to all processes
    assert len(list(padded)) == len(padded) == len(plain)
    assert steps(padded, size) == steps(plain, size)
    assert all(-1 - i in range(size) for batch in padded for i in batch if i < 0)


def class_balanced(labels: np.ndarray, *cut: int, seed: int = 0, epoch: int = 0) -> GlobalBatchSampler:
    sampler = GlobalBatchSampler(len(labels), *cut, seed=seed, class_balanced_labels=labels)
    sampler.set_epoch(epoch)
    return sampler


@given(
    counts=st.lists(st.integers(1, 60), min_size=1, max_size=6),
    cut=ways_to_cut,
    epoch=st.integers(0, 5),
)
def test_class_balanced_steps_do_not_depend_on_how_they_are_cut(counts, cut, epoch):
    labels = np.repeat(np.arange(len(counts)), counts)
    whole = steps(class_balanced(labels, 24, epoch=epoch), len(labels))
    assert steps(class_balanced(labels, *cut, epoch=epoch), len(labels)) == whole
    drawn = [i for step in whole for i in step]
    assert len(drawn) == len(labels)  # an epoch stays as long
    assert len(set(drawn)) == len(drawn)  # the second time an example is drawn it has another index …
    for index in drawn:
        assert index < len(labels) or index - len(labels) in drawn  # … the next one after its first


def test_class_balanced_draws_classes_equally_often():
    labels = np.repeat([0, 1, 3], [9_000, 900, 100])  # class 2 has no examples, and is not drawn
    drawn = np.array([i for step in steps(class_balanced(labels, 100), 10_000) for i in step]) % 10_000
    shares = np.bincount(labels[drawn], minlength=4) / drawn.size
    np.testing.assert_allclose(shares, [1 / 3, 1 / 3, 0, 1 / 3], atol=0.02)
    # Within a class every example is as likely as any other.
    times = np.bincount(drawn, minlength=10_000)[9_900:]
    assert times.min() > 10
    assert times.max() < 65


def test_class_balanced_steps_draw_no_example_without_a_label():
    labels = np.array([0] * 60 + [1] * 30 + [-100] * 10)
    numbers = np.concatenate(list(GlobalBatchSampler(100, 10, class_balanced_labels=labels)))
    drawn = labels[numbers % 100]  # a repetition of an example has a number of its own
    assert set(drawn.tolist()) == {0, 1}


def test_class_balanced_order_is_a_function_of_seed_and_epoch():
    labels = np.repeat([0, 1], [40, 10])

    def order(seed: int, epoch: int) -> list[int]:
        return next(iter(class_balanced(labels, 50, seed=seed, epoch=epoch)))

    assert order(0, 1) == order(0, 1) != order(0, 2)
    assert order(0, 1) != order(1, 1)


def test_repetitions_reach_data_sets_that_distinguish_them():
    class Plain(list):
        pass

    class Distinguishing(list):
        distinguishes_repetitions = True

        def __getitem__(self, index):
            return {"x": index, "labels": index % 3}

    examples = [{"x": i, "labels": i} for i in range(3)]
    assert [e["x"] for e in SampledExamples(Plain(examples)).__getitems__([1, 4, 7])] == [1, 1, 1]
    assert [e["x"] for e in SampledExamples(Distinguishing(examples)).__getitems__([1, 4, 7])] == [1, 4, 7]
    inner = torch.utils.data.Subset(Distinguishing(examples), [2, 0])
    for part, expected in ((inner, [2, 3, 8]), (torch.utils.data.Subset(inner, [1, 0]), [0, 5, 6])):
        assert [e["x"] for e in SampledExamples(part).__getitems__([0, 3, 4])] == expected
