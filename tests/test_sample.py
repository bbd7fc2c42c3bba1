"""sample_filter、sample_tokens：对照 transformers 自己的处理器与稳定排序的参考；抽样的分布；坏输入。"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_opt import ops, reference
from tests.op_cases import FLOATS, flipped, randn, strided
from tests.tolerances import tol

F32 = torch.float32
FILTER = torch.ops.deepseek_opt.sample_filter
NEUTRAL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
OPTIONS = [
    {},
    {"temperature": 0.7},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 700},
    {"top_p": 0.9},
    {"top_p": 0.3, "temperature": 1.3},
    {"top_p": 0.0},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.8, "temperature": 0.6, "top_k": 40, "top_p": 0.8, "min_p": 0.05},
]


def theirs(logits, ids, options):
    """transformers 按 generate 的条件与次序搭起来的处理器，结果再 softmax；logits [R, V]。"""
    logits_process = pytest.importorskip("transformers.generation.logits_process")
    given_options, steps = NEUTRAL | options, logits_process.LogitsProcessorList()
    if given_options["repetition_penalty"] != 1.0:
        penalty = float(given_options["repetition_penalty"])
        steps.append(logits_process.RepetitionPenaltyLogitsProcessor(penalty))
    if given_options["temperature"] != 1.0:
        steps.append(logits_process.TemperatureLogitsWarper(given_options["temperature"]))
    if given_options["top_k"]:
        steps.append(logits_process.TopKLogitsWarper(given_options["top_k"]))
    if given_options["top_p"] < 1.0:
        steps.append(logits_process.TopPLogitsWarper(given_options["top_p"]))
    if given_options["min_p"] > 0.0:
        steps.append(logits_process.MinPLogitsWarper(given_options["min_p"]))
    return steps(ids, logits.float()).softmax(-1)


def ours(logits, ids, options, token_len=None):
    return ops.sample_filter(logits, ids, token_len, **options)


def ranked(probs):
    """从大到小：相同分数里保留哪几个，transformers 没有规定。"""
    return probs.sort(-1, descending=True).values


def near_an_edge(logits, ids, options):
    """累计恰在 top-p 的界上（差在舍入以内）的行：fp32 的累加次序决定取舍，不比较。"""
    top_p = options.get("top_p", 1.0)
    if top_p == 1.0:
        return torch.zeros(len(logits), dtype=torch.bool)
    before = theirs(logits, ids, {k: v for k, v in options.items() if k not in ("top_p", "min_p")})
    sums = before.double().sort(-1).values.cumsum(-1)[:, :-1]  # 最大的总是保留
    return ((sums - (1 - top_p)).abs() < 2e-6).any(-1)


def check(logits, ids, options):
    got, want = ours(logits, ids, options), theirs(logits, ids, options)
    clear = ~near_an_edge(logits, ids, options)
    assert clear.any(), "全在界上就什么都没有比较"
    torch.testing.assert_close(ranked(got)[clear], ranked(want)[clear], **tol(F32))
    assert torch.equal((got > 0).sum(-1)[clear], (want > 0).sum(-1)[clear])
    torch.testing.assert_close(got.sum(-1), torch.ones(len(got)), **tol(F32))
    return got, want, clear


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("vocab", [1, 2, 67, 1031, 32003])
def test_against_transformers(vocab, options):
    for scale in (1.0, 6.0):
        logits, ids = randn(6, vocab, scale=scale), torch.randint(0, vocab, (6, 9))
        got, want, clear = check(logits, ids, options)
        torch.testing.assert_close(got[clear], want[clear], **tol(F32))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_many_ties(dtype, options):
    logits, ids = randn(6, 3000, dtype=dtype, scale=2.0), torch.randint(0, 3000, (6, 9))
    check(logits, ids, options)


def adversarial():
    """平局、-inf、悬殊、次序：各 [V]。"""
    steps = torch.arange(200.0) / 8
    spread = torch.full((200,), -torch.inf)
    spread[[3, 77, 78, 150]] = torch.tensor([1.0, 2.0, 2.0, 1.0])
    lone = torch.full((200,), -1e30)
    lone[123] = 0.0
    signed = torch.zeros(200)
    signed[::2] = -0.0
    return {
        "递增": steps,
        "递减": steps.flip(0),
        "全同": torch.full((200,), 3.0),
        "两种": (torch.arange(200) % 2).float(),
        "多是 -inf": spread,
        "只有一个": lone,
        "±0": signed,
        "块内最大的都在一处": torch.cat([torch.full((64,), 9.0), torch.zeros(136)]),
        "极大": steps * 1e36,
        "极小": steps * 1e-40,
    }


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("name", adversarial())
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_adversarial(name, options):
    logits, ids = adversarial()[name][None], torch.randint(0, 200, (1, 9))
    got, want = ours(logits, ids, options), theirs(logits, ids, options)
    if near_an_edge(logits, ids, options).any():
        assert ((got > 0).sum() - (want > 0).sum()).abs() <= 1
    else:
        torch.testing.assert_close(ranked(got), ranked(want), **tol(F32))
    full = [options.get(key, value) for key, value in NEUTRAL.items()]
    exact = reference.sample_filter(logits[:, None], ids, None, *full)[:, 0]
    if torch.equal((exact > 0).sum(), (got > 0).sum()):  # 个数相同，留下的就应是同几个
        torch.testing.assert_close(got, exact, **tol(F32))


@pytest.mark.usefixtures("isa")
def test_ties_at_the_boundary():
    """概率是 2 的幂，累加没有舍入：top-p 恰在界上的去掉，平局保留下标大的；top-k 的平局全部保留。"""
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0]])
    assert (ours(logits, None, {"top_p": 0.5}) > 0).tolist() == [[False, False, True, True]]
    assert (ours(logits, None, {"top_p": 0.51}) > 0).tolist() == [[False, True, True, True]]
    assert (theirs(logits, None, {"top_p": 0.5}) > 0).sum() == 2
    assert (theirs(logits, None, {"top_p": 0.51}) > 0).sum() == 3
    logits = torch.tensor([[1.0, 2.0, 1.0, 0.0, 1.0]])
    assert (ours(logits, None, {"top_k": 2}) > 0).tolist() == [[True, True, True, False, True]]
    both = {"top_k": 3, "top_p": 0.6}
    torch.testing.assert_close(ranked(ours(logits, None, both)), ranked(theirs(logits, None, both)))


@settings(max_examples=100)
@given(st.data())
def test_any_shape_and_options(data):
    rows, vocab = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 300))
    dtype = data.draw(st.sampled_from(FLOATS))
    logits = randn(rows, vocab, dtype=dtype, scale=data.draw(st.sampled_from([0.1, 1.0, 5.0])))
    if data.draw(st.booleans()):
        logits = (logits * 2).round()
    ids = torch.randint(0, vocab + 2, (rows, data.draw(st.integers(1, 12))))
    options = {
        "temperature": data.draw(st.floats(0.05, 4.0)),
        "top_k": data.draw(st.integers(0, vocab + 3)),
        "top_p": data.draw(st.floats(0.0, 1.0)),
        "min_p": data.draw(st.sampled_from([0.0, 0.02, 0.3])),
        "repetition_penalty": data.draw(st.floats(0.5, 2.0)),
    }
    got, want = ours(logits, ids, options), theirs(logits, ids, options)
    unclear = near_an_edge(logits, ids, options)
    if options["min_p"] > 0:  # min-p 的界上差一个舍入也不比较
        before = theirs(logits, ids, options | {"min_p": 0.0})
        ratio = before / before.amax(-1, keepdim=True)
        unclear |= ((ratio - options["min_p"]).abs() < 1e-6).any(-1)
    torch.testing.assert_close(ranked(got)[~unclear], ranked(want)[~unclear], **tol(F32))


@pytest.mark.usefixtures("isa")
def test_positions_see_different_lengths():
    """三维的 logits：第 i 个位置看 token_ids 的前 token_len[r, i] 个；越界的词元不算，重复的只算一次。"""
    logits = randn(3, 4, 50)
    ids = torch.randint(0, 52, (3, 12))
    ids[0, :3], ids[1, 2] = 7, -1
    length = torch.randint(1, 13, (3, 4))
    options = {"repetition_penalty": 1.5, "top_k": 20}
    got = ours(logits, ids, options, length)
    for r in range(3):
        for i in range(4):
            seen = ids[r : r + 1, : length[r, i]]
            want = theirs(logits[r, i][None], seen[seen >= 0][None], options)
            torch.testing.assert_close(got[r, i], want[0], **tol(F32))
    flat = ops.sample_filter(logits[:, 0], ids, length[:, 0], **options)
    assert torch.equal(flat, got[:, 0])
    none = ours(logits, ids, options, torch.zeros(3, 4, dtype=torch.int64))
    assert torch.equal(none, ours(logits, None, {"top_k": 20}))


@pytest.mark.usefixtures("isa")
def test_views_and_empty():
    logits, ids = randn(3, 2, 40), torch.randint(0, 40, (3, 5))
    options = {"top_k": 9, "repetition_penalty": 2.0}
    want = ours(logits, ids, options)
    for view in (strided, flipped):
        assert torch.equal(ours(view(logits), view(ids), options), want)
    swapped = logits.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(ours(swapped, ids, options), want)
    wide = ids[:1].expand(3, 5)
    assert torch.equal(ours(logits, wide, options), ours(logits, wide.contiguous(), options))
    assert ops.sample_filter(randn(0, 7)).shape == (0, 7)
    assert ops.sample_filter(randn(2, 0, 7)).shape == (2, 0, 7)
    no_ids = torch.zeros(3, 0, dtype=torch.int64)
    assert torch.equal(ours(logits, no_ids, options), ours(logits, None, {"top_k": 9}))


def test_input_is_not_changed():
    logits, ids = randn(3, 40), torch.randint(0, 40, (3, 5))
    before = logits.clone()
    ours(logits, ids, OPTIONS[-1])
    assert torch.equal(logits, before)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.2}], ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_non_finite_logits_are_named(options, value):
    logits = randn(2, 3, 300)
    logits[1, 2, 257] = value
    with pytest.raises(ValueError, match="第 1 行第 2 个位置的 logits.*含 NaN 或 .inf"):
        ours(logits, None, options)
    logits[1, 2] = -torch.inf
    with pytest.raises(ValueError, match="第 1 行第 2 个位置的 logits.*全是 -inf"):
        ours(logits, None, options)


# ---- 抽样 ----


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("vocab", [1, 2, 31, 1024, 32003])
def test_tokens_against_reference(dtype, vocab):
    probs = randn(40, vocab, scale=2.0).softmax(-1).to(dtype)
    uniform = torch.rand(40, dtype=torch.float64)
    got, want = ops.sample_tokens(probs, uniform), reference.sample_tokens(probs, uniform)
    assert (probs.gather(1, got[:, None]) > 0).all()
    sums = probs.double().cumsum(-1) / probs.double().sum(-1, keepdim=True)
    low = torch.minimum(got, want)
    for r in (got != want).nonzero().flatten().tolist():
        torch.testing.assert_close(sums[r, low[r]], uniform[r], **tol(F32))


@pytest.mark.usefixtures("isa")
def test_tokens_edges():
    probs = torch.zeros(4, 3000)
    probs[0, [5, 2999]], probs[1, 1500], probs[2, 0], probs[3, [10, 20]] = 1.0, 1e-38, 7.0, 1.0
    top = torch.full((4,), 1.0 - 2**-53, dtype=torch.float64)
    assert ops.sample_tokens(probs, torch.zeros(4)).tolist() == [5, 1500, 0, 10]
    assert ops.sample_tokens(probs, top).tolist() == [2999, 1500, 0, 20]
    assert ops.sample_tokens(probs, torch.full((4,), 0.5)).tolist() == [2999, 1500, 0, 20]
    assert ops.sample_tokens(randn(0, 3), torch.rand(0)).tolist() == []
    assert torch.equal(ops.sample_tokens(flipped(probs), top), ops.sample_tokens(probs, top))


def test_tokens_distribution():
    probs = torch.tensor([0.1, 0.0, 0.4, 0.2, 0.3])
    trials = 50000
    draws = ops.sample_tokens(probs.expand(trials, 5), torch.rand(trials))
    counts, expected = torch.bincount(draws, minlength=5).double(), probs.double() * trials
    assert counts[1] == 0
    used = expected > 0
    square = ((counts - expected)[used].square() / expected[used]).sum().item()
    assert square < 30.7  # 自由度 3 的 1 − 1e-6 分位


# ---- 与 torch 的约定 ----


def test_same_result_for_any_thread_count(threads):
    logits, ids = randn(9, 3, 5003), torch.randint(0, 5003, (9, 20))
    runs = []
    for count in (1, 2, 5):
        threads(count)
        probs = ours(logits, ids, OPTIONS[-1])
        uniform = torch.rand(27, generator=torch.Generator().manual_seed(3))
        runs.append((probs, ops.sample_tokens(probs.flatten(0, 1), uniform)))
    for probs, tokens in runs[1:]:
        assert torch.equal(probs, runs[0][0]) and torch.equal(tokens, runs[0][1])


def test_opcheck():
    args = (randn(2, 3, 9), torch.randint(0, 9, (2, 4)), torch.full((2, 3), 2))
    torch.library.opcheck(FILTER.default, (*args, 0.7, 3, 0.9, 0.1, 1.2))
    torch.library.opcheck(
        FILTER.default, (randn(2, 3, 9).half(), None, None, 1.0, 0, 1.0, 0.0, 1.0)
    )
    tokens = torch.ops.deepseek_opt.sample_tokens.default
    torch.library.opcheck(tokens, (torch.rand(3, 7), torch.rand(3)))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic):
    def step(logits, ids, uniform):
        probs = ops.sample_filter(logits, ids, top_p=0.9, repetition_penalty=1.2)
        return probs, ops.sample_tokens(probs, uniform)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (3, 5):
        args = (randn(rows, 40), torch.randint(0, 40, (rows, 6)), torch.rand(rows))
        for a, b in zip(compiled(*args), step(*args), strict=True):
            assert torch.equal(a, b)


# ---- 坏输入 ----

IDS = torch.zeros(2, 4, dtype=torch.int64)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"logits": randn(5)}, "logits 的形状"),
        ({"logits": randn(2, 5).double()}, "logits 的类型.*float64"),
        ({"logits": randn(2, 0)}, "词表大小"),
        ({"temperature": 0.0}, "temperature 应为正的有限数，实际是 0"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": 1e-60}, "temperature"),
        ({"top_k": -1}, "top_k 应不小于 0.*-1"),
        ({"top_p": 1.1}, "top_p 应在 0 与 1 之间，实际是 1.1"),
        ({"top_p": float("nan")}, "top_p"),
        ({"min_p": -0.1}, "min_p 应在 0 与 1 之间"),
        ({"repetition_penalty": 0.0, "token_ids": IDS}, "repetition_penalty 应为正的有限数"),
        ({"repetition_penalty": 1.1}, "repetition_penalty 不为 1 时应给出 token_ids"),
        ({"token_ids": IDS[:1]}, r"token_ids 的形状应为 \[2, \*\]"),
        ({"token_ids": IDS.int()}, "token_ids 的类型应为 int64"),
        ({"token_ids": IDS, "token_len": torch.tensor([1])}, r"token_len 的形状应为 \[2, 1\]"),
        (
            {"token_ids": IDS, "token_len": torch.tensor([1, 5])},
            r"token_len\[1, 0\] 应在 0 与.*4 之间",
        ),
    ],
)
def test_bad_input(changes, message):
    args = {"logits": randn(2, 5)} | changes
    with pytest.raises(ValueError, match=f"deepseek_opt：sample_filter：.*{message}"):
        ops.sample_filter(**args)


@pytest.mark.parametrize(
    "probs, uniform, message",
    [
        (torch.rand(3), torch.rand(3), "probs 的形状"),
        (torch.rand(2, 3).long(), torch.rand(2), "probs 的类型"),
        (torch.rand(2, 0), torch.rand(2), "词表大小"),
        (torch.rand(2, 3), torch.rand(3), r"uniform 的形状应为 \[2\]"),
        (torch.rand(2, 3), torch.tensor([0.0, -0.1]), r"uniform 应在 \[0, 1\) 内，第 1 个是 -0.1"),
        (torch.tensor([[1.0], [0.0]]), torch.rand(2), "probs 的第 1 行应为非负的有限数且不全是 0"),
        (torch.tensor([[1.0, torch.nan]]), torch.rand(1), "probs 的第 0 行"),
        (torch.tensor([[1.0, torch.inf]]), torch.rand(1), "probs 的第 0 行"),
    ],
)
def test_bad_input_tokens(probs, uniform, message):
    with pytest.raises(ValueError, match=f"deepseek_opt：sample_tokens：.*{message}"):
        ops.sample_tokens(probs, uniform)
