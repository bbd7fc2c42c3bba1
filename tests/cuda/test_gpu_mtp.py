"""MTP 与采样的 CUDA 算子、用 MTP 生成：有 GPU 就在 GPU 上，没有就在主机模拟上（scripts/cuda_host.sh）。"""

from __future__ import annotations

import copy

import pytest
import torch

import deepseek_opt as dso
from deepseek_opt import ops, reference
from deepseek_opt.cache_rows import move_rows, settle_rows
from tests.cuda.cases import DTYPES, randn
from tests.cuda.device import DEVICE, LARGE, ON_GPU, marks, needs_gpu, reads_of
from tests.op_cases import wide
from tests.test_mtp_input import EPS, inputs
from tests.test_mtp_verify import chain, check_sample, same, sampled
from tests.tolerances import tol

pytestmark = marks
# (R, D, V)：一块、几块、不能宽访存、没有草稿；真卡上另有大词表。
SHAPES = [(3, 4, 96), (2, 2, 5000), (1, 1, 4097), (4, 0, 31), (2, 3, 8192)]
OPTIONS = [
    {},
    {"temperature": 0.7, "top_k": 5},
    {"top_p": 0.8},
    {"top_k": 40, "top_p": 0.9, "min_p": 0.05},
    {"top_k": 4000, "top_p": 0.3},
]
if LARGE:
    SHAPES += [(8, 4, 129280), (1, 0, 200_000), (64, 4, 32000)]


def to(*values):
    """送到设备。"""
    return [v.to(DEVICE) if isinstance(v, torch.Tensor) else v for v in values]


def host(values):
    return [v.cpu() for v in values]


@pytest.fixture(name="unread")
def _unread(monkeypatch):
    """内容都当作在设备上，不读：主机模拟里也一样。"""
    monkeypatch.setenv("DSO_HOST_RESIDENT", "1")


# ---- 与参考比较 ----


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_verify_greedy(shape, dtype):
    logits, tokens, length = chain(*shape, dtype)
    for given in (None, length):
        want = reference.mtp_verify_greedy(logits, tokens, given)
        same(host(ops.mtp_verify_greedy(*to(logits, tokens, given))), want)


@pytest.mark.sanitize
@pytest.mark.parametrize("one_hot", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_verify_sample(monkeypatch, shape, dtype, one_hot):
    args = sampled(*shape, dtype, one_hot)
    if ON_GPU:  # check_sample 调用的换成设备上的
        real = torch.ops.deepseek_opt.mtp_verify_sample
        monkeypatch.setattr("tests.test_mtp_verify.SAMPLE", lambda *a: host(real(*to(*a))))
    check_sample(args)


@pytest.mark.sanitize
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_sample_filter(shape, dtype, options):
    logits = randn(shape[0], shape[1] + 1, shape[2], dtype=dtype)
    logits[0, 0, 3:9] = logits[0, 0].max()  # 几个相同的最大值
    got = ops.sample_filter(logits.to(DEVICE), **options).cpu()
    neutral = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "penalty": 1.0}
    values = [options.get(name, value) for name, value in neutral.items()]
    want = reference.sample_filter(logits, None, None, *values)
    kept, expected = (got > 0).sum(-1), (want > 0).sum(-1)
    assert bool(((kept - expected).abs() <= 1).all())  # top-p 恰在界上的一个可能差一个舍入
    close = kept == expected
    torch.testing.assert_close(got[close], want[close], **tol(torch.float32))


@needs_gpu
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_sample_filter_big(options):
    """大词表：对照排序的写法（在设备上）。"""
    torch.manual_seed(0)
    logits = (torch.randn(40, 129280, device=DEVICE) * 3).bfloat16()
    got = ops.sample_filter(logits, **options)
    scores = logits.float() / options.get("temperature", 1.0)
    if "top_k" in options:
        bound = scores.topk(options["top_k"]).values[:, -1:]
        scores = scores.masked_fill(scores < bound, -torch.inf)
    if options.get("top_p", 1.0) < 1:
        values, order = scores.sort(stable=True)
        dropped = values.double().softmax(-1).cumsum(-1) <= 1 - options["top_p"]
        dropped[:, -1] = False
        scores = scores.masked_fill(dropped.scatter(1, order, dropped), -torch.inf)
    if "min_p" in options:
        p = scores.softmax(-1)
        scores = scores.masked_fill(p < options["min_p"] * p.amax(-1, True), -torch.inf)
    want = scores.softmax(-1)
    kept, expected = (got > 0).sum(-1), (want > 0).sum(-1)
    assert bool(((kept - expected).abs() <= 1).all())
    close = kept == expected
    assert bool(close.float().mean() > 0.5)
    torch.testing.assert_close(got[close], want[close], **tol(torch.float32))


def test_sample_filter_penalty():
    logits, ids = randn(3, 2, 5000), torch.randint(-1, 5003, (3, 40))
    length = torch.randint(0, 41, (3, 2))
    options = (1.3, 50, 1.0, 0.0, 1.4)
    want = reference.sample_filter(logits, ids, length, *options)
    got = torch.ops.deepseek_opt.sample_filter(*to(logits, ids, length), *options)
    torch.testing.assert_close(got.cpu(), want, **tol(torch.float32))


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 31, 4097, 12000])
def test_sample_tokens(vocab, dtype):
    probs = randn(9, vocab).softmax(-1).to(dtype)
    uniform = torch.rand(9, dtype=torch.float64)
    got = ops.sample_tokens(*to(probs, uniform)).cpu()
    sums = probs.double().cumsum(-1) / probs.double().sum(-1, keepdim=True)
    assert bool((probs.gather(1, got[:, None]) > 0).all())
    for row, token in enumerate(got.tolist()):
        before = sums[row, token] - probs[row, token].double() / probs[row].double().sum()
        assert before - 1e-9 <= uniform[row] <= sums[row, token] + 1e-9


HEADS = [(1, 300, 64), (8, 1000, 128), (9, 77, 40), (40, 200, 96), (3, 50, 33)]
if LARGE:
    HEADS += [(8, 129280, 7168), (64, 32000, 2048)]


@pytest.mark.sanitize
@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", HEADS, ids=str)
def test_draft_head(shape, dtype, reduced):
    rows, vocab, width = shape
    hidden, weight = randn(rows, width, dtype=dtype), randn(vocab, width, dtype=dtype, seed=1)
    bias = randn(vocab, dtype=dtype, seed=2)
    ids = torch.randperm(vocab)[: max(vocab // 3, 1)] if reduced else None
    hidden, weight, bias, ids = to(hidden, weight, bias, ids)
    token = ops.mtp_draft_head(hidden, weight, bias, ids)
    scores = wide(hidden) @ wide(weight).T + wide(bias)
    allowed = scores if ids is None else scores[:, ids]
    lost = allowed.amax(1) - scores.gather(1, token[:, None])[:, 0]
    size = allowed.abs().amax(1) + 1
    assert bool((lost <= 2e-5 * size * width**0.5).all())
    assert ids is None or bool(torch.isin(token, ids).all())


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, width, out", [(5, 64, 48), (3, 33, 17), (2, 2048, 64)])
def test_mtp_input(rows, width, out, dtype):
    args = inputs((rows,), width, out, dtype)
    leaves = [t.to(DEVICE).requires_grad_() for t in args]
    got = torch.ops.deepseek_opt.mtp_input(*leaves, EPS)
    exact = [wide(t).requires_grad_() for t in args]
    want = reference.mtp_input(*exact, EPS)
    torch.testing.assert_close(got.cpu().double(), want, **tol(dtype))
    grad = randn(rows, out, dtype=dtype, seed=3)
    got.backward(grad.to(DEVICE))
    want.backward(grad.double())
    for ours, theirs in zip(leaves, exact, strict=True):
        size = max(1.0, theirs.grad.abs().max().item())
        torch.testing.assert_close(
            ours.grad.cpu().double() / size, theirs.grad / size, **tol(dtype)
        )


# ---- 不读内容：出错记在结果里 ----


@pytest.mark.usefixtures("unread")
def test_faults_are_marked():
    logits, tokens, _ = chain(3, 2, 5000)
    tokens = logits[:, :2].argmax(-1)
    logits[1, 2, 4500] = torch.nan
    accepted, following = host(ops.mtp_verify_greedy(*to(logits, tokens)))
    assert accepted[[0, 2]].tolist() == [2, 2] and following[1] == -3
    with pytest.raises(ValueError, match="第 1 行第 2 个位置"):
        ops.check_verified(accepted.tolist(), following.tolist())
    tokens[0, 0] = 99999  # 越界的不接受；长度截到范围之内
    length = torch.tensor([2, 1, 7])
    accepted, _ = host(ops.mtp_verify_greedy(*to(logits, tokens, length)))
    assert accepted.tolist() == [0, 1, 2]
    hidden, weight = randn(3, 64), randn(100, 64, seed=1)
    hidden[1, 5] = torch.nan
    assert ops.mtp_draft_head(*to(hidden, weight)).cpu()[1] == -1
    ids = torch.tensor([3, 100])
    assert ops.mtp_draft_head(*to(randn(2, 64), weight, None, ids)).cpu().tolist() == [-1, -1]
    half = [t.bfloat16() for t in (hidden, weight)]
    assert ops.mtp_draft_head(*to(*half)).cpu()[1] == -1


@pytest.mark.usefixtures("unread")
def test_bad_probabilities_are_marked():
    bad = randn(4, 1, 5000)
    bad[0, 0, 4999], bad[1, 0, 0], bad[2] = torch.nan, torch.inf, -torch.inf
    for options in ({}, {"top_k": 5}, {"top_p": 0.5}):
        probs = ops.sample_filter(bad.to(DEVICE), **options).cpu()
        assert bool(probs[:3].isnan().all()) and bool(probs[3].isfinite().all())
    uniform = torch.tensor([0.5, 0.5, 0.5, 2.0])
    weights = torch.rand(4, 5000)
    weights[0], weights[1, 7] = 0.0, torch.nan
    found = ops.sample_tokens(*to(weights, uniform)).cpu()
    assert found[0] == -1 and found[1] == -2 and found[3] == 4999
    p, drafts, u = torch.rand(4, 2, 50), torch.zeros(4, 1, dtype=torch.int64), torch.zeros(4, 2)
    p[0, 0, 0], drafts[1, 0], p[2, 1] = torch.nan, 50, 0.0
    accepted, following = host(ops.mtp_verify_sample(*to(p, drafts, u)))
    assert following[:3].tolist() == [-1, -1, -2] and accepted[:3].tolist() == [0, 1, 0]
    assert following[3] >= 0


def test_deterministic_and_views():
    """再算逐位相同；步长任意。"""
    logits, tokens, length = to(*chain(3, 4, 9001))
    args = to(*sampled(3, 4, 9001))
    options = {"top_k": 300, "top_p": 0.8, "temperature": 0.6}
    spread = torch.cat((logits, logits), -1)[..., :9001]
    first = (
        *ops.mtp_verify_greedy(logits, tokens, length),
        *torch.ops.deepseek_opt.mtp_verify_sample(*args),
        ops.sample_filter(logits, **options),
    )
    for given in (logits, spread):
        again = (
            *ops.mtp_verify_greedy(given, tokens, length),
            *torch.ops.deepseek_opt.mtp_verify_sample(*args),
            ops.sample_filter(given, **options),
        )
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


# ---- 各行写在自己的末尾，设备上退回 ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
def test_rows_are_rolled_back_on_the_device(dtype):
    """接受几个在设备上定，缓存只在设备上截；之后写的接在各行自己的末尾。"""
    cache = dso.LatentCache(2, dtype=dtype)
    alone: list[list[torch.Tensor]] = [[] for _ in range(3)]
    lengths = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    for step in range(4):
        latent, rope = randn(3, 5, 32, seed=step).to(DEVICE), randn(3, 5, 8, seed=step).to(DEVICE)
        for index in range(2):
            cache.update(index, latent, rope)
        accepted = torch.tensor([step % 5, 4, (3 * step) % 5])
        lengths += accepted.to(DEVICE) + 1
        move_rows(cache, lengths)
        settle_rows(cache, lengths.tolist())
        for row, count in enumerate((accepted + 1).tolist()):
            alone[row].append(rope[row, :count])
    for layer in cache.layers:
        assert layer.offsets.tolist() == layer.row_lengths() == lengths.tolist()
        for row, parts in enumerate(alone):
            stored = layer.rope[row, : sum(map(len, parts))]
            torch.testing.assert_close(stored, torch.cat(parts).to(stored.dtype))


# ---- 只在真卡上 ----


@needs_gpu
def test_no_synchronisation_and_graphs():
    """各算子都不等 GPU，能录进 CUDA graph；重放时草稿变了，结果跟着变。"""
    logits, tokens, length = to(*chain(4, 3, 32000, torch.bfloat16))
    args = to(*sampled(4, 3, 32000))
    hidden, weight = to(randn(4, 512, dtype=torch.bfloat16), randn(9000, 512).bfloat16())

    def step():
        probs = ops.sample_filter(logits, top_k=50, top_p=0.9, temperature=0.8)
        return (
            *ops.mtp_verify_greedy(logits, tokens, length),
            *torch.ops.deepseek_opt.mtp_verify_sample(*args),
            ops.mtp_draft_head(hidden, weight),
            probs,
            ops.sample_tokens(probs[:, 0], args[4][:, 0]),
        )

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for _ in range(3):
        tokens.copy_(torch.randint(0, 32000, tokens.shape))
        tokens[0] = logits[0, :3].argmax(-1)
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(out, step(), strict=True))


@needs_gpu
def test_mixed_devices():
    logits, tokens, _ = chain(2, 1, 50)
    with pytest.raises(Exception, match="drafts|device|设备"):
        ops.mtp_verify_greedy(logits.to(DEVICE), tokens)


def generating(dtype, layers=3):
    """小的稠密 DeepSeek-V3，随机权重；下一个词元多半是嵌入里的下一个，MTP 也看得出，所以草稿常被接受。"""
    transformers = pytest.importorskip("transformers")
    config = transformers.DeepseekV3Config(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=128,
        num_hidden_layers=layers,
        first_k_dense_replace=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=128,
        kv_lora_rank=128,
        qk_rope_head_dim=32,
        qk_nope_head_dim=32,
        v_head_dim=32,
    )
    torch.manual_seed(0)
    model = transformers.DeepseekV3ForCausalLM(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.05)
        model.model.embed_tokens.weight.normal_(std=0.15)
        model.lm_head.weight.copy_(model.model.embed_tokens.weight.roll(1, 0))
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    dso.attach_mtp(model, config=dso.MTPConfig(depth=4), fresh=True)
    with torch.no_grad():
        projection = model.mtp.layers[0].eh_proj.weight
        projection.zero_()
        projection[:, : projection.shape[0]].copy_(torch.eye(projection.shape[0]))
    return model.to(DEVICE)


@needs_gpu
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("drafts", [1, 4])
def test_generation(rows, drafts):
    """fp32 贪心，与原模型逐个词元相同；录好的 CUDA graph 接着用。"""
    model = generating(torch.float32)
    fast = copy.deepcopy(model)
    config = dso.MTPConfig(draft_length=drafts, fixed_draft_length=True)
    profile = dso.OptimizationProfile(mla=dso.MLAConfig(), dense=dso.DenseConfig(), mtp=config)
    report = dso.optimize(fast, profile)
    for seed in (1, 2, 3):
        torch.manual_seed(seed)
        ids = torch.randint(1, 512, (rows, 9), device=DEVICE)
        mask = torch.ones_like(ids)
        if rows > 1:
            mask[1, :4] = 0
        options = {"attention_mask": mask, "max_new_tokens": 60, "do_sample": False}
        got = fast.generate(ids, **options)
        want = model.generate(ids, **options)
        same_rows = (got == want).all(1)
        assert bool(same_rows.float().mean() >= 0.8), (seed, same_rows)
    kept = fast.mtp.__dict__["_step_graphs"]
    assert kept._recorded and not kept.failed
    assert not [reason for (name, reason) in report.fallbacks if name == "generate"]
    assert fast.mtp.draft_statistics.num_accepted_tokens > 0


@needs_gpu
@pytest.mark.parametrize("options", [{"do_sample": True, "top_k": 20}, {"repetition_penalty": 1.3}])
def test_generation_with_sampling_and_processors(options):
    model = generating(torch.float32)
    fast = copy.deepcopy(model)
    config = dso.MTPConfig(draft_length=3, fixed_draft_length=True)
    profile = dso.OptimizationProfile(mla=dso.MLAConfig(), dense=dso.DenseConfig(), mtp=config)
    dso.optimize(fast, profile)
    ids = torch.randint(1, 512, (3, 9), device=DEVICE)
    results = []
    for one in (model, fast):
        torch.manual_seed(7)
        torch.cuda.manual_seed(7)
        results.append(
            one.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, **options)
        )
    assert float((results[0] == results[1]).float().mean()) > 0.9


@needs_gpu
def test_generation_waits_once_a_step():
    """录好之后每步只读回一次。"""
    model = generating(torch.bfloat16)
    config = dso.MTPConfig(draft_length=4, fixed_draft_length=True)
    profile = dso.OptimizationProfile(mla=dso.MLAConfig(), dense=dso.DenseConfig(), mtp=config)
    dso.optimize(model, profile)
    ids = torch.randint(1, 512, (4, 9), device=DEVICE)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 40, "do_sample": False}
    for _ in range(2):  # 补上提示的那一步一次生成只有一个：第二次才录下
        model.generate(ids, **options)
    read, computed, where = reads_of(lambda: model.generate(ids, **options))
    assert len(read) > 5 and not computed, where  # 每一步都是重放
