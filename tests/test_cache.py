"""LatentCache：增长、逐行长度、重排、量化、预算；出错时内容不变。不需要 transformers。"""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_opt import LatentCache
from deepseek_opt.cache_layer import LatentLayer, token_bytes
from deepseek_opt.errors import InputError, MemoryBudgetError, UnsupportedError

RANK, ROPE = 16, 8


def tokens(batch, steps, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    latent = torch.randn(batch, steps, RANK, generator=generator).to(dtype)
    return latent, torch.randn(batch, steps, ROPE, generator=generator).to(dtype)


def filled(layers=2, batch=2, steps=5, **options):
    cache = LatentCache(layers, **options)
    for index in range(layers):
        cache.update(index, *tokens(batch, steps, index))
    return cache


def contents(cache):
    return [(x.latent.clone(), x.rope.clone(), x.lengths.tolist(), x.length) for x in cache.layers]


def unchanged(cache, before):
    for (a, b, lengths, length), (c, d, lengths2, length2) in zip(
        before, contents(cache), strict=True
    ):
        assert torch.equal(a[:, :length], c[:, :length]) and torch.equal(
            b[:, :length], d[:, :length]
        )
        assert (lengths, length) == (lengths2, length2)


def test_update_returns_whole_buffers_without_copying():
    cache = LatentCache(1)
    latent, rope = tokens(2, 5)
    got, got_rope, scale = cache.update(0, latent, rope)
    assert torch.equal(got[:, :5], latent) and torch.equal(got_rope[:, :5], rope) and scale is None
    again, *_ = cache.update(0, *tokens(2, 1, 1))
    assert again.data_ptr() == got.data_ptr() and cache.get_seq_length() == 6
    assert cache.nbytes == 2 * again.shape[1] * (RANK + ROPE) * 4
    assert len(cache) == 1 and cache.batch_size == 2 and "长度=6" in repr(cache)


def test_transformers_style_update():
    cache, (latent, rope) = LatentCache(2), tokens(2, 4)
    cache.update(latent[:, None], rope[:, None], 1)
    keys, values = cache.update(latent[:, None], rope[:, None], 1)
    assert keys.shape == (2, 1, 8, RANK) and values.shape == (2, 1, 8, ROPE)
    assert torch.equal(keys[:, 0, 4:], latent) and not cache.is_initialized
    assert cache.get_mask_sizes(3, 1) == (11, 0) and cache.get_max_length() == -1


@settings(max_examples=40)
@given(st.lists(st.integers(1, 90), min_size=1, max_size=8), st.sampled_from([None, 300]))
def test_growth_keeps_contents(steps, limit):
    layer, parts = LatentLayer(max_length=limit), []
    for seed, count in enumerate(steps):
        fresh = tokens(2, count, seed)
        if limit is not None and layer.length + count > limit:
            with pytest.raises(InputError, match="max_length=300"):
                layer.append(*fresh)
            break
        layer.append(*fresh)
        parts.append(fresh)
        assert layer.length <= layer.capacity <= max(2 * layer.length, layer.length + 128)
        assert limit is None or layer.capacity <= limit
    if parts:
        assert torch.equal(layer.latent[:, : layer.length], torch.cat([a for a, _ in parts], 1))
        assert torch.equal(layer.rope[:, : layer.length], torch.cat([b for _, b in parts], 1))


@settings(max_examples=60)
@given(st.data())
def test_row_operations_match_a_list_of_rows(data):
    """随机的追加、逐行截断、重排、选择、重复，与“每行一个列表”的写法逐位相同。"""
    batch = data.draw(st.integers(1, 3))
    layer, rows, seed = LatentLayer(), [torch.empty(0, RANK)] * batch, 0
    layer.append(*tokens(batch, 0))
    for _ in range(data.draw(st.integers(1, 7))):
        action = data.draw(
            st.sampled_from(["append", "crop", "crop_rows", "reorder", "select", "repeat"])
        )
        if action == "append":
            seed += 1
            latent, rope = tokens(len(rows), data.draw(st.integers(1, 70)), seed)
            layer.append(latent, rope)
            rows = [torch.cat([old, new]) for old, new in zip(rows, latent, strict=True)]
        elif action == "crop":
            count = data.draw(st.integers(0, min(len(r) for r in rows)))
            layer.crop(-count)
            rows = [r[: len(r) - count] for r in rows]
        elif action == "crop_rows":
            ends = [data.draw(st.integers(0, len(r))) for r in rows]
            layer.crop_rows(ends)
            rows = [r[:end] for r, end in zip(rows, ends, strict=True)]
        elif action == "repeat":
            if len(rows) > 6:
                continue
            layer.repeat_interleave(2)
            rows = [r for r in rows for _ in range(2)]
        else:
            size = len(rows) if action == "reorder" else data.draw(st.integers(1, 4))
            index = [data.draw(st.integers(0, len(rows) - 1)) for _ in range(size)]
            getattr(layer, action)(torch.tensor(index))
            rows = [rows[i] for i in index]
        assert layer.lengths.tolist() == [len(r) for r in rows]
        assert layer.length == max(len(r) for r in rows)
        layer.tidy()
        for row, want in enumerate(rows):
            assert torch.equal(layer.latent[row, : len(want)], want)
            assert not layer.latent[row, len(want) : layer.length].any()  # 短行的尾部是 0


@pytest.mark.parametrize("kind", ["int8", "float8_e4m3fn"])
def test_quantized_stores_scales(kind):
    cache, dtype = filled(layers=1, dtype=kind), getattr(torch, kind)
    layer = cache.layers[0]
    assert layer.latent.dtype == dtype and layer.scale.dtype == torch.float32
    assert layer.rope.dtype == torch.bfloat16
    latent, _ = tokens(2, 5, 0)
    step = 0.51 / 127 if kind == "int8" else 2**-10 / 448
    relative = 0.01 if kind == "int8" else 0.01 + 2**-4  # 还原成 bf16 另有舍入
    bound = latent.abs().amax(-1, keepdim=True) * step + relative * latent.abs()
    assert ((layer.dequantized().float() - latent).abs() <= bound).all()
    cache.reorder(torch.tensor([1, 0]))
    cache.crop(-2)
    assert torch.allclose(layer.dequantized()[0].float(), latent[1, :3], atol=0.05, rtol=0.08)
    assert token_bytes(512, 64, dtype, torch.bfloat16) == 512 + 128 + 4


def test_mixed_dtypes_and_deepcopy():
    cache = filled(dtype=torch.bfloat16)
    assert cache.layers[0].latent.dtype == cache.layers[0].rope.dtype == torch.bfloat16
    twin = copy.deepcopy(cache)
    twin.reset()
    assert cache.get_seq_length() == 5 and twin.get_seq_length() == 0 and twin.nbytes == 0


def test_reorder_moves_only_changed_rows():
    cache = filled(batch=3)
    before = contents(cache)
    cache.reorder(torch.tensor([0, 1, 2]))
    unchanged(cache, before)
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    assert torch.equal(cache.layers[1].latent[:, :5], before[1][0][[2, 0, 1], :5])
    cache.batch_select_indices(torch.tensor([True, False, True]))
    assert cache.batch_size == 2


BAD_WRITES = [
    (lambda: (0, torch.zeros(2, 3), torch.zeros(2, 3, ROPE)), r"\[B, T, r\]"),
    (lambda: (0, *tokens(3, 1)), "2 行.*3 行"),
    (lambda: (0, torch.zeros(2, 1, 7), torch.zeros(2, 1, ROPE)), "另一个模型"),
    (lambda: (0, torch.zeros(2, 1, RANK), torch.zeros(2, 1, 4)), "另一个模型"),
    (
        lambda: (0, torch.zeros(2, 1, RANK, device="meta"), torch.zeros(2, 1, ROPE, device="meta")),
        "设备",
    ),
    (lambda: (0, torch.zeros(2, 1, RANK, dtype=torch.int64), torch.zeros(2, 1, ROPE)), "浮点"),
    (lambda: (9, *tokens(2, 1)), "另一个模型"),
    (lambda: (0, *tokens(2, 60)), "max_length=64"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_WRITES)
def test_bad_writes_change_nothing(arguments, message):
    cache = filled(max_length=64)
    before = contents(cache)
    with pytest.raises(InputError, match=message):
        cache.update(*arguments())
    unchanged(cache, before)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda c: c.crop(-6), "不能去掉 6 个"),
        (lambda c: c.crop_rows([1]), "2 个值"),
        (lambda c: c.crop_rows([1, 9]), "之间"),
        (lambda c: c.crop_rows([-1, 2]), "之间"),
        (lambda c: c.reorder(torch.tensor([0, 5])), "行下标"),
        (lambda c: c.select(torch.tensor([], dtype=torch.int64)), "行下标"),
        (
            lambda c: c.update(torch.zeros(2, 4, 1, RANK), torch.zeros(2, 4, 1, ROPE), 0),
            "key_states",
        ),
    ],
)
def test_bad_operations_change_nothing(action, message):
    cache = filled()
    before = contents(cache)
    with pytest.raises(InputError, match=message):
        action(cache)
    unchanged(cache, before)


def test_budget_is_checked_before_allocating():
    per_token = (RANK + ROPE) * 4
    cache = LatentCache(2, memory_budget_bytes=2 * 100 * per_token)
    cache.update(0, *tokens(1, 100))
    before = cache.nbytes
    with pytest.raises(MemoryBudgetError, match="每行最多 100 个词元") as caught:
        cache.update(0, *tokens(1, 1))
    assert caught.value.max_length == 100 and cache.nbytes == before
    with pytest.raises(MemoryBudgetError, match="最多 50 个词元"):
        cache.update(1, *tokens(2, 51))
    assert cache.layers[1].latent is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_layers": 0}, "num_layers"),
        ({"num_layers": True}, "num_layers"),
        ({"num_layers": 1, "max_length": -3}, "max_length"),
        ({"num_layers": 1, "dtype": "float8"}, "dtype"),
        ({"num_layers": 1, "dtype": torch.int32}, "dtype"),
    ],
)
def test_bad_construction(options, message):
    with pytest.raises(InputError, match=message):
        LatentCache(**options)


def test_for_model_needs_mla():
    with pytest.raises(UnsupportedError, match="没有受支持的 MLA"):
        LatentCache.for_model(torch.nn.Linear(2, 2))


def test_for_model_allocates_everything():
    pytest.importorskip("transformers")
    from tests.tiny_models import available, make_model

    cache = LatentCache.for_model(make_model(dtype=torch.bfloat16), 3, 40)
    assert len(cache) == 2 and cache.layers[1].latent.shape == (3, 40, 32)
    assert cache.layers[0].rope.dtype == torch.bfloat16 and cache.get_max_length() == 40
    assert cache.get_seq_length() == 0
    if available("kimi_linear"):
        with pytest.raises(UnsupportedError, match="DynamicCache"):
            LatentCache.for_model(make_model("kimi_linear"))


def test_works_without_transformers():
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import torch; from deepseek_opt import LatentCache\n"
        "c = LatentCache(1); c.update(0, torch.zeros(1, 2, 4), torch.zeros(1, 2, 2))\n"
        "assert c.get_seq_length() == 2\n"
        "from deepseek_opt import MLAConfig, OptimizationProfile, optimize, restore\n"
        "m = torch.nn.Sequential(torch.nn.Linear(2, 2))\n"
        "assert not optimize(m, OptimizationProfile(mla=MLAConfig())).replaced; restore(m)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
