"""各行长度不同的缓存：K、V 层与逐行的 Python 列表逐步对照；整个缓存的截断与取行；坏输入。"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from deepseek_opt.cache import LatentCache
from deepseek_opt.cache_rows import crop_rows, select_rows
from deepseek_opt.errors import InputError
from deepseek_opt.integrations.hf_kv_cache import RaggedDynamicLayer
from deepseek_opt.kv_layer import KVLayer

HEADS, WIDTH, VALUE = 2, 3, 5


def fresh(rows: int, steps: int):
    return torch.randn(rows, HEADS, steps, WIDTH), torch.randn(rows, 1, steps, VALUE)


def agrees(layer: KVLayer, rows: list) -> None:
    """rows 是各行的 (K [n, H, D]、V) 列表。"""
    assert layer.lengths.tolist() == [len(k) for k, _ in rows]
    assert layer.length == max(len(k) for k, _ in rows)
    keys, values = layer.views()
    assert bool(keys.isfinite().all()) and bool(values.isfinite().all())
    for b, (k, v) in enumerate(rows):
        assert torch.equal(keys[b].transpose(0, 1)[: len(k)], k)
        assert torch.equal(values[b].transpose(0, 1)[: len(v)], v)


@given(data=st.data())
@settings(max_examples=60)
def test_any_sequence_of_operations(data):
    draw = data.draw
    layer, count = KVLayer(), draw(st.integers(1, 4))
    rows = [(torch.empty(0, HEADS, WIDTH), torch.empty(0, 1, VALUE)) for _ in range(count)]
    for _ in range(draw(st.integers(1, 12))):
        action = draw(
            st.sampled_from(["append", "append", "crop", "crop_rows", "select", "reorder"])
        )
        if action == "append" or not layer.buffers():
            steps = draw(st.sampled_from([1, 2, 5, 90]))
            k, v = fresh(len(rows), steps)
            layer.append(k, v)
            rows = [
                (torch.cat((a, k[b].transpose(0, 1))), torch.cat((c, v[b].transpose(0, 1))))
                for b, (a, c) in enumerate(rows)
            ]
        elif action == "crop":
            n = draw(st.integers(0, min(len(k) for k, _ in rows)))
            layer.crop(-n)
            rows = [(k[: len(k) - n], v[: len(v) - n]) for k, v in rows]
        elif action == "crop_rows":
            ends = [draw(st.integers(0, len(k))) for k, _ in rows]
            layer.crop_rows(ends)
            rows = [(k[:n], v[:n]) for (k, v), n in zip(rows, ends, strict=True)]
        else:
            size = len(rows) if action == "reorder" else draw(st.integers(1, 4))
            index = [draw(st.integers(0, len(rows) - 1)) for _ in range(size)]
            getattr(layer, action)(torch.tensor(index))
            rows = [rows[i] for i in index]
        agrees(layer, rows)
    assert layer.nbytes == sum(b.numel() * b.element_size() for b in layer.buffers())
    layer.repeat_interleave(2)
    agrees(layer, [row for row in rows for _ in range(2)])
    layer.reset()
    assert layer.length == 0 and layer.lengths is None and layer.nbytes == 0


@pytest.mark.parametrize("window", [None, 1, 3])
def test_visible_is_causal_per_row(window):
    layer = KVLayer()
    layer.append(*fresh(3, 6))
    layer.crop_rows([6, 2, 0])
    seen = layer.visible(2, window)[:, 0]
    assert seen.shape == (3, 2, 8)
    for b, length in enumerate((6, 2, 0)):
        for t in range(2):
            for slot in range(8):
                near = window is None or slot > length + t - window
                assert bool(seen[b, t, slot]) == (slot <= length + t and near)


@pytest.mark.parametrize(
    "keys, values",
    [
        (torch.zeros(2, HEADS, WIDTH), torch.zeros(2, 1, 1, VALUE)),
        (torch.zeros(2, HEADS, 1, WIDTH), torch.zeros(2, 1, 2, VALUE)),
        (torch.zeros(3, HEADS, 1, WIDTH), torch.zeros(3, 1, 1, VALUE)),
        (torch.zeros(2, HEADS, 1, 9), torch.zeros(2, 1, 1, VALUE)),
        (torch.zeros(2, HEADS, 1, WIDTH), torch.zeros(2, 4, 1, VALUE)),
        (torch.zeros(2, HEADS, 1, WIDTH).half(), torch.zeros(2, 1, 1, VALUE).half()),
        (torch.zeros(2, HEADS, 90, WIDTH), torch.zeros(2, 1, 90, VALUE).double()),
        (torch.zeros(2, HEADS, 1, WIDTH, device="meta"), torch.zeros(2, 1, 1, VALUE)),
    ],
)
@pytest.mark.parametrize("ragged", [False, True])
def test_bad_input_changes_nothing(keys, values, ragged):
    layer = KVLayer(name="第 3 层")
    layer.append(*fresh(2, 4))
    layer.crop_rows([4, 2 if ragged else 4])
    before = [b.clone() for b in layer.buffers()]
    with pytest.raises(InputError, match="第 3 层"):
        layer.append(keys, values)
    assert layer.lengths.tolist() == [4, 2 if ragged else 4]
    assert all(torch.equal(a, b) for a, b in zip(before, layer.buffers(), strict=True))


def test_limits_and_bad_rows():
    layer = KVLayer(max_length=5, name="第 0 层")
    with pytest.raises(InputError, match="还是空的"):
        layer.crop_rows([1])
    layer.append(*fresh(2, 4))
    with pytest.raises(InputError, match="max_length=5"):
        layer.append(*fresh(2, 2))
    layer.append(*fresh(2, 1))
    assert layer.capacity == 5
    for lengths, message in (([1], "2 个值"), ([1, 6], "之间"), ([-1, 2], "之间")):
        with pytest.raises(InputError, match=message):
            layer.crop_rows(lengths)
    with pytest.raises(InputError, match="不能去掉"):
        layer.crop(-6)
    with pytest.raises(InputError, match="行下标"):
        layer.select(torch.tensor([2]))
    assert layer.lengths.tolist() == [5, 5]


def _latent():
    cache = LatentCache(2)
    for index in range(2):
        cache.update(index, torch.randn(3, 4, 8), torch.randn(3, 4, 2))
    return cache


def _dynamic():
    cache = DynamicCache()
    cache.layers = [RaggedDynamicLayer(), RaggedDynamicLayer(), RaggedDynamicLayer()]
    for index in range(2):  # 第三层还没有写入过
        cache.update(*fresh(3, 4), index)
    return cache


@pytest.mark.parametrize("make", [_latent, _dynamic])
def test_whole_cache(make):
    cache = make()
    crop_rows(cache, [4, 1, 2])
    assert all(layer.lengths.tolist() == [4, 1, 2] for layer in cache.layers[:2])
    select_rows(cache, [2, 0])
    assert all(layer.lengths.tolist() == [2, 4] for layer in cache.layers[:2])
    with pytest.raises(InputError, match="之间"):
        crop_rows(cache, [3, 4])
    assert all(layer.lengths.tolist() == [2, 4] for layer in cache.layers[:2])


def test_shorter_rows_read_as_zeros_after_tidying():
    """潜变量的缓冲区没有初始化过：短的行在视图里的尾巴清零，长的行不变。"""
    layer = LatentCache(1).layer(0)
    layer.append(torch.ones(2, 4, 8), torch.ones(2, 4, 2))
    layer.crop_rows([4, 1])
    for buffer in layer.buffers():
        buffer[1, 1:] = torch.nan
    assert torch.equal(
        layer.dequantized(),
        torch.tensor([4, 1])[:, None, None]
        .gt(torch.arange(4)[None, :, None])
        .float()
        .expand(2, 4, 8),
    )
    layer.append(torch.full((2, 1, 8), 2.0), torch.ones(2, 1, 2))
    assert layer.dequantized()[:, :, 0].tolist() == [[1, 1, 1, 1, 2], [1, 2, 0, 0, 0]]


def test_own_cache_is_asked():
    class Own:
        calls = []

        def crop_rows(self, lengths):
            self.calls.append(("crop", list(lengths)))

        def select(self, index):
            self.calls.append(("select", index.tolist()))

    crop_rows(Own(), [1, 2])
    select_rows(Own(), [0])
    assert Own.calls == [("crop", [1, 2]), ("select", [0])]


def test_hf_layer_interface():
    layer = RaggedDynamicLayer()
    assert layer.keys is None and layer.values is None and layer.dtype is None
    assert not layer.is_initialized and layer.get_seq_length() == 0 and layer.device is None
    keys, values = fresh(2, 3)
    layer.lazy_initialization(keys, values)
    got = layer.update(keys, values)
    assert torch.equal(got[0], keys) and torch.equal(layer.values, values)
    assert layer.is_initialized and layer.dtype == torch.float32 and layer.device.type == "cpu"
    layer.batch_repeat_interleave(2)
    layer.reorder_cache(torch.tensor([3, 2, 1, 0]))
    layer.batch_select_indices(torch.tensor([0, 3]))
    assert torch.equal(layer.keys, keys.flip(0))
    layer.crop(-1)
    assert layer.get_seq_length() == 2
    layer.reset()
    assert layer.keys is None
