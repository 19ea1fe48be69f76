from __future__ import annotations

import torch
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given
from hypothesis import strategies as st

from bkd_hf.sampling import GlobalBatchSampler, IgnoredCopies

ways_to_cut = st.sampled_from([(24, 1, 1), (8, 3, 1), (12, 1, 2), (4, 3, 2), (2, 4, 3), (1, 8, 3), (3, 1, 8)])


def steps(sampler: GlobalBatchSampler, size: int) -> list[list[int]]:
    """The real examples of each optimizer step, in order."""
    per_step = sampler.accumulation_steps * sampler.num_processes
    batches = list(sampler)
    return [
        [i for batch in batches[start : start + per_step] for i in batch if i < size]
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
    seen = [i for shard in shards for batch in shard for i in batch if i < size]
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
    data = IgnoredCopies([{"x": torch.tensor(i), "labels": i} for i in range(9)])
    sampler = GlobalBatchSampler(9, 2, 1, 4)
    last = [data.__getitems__(batch) for batch in list(sampler)[4:]]
    assert [len(batch) for batch in last] == [1, 1, 1, 1]
    assert [batch[0]["labels"] == -100 for batch in last] == [False, True, True, True]
    assert data[3]["labels"] == 3
