"""LoadCounter：累加、待用的计数、检查点与线程、复制。"""

import copy
import pickle
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from deepseek_opt.errors import InputError
from deepseek_opt.load import LoadCounter, gathered, in_backward, load_holders


def ints(*values):
    return torch.tensor(values)


def test_add_accumulates_and_snapshot_is_a_copy():
    load = LoadCounter(3)
    load.add(ints(1, 0, 2))
    seen = load.snapshot()
    load.add(ints(0, 5, 0))
    assert seen.tolist() == [1, 0, 2] and load.snapshot().tolist() == [1, 5, 2]
    assert seen.dtype == torch.int64


@settings(max_examples=50)
@given(st.lists(st.integers(0, 6), max_size=30))
def test_indices_are_counted_and_sentinels_are_not(indices):
    load = LoadCounter(5)
    load.add_indices(torch.tensor(indices, dtype=torch.int64).view(-1, 1))
    assert load.snapshot().tolist() == [indices.count(e) for e in range(5)]


def test_only_training_forwards_are_pending():
    load = LoadCounter(2)
    load.add(ints(1, 0), training=True)
    load.add(ints(0, 4), training=False)
    with torch.no_grad():
        load.add(ints(8, 8))
    load.add(ints(1, 1))  # 没有说明时看是否记录梯度
    assert load.pending().tolist() == [2, 1]
    assert load.snapshot().tolist() == [10, 13]
    load.clear_pending()
    assert load.pending().tolist() == [0, 0] and load.snapshot().tolist() == [10, 13]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_recomputation_is_not_counted(reentrant):
    load, passes = LoadCounter(2), []

    def block(x):
        passes.append(in_backward())
        load.add(ints(3, 1), training=True)
        load.add_indices(ints(0), training=True)
        return x.sin()

    x = torch.ones(4, requires_grad=True)
    checkpoint(block, x, use_reentrant=reentrant).sum().backward()
    assert passes == [False, True]  # 确实重算了一遍
    assert load.snapshot().tolist() == [4, 1] == load.pending().tolist()


def test_threads_lose_nothing():
    load = LoadCounter(4)

    def work():
        for _ in range(200):
            load.add(torch.ones(4, dtype=torch.int64), training=True)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert load.snapshot().tolist() == [800] * 4 == load.pending().tolist()


def test_inference_mode_and_training_can_alternate():
    load = LoadCounter(2)
    with torch.inference_mode():
        load.add(ints(1, 2))
    load.add(ints(1, 2), dropped=ints(3).sum())
    assert load.snapshot().tolist() == [2, 4] and load.dropped() == 3
    load.reset()
    assert load.snapshot().tolist() == [0, 0] == load.pending().tolist() and load.dropped() == 0


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_start_from_zero(duplicate):
    load = LoadCounter(2)
    load.add(ints(1, 2))
    other = duplicate(load)
    assert other.snapshot().tolist() == [0, 0] and other.num_experts == 2
    other.add(ints(5, 5))
    assert load.snapshot().tolist() == [1, 2]


def test_bad_counts_change_nothing():
    load = LoadCounter(2)
    for counts in (ints(1, 2, 3), torch.zeros(2), ints(1)):
        with pytest.raises(InputError, match="counts：应为"):
            load.add(counts)
    assert load.snapshot().tolist() == [0, 0]
    for experts in (0, -1, 2.0, True):
        with pytest.raises(InputError, match="num_experts：应为正整数"):
            LoadCounter(experts)


def test_holders_are_the_module_and_its_patch():
    class Patch:
        def __init__(self):
            self.load_counter = LoadCounter(2)

    plain, patched, own = (torch.nn.Linear(2, 2) for _ in range(3))
    patched.__dict__["forward"] = Patch()
    own.load_counter = LoadCounter(3)
    assert not load_holders(plain)
    assert load_holders(patched) == [patched.__dict__["forward"]]
    assert load_holders(own) == [own]
    assert "3" in repr(own.load_counter)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gathered_counts_arrive_together(mode):
    """块内的先记着，出块时一起加；同一个计数器用两次、训练的、丢弃的也对；出错的不加。"""
    first, second = LoadCounter(3), LoadCounter(3)
    counts = torch.tensor([1, 0, 2])
    with mode():
        for twice in (False, True):
            with gathered():
                first.add(counts, training=False)
                second.add(counts, training=False)
                if twice:
                    first.add(counts, training=False)
                assert second.snapshot().sum() == 3 * twice
    with gathered():
        second.add(counts, training=True)
        second.add(counts, dropped=torch.tensor(4), training=False)
    assert first.snapshot().tolist() == [3, 0, 6] and second.snapshot().tolist() == [4, 0, 8]
    assert second.pending().tolist() == [1, 0, 2] and second.dropped() == 4
    with pytest.raises(KeyError), gathered():
        first.add(counts, training=False)
        raise KeyError
    first.add(counts, training=False)
    assert first.snapshot().tolist() == [4, 0, 8]
