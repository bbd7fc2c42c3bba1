"""mtp_verify_greedy、mtp_verify_sample：对照逐个词元的写法；分布；回退用的缓存；坏输入。"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_opt import ops, reference
from deepseek_opt.cache import LatentLayer
from tests.op_cases import FLOATS, flipped, randn, strided
from tests.tolerances import tol

GREEDY = torch.ops.deepseek_opt.mtp_verify_greedy
SAMPLE = torch.ops.deepseek_opt.mtp_verify_sample


def chain(rows, drafts, vocab, dtype=torch.float32, agree=0.8):
    """logits [R, D + 1, V]，草稿多半就是 argmax，长短不一。"""
    logits = randn(rows, drafts + 1, vocab, dtype=dtype, scale=3.0)
    best = logits[:, :drafts].argmax(-1)
    other = torch.randint(0, vocab, (rows, drafts))
    tokens = torch.where(torch.rand(rows, drafts) < agree, best, other)
    return logits, tokens, torch.randint(0, drafts + 1, (rows,))


def same(got, want):
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), (got, want)


# ---- 贪心 ----


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("vocab", [1, 2, 31, 1024, 1025, 32003])
def test_greedy_against_reference(dtype, vocab):
    for rows, drafts in ((1, 1), (3, 4), (7, 8), (2, 0), (0, 3)):
        logits, tokens, length = chain(rows, drafts, vocab, dtype)
        same(
            ops.mtp_verify_greedy(logits, tokens), reference.mtp_verify_greedy(logits, tokens, None)
        )
        got = ops.mtp_verify_greedy(logits, tokens, length)
        same(got, reference.mtp_verify_greedy(logits, tokens, length))


@pytest.mark.usefixtures("isa")
def test_greedy_ties_take_the_lower_index():
    logits = torch.zeros(1, 2, 2500)
    logits[0, 0, [1100, 40, 2400]] = 5.0
    logits[0, 1, 7], logits[0, 1, 3] = -0.0, 0.0
    same(
        ops.mtp_verify_greedy(logits, torch.tensor([[40]])), (torch.tensor([1]), torch.tensor([0]))
    )
    logits.fill_(-torch.inf)
    same(ops.mtp_verify_greedy(logits, torch.tensor([[1]])), (torch.tensor([0]), torch.tensor([0])))


@pytest.mark.usefixtures("isa")
def test_greedy_views():
    logits, tokens, length = chain(4, 3, 50)
    want = ops.mtp_verify_greedy(logits, tokens, length)
    for view in (strided(logits), flipped(logits)):
        same(ops.mtp_verify_greedy(view, tokens, length), want)
    swapped = logits.transpose(0, 1).contiguous().transpose(0, 1)
    same(ops.mtp_verify_greedy(swapped, flipped(tokens), length), want)


@settings(max_examples=60)
@given(st.integers(0, 6), st.integers(0, 8), st.integers(1, 90), st.sampled_from(FLOATS), st.data())
def test_greedy_any_shape(rows, drafts, vocab, dtype, data):
    logits, tokens, length = chain(rows, drafts, vocab, dtype, data.draw(st.floats(0, 1)))
    logits = logits.round()  # 常有相同的最大值
    got = ops.mtp_verify_greedy(logits, tokens, length)
    same(got, reference.mtp_verify_greedy(logits, tokens, length))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", FLOATS)
def test_greedy_nan_is_named_only_where_it_is_read(dtype):
    logits, _, _ = chain(3, 2, 1500, dtype)
    tokens = logits[:, :2].argmax(-1)
    logits[1, 2, 1300] = torch.nan
    with pytest.raises(ValueError, match="第 1 行第 2 个位置的 logits 含 NaN"):
        ops.mtp_verify_greedy(logits, tokens)
    tokens[1, 0] = (tokens[1, 0] + 1) % 1500
    accepted, _ = ops.mtp_verify_greedy(logits, tokens)
    assert accepted.tolist() == [2, 0, 2]
    length = torch.tensor([2, 1, 2])
    tokens[1, 0] = logits[1, 0].argmax()
    assert ops.mtp_verify_greedy(logits, tokens, length)[0].tolist() == [2, 1, 2]


# ---- 采样：与参考一致 ----


def sampled(rows, drafts, vocab, dtype=torch.float32, one_hot=False):
    probs = randn(rows, drafts + 1, vocab, scale=2.0).softmax(-1)
    q = (probs[:, :drafts].log() + randn(rows, drafts, vocab)).softmax(-1)
    flat = q.reshape(-1, vocab)
    tokens = (
        flat.multinomial(1).view(rows, drafts) if flat.numel() else torch.zeros(rows, drafts).long()
    )
    length = torch.randint(0, drafts + 1, (rows,))
    uniform = torch.rand(rows, drafts + 1, dtype=torch.float64)
    return probs.to(dtype), tokens, length, None if one_hot else q.to(dtype), uniform


def check_sample(args):
    """接受数相同；next 相同，或（舍入）目标恰在两个词元的分界上。"""
    probs, tokens, length, q, uniform = args
    accepted, chosen = SAMPLE(*args)
    want, expected = reference.mtp_verify_sample(*args)
    assert torch.equal(accepted, want)
    for r in (chosen != expected).nonzero().flatten().tolist():
        n = int(want[r])
        weights = probs[r, n].double()
        if n < int(length[r]):
            minus = torch.zeros_like(weights) if q is None else q[r, n].double()
            if q is None:
                minus[tokens[r, n]] = 1.0
            weights = (weights - minus).clamp(min=0)
        total = weights.cumsum(0) / weights.sum()
        low = min(int(chosen[r]), int(expected[r]))
        assert weights[chosen[r]] > 0
        torch.testing.assert_close(total[low], uniform[r, -1], **tol(torch.float32))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("one_hot", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("vocab", [1, 2, 31, 1025, 32003])
def test_sample_against_reference(dtype, vocab, one_hot):
    for rows, drafts in ((1, 1), (5, 4), (2, 0), (0, 3)):
        check_sample(sampled(rows, drafts, vocab, dtype, one_hot))


@settings(max_examples=60)
@given(
    st.integers(0, 6), st.integers(0, 8), st.integers(1, 90), st.sampled_from(FLOATS), st.booleans()
)
def test_sample_any_shape(rows, drafts, vocab, dtype, one_hot):
    check_sample(sampled(rows, drafts, vocab, dtype, one_hot))


@pytest.mark.usefixtures("isa")
def test_sample_views_and_mixed_dtypes():
    probs, tokens, length, q, uniform = sampled(4, 3, 40)
    want = SAMPLE(probs, tokens, length, q, uniform)
    for view in (strided, flipped):
        same(SAMPLE(view(probs), view(tokens), length, view(q), flipped(uniform)), want)
    check_sample((probs, tokens, length, q.bfloat16(), uniform.float()))
    same(ops.mtp_verify_sample(probs, tokens, uniform, length, q), want)


@pytest.mark.usefixtures("isa")
def test_sample_edges():
    """p = q 必接受；p 为 0 的绝不接受，u 为 0 也一样；剩余因舍入处处为 0 时从 p 抽。"""
    p = torch.tensor([[[0.25, 0.75], [1.0, 0.0]]])
    near, zero, one = torch.tensor([[0.999999, 0.999999]]), torch.zeros(1, 2), torch.tensor([[1]])
    same(
        ops.mtp_verify_sample(p, one, near, None, p[:, :1]), (torch.tensor([1]), torch.tensor([0]))
    )
    p = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    half = torch.full((1, 1, 2), 0.5)
    want = (torch.tensor([0]), torch.tensor([0]))
    same(ops.mtp_verify_sample(p, one, zero, None, half), want)
    same(ops.mtp_verify_sample(p, one, zero), want)
    p, q = torch.tensor([[[0.5, 0.0], [0.0, 1.0]]]), torch.tensor([[[1.0, 0.0]]])
    same(ops.mtp_verify_sample(p, torch.tensor([[0]]), near, None, q), want)


def test_greedy_is_the_limit_of_sampling():
    logits, tokens, length = chain(6, 4, 33)
    hot = torch.nn.functional.one_hot(logits.argmax(-1), 33).float()
    got = ops.mtp_verify_sample(hot, tokens, torch.rand(6, 5), length)
    same(got, ops.mtp_verify_greedy(logits, tokens, length))


# ---- 采样：分布 ----

# 5 个词元、3 个接连的位置：拼出的词元串 125 种，期望次数都够大。
WORDS, PLACES, TRIALS = 5, 3, 40000


def chi_square(counts, expected):
    return ((counts - expected).square() / expected).sum().item()


def limit(freedom):
    """卡方分布的 1 − 1e-6 分位（Wilson–Hilferty 近似）。"""
    return freedom * (1 - 2 / (9 * freedom) + 4.75 * (2 / (9 * freedom)) ** 0.5) ** 3


def target_tables():
    """第 i 个位置的分布取决于前一个词元（马尔可夫链）：[PLACES, WORDS, WORDS]，都不小于 0.05。"""
    return 0.75 * (torch.randn(PLACES, WORDS, WORDS) * 1.5).softmax(-1) + 0.25 / WORDS


def rollout(verify, target, proposal, one_hot):
    """一轮草稿、核对之后，剩下的位置直接按 target 抽；返回各词元串的次数 [WORDS ** PLACES]。"""
    rows, drafts = TRIALS, PLACES - 1
    tokens, q = [torch.zeros(rows, dtype=torch.int64)], []
    for i in range(drafts):
        q.append(proposal[i, tokens[-1]])
        drawn = q[-1].argmax(-1) if one_hot else ops.sample_tokens(q[-1], torch.rand(rows))
        tokens.append(drawn)
    probs = torch.stack([target[i, t] for i, t in enumerate(tokens)], 1)
    chain_of = torch.stack(tokens[1:], 1)
    given_q = None if one_hot else torch.stack(q, 1)
    accepted, chosen = verify(probs, chain_of, torch.rand(rows, PLACES), None, given_q)
    text = torch.cat([chain_of, torch.zeros(rows, 1, dtype=torch.int64)], 1)
    text.scatter_(1, accepted[:, None], chosen[:, None])
    for i in range(1, PLACES):
        fresh = ops.sample_tokens(target[i, text[:, i - 1]], torch.rand(rows))
        text[:, i] = torch.where(i > accepted, fresh, text[:, i])
    index = sum(text[:, i] * WORDS ** (PLACES - 1 - i) for i in range(PLACES))
    return torch.bincount(index, minlength=WORDS**PLACES).double(), accepted


def expected_counts(target):
    first, second, third = target[0, 0], target[1], target[2]
    joint = first[:, None, None] * second[:, :, None] * third[None]
    return joint.flatten().double() * TRIALS


@pytest.mark.parametrize("one_hot", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_distribution_is_the_target_s(one_hot, seed):
    torch.manual_seed(seed)
    target = target_tables()
    proposal = (target.log() + torch.randn_like(target)).softmax(-1)
    counts, accepted = rollout(ops.mtp_verify_sample, target, proposal, one_hot)
    assert set(accepted.tolist()) == {0, 1, 2}, "各种接受数都要出现，否则没有测到"
    assert chi_square(counts, expected_counts(target)) < limit(WORDS**PLACES - 1)


def residual_from_p(probs, drafts, uniform, length, q):
    """常见的错：不接受时从 p 抽，而不是从剩余抽。"""
    accepted, chosen = ops.mtp_verify_sample(probs, drafts, uniform, length, q)
    stopped = probs[torch.arange(len(probs)), accepted]
    return accepted, torch.where(accepted < 2, ops.sample_tokens(stopped, uniform[:, 2]), chosen)


def too_eager(probs, drafts, uniform, length, q):
    """接受得多了一成。"""
    uniform = torch.cat([uniform[:, :-1] * 0.9, uniform[:, -1:]], 1)
    return ops.mtp_verify_sample(probs, drafts, uniform, length, q)


def sampled_q_for_one_hot(probs, drafts, uniform, length, q):
    """草稿是确定地选出的，却给了一个不集中的 q。"""
    assert q is None
    q = 0.5 * torch.nn.functional.one_hot(drafts, WORDS) + 0.5 / WORDS
    return ops.mtp_verify_sample(probs, drafts, uniform, length, q)


@pytest.mark.parametrize(
    "verify, one_hot",
    [(residual_from_p, False), (too_eager, False), (sampled_q_for_one_hot, True)],
)
def test_a_biased_verifier_is_caught(verify, one_hot):
    torch.manual_seed(0)
    target = target_tables()
    proposal = (target.log() + torch.randn_like(target)).softmax(-1)
    counts, _ = rollout(verify, target, proposal, one_hot)
    assert chi_square(counts, expected_counts(target)) > limit(WORDS**PLACES - 1)


def test_sampled_drafts_without_q_stay_exact():
    """不给 q 总是无损的（给定草稿，结果的分布就是 p），只是接受得少。"""

    def forget_q(probs, drafts, uniform, length, q):
        assert q is not None
        return ops.mtp_verify_sample(probs, drafts, uniform, length)

    target = target_tables()
    with_q, taken = rollout(ops.mtp_verify_sample, target, target, False)
    without, fewer = rollout(forget_q, target, target, False)
    for counts in (with_q, without):
        assert chi_square(counts, expected_counts(target)) < limit(WORDS**PLACES - 1)
    assert (taken == PLACES - 1).all() and fewer.double().mean() < 1


# ---- 与 torch 的约定 ----


def test_same_result_for_any_thread_count(threads):
    greedy, args = chain(33, 4, 5003), sampled(33, 4, 5003)
    runs = []
    for count in (1, 2, 5):
        threads(count)
        runs.append((*GREEDY(*greedy), *SAMPLE(*args)))
    for other in runs[1:]:
        same(other, runs[0])


@pytest.mark.parametrize("one_hot", [False, True])
def test_opcheck(one_hot):
    logits, tokens, length = chain(3, 2, 9)
    torch.library.opcheck(GREEDY.default, (logits, tokens, length))
    torch.library.opcheck(GREEDY.default, (logits, tokens, None))
    torch.library.opcheck(SAMPLE.default, sampled(3, 2, 9, one_hot=one_hot))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic):
    def step(logits, tokens, length, uniform):
        first = ops.mtp_verify_greedy(logits, tokens, length)
        probs = ops.sample_filter(logits, top_k=5, temperature=0.7)
        return *first, *ops.mtp_verify_sample(probs, tokens, uniform, length)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (3, 5):
        args = (*chain(rows, 2, 40), torch.rand(rows, 3))
        same(compiled(*args), step(*args))


# ---- 各行接受的个数不同：缓存逐行写入与回退 ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_cache_follows_ragged_acceptance(dtype):
    """每步各行写入 1 + D 个词元、逐行退到接受处：内容与注意力的结果同“每行一个缓存、只写接受的”逐位相同。"""
    rows, drafts, rank, rope_dim, heads, nope, v = 4, 3, 32, 8, 2, 6, 5
    joint = LatentLayer(dtype=dtype)
    alone = [LatentLayer(dtype=dtype) for _ in range(rows)]
    kv_b = randn(heads * (nope + v), rank, scale=rank**-0.5)
    for step in range(6):
        latent, rope = randn(rows, 1 + drafts, rank), randn(rows, 1 + drafts, rope_dim)
        q = randn(rows, 1 + drafts, heads, nope + rope_dim)
        before = joint.lengths if step else torch.zeros(rows, dtype=torch.int64)
        joint.append(latent, rope)
        spans = ops.make_spans(
            rows, 1 + drafts, joint.capacity, end=before + 1 + drafts, causal=True
        )
        out = ops.mla_decode(q, *full(joint, rope), kv_b, spans, None, 0.3, v)
        logits, tokens, _ = chain(rows, drafts, 11, agree=0.7)
        accepted, _ = ops.mtp_verify_greedy(logits, tokens)
        joint.crop_rows(before + 1 + accepted)
        for r, n in enumerate((1 + accepted).tolist()):
            alone[r].append(latent[r : r + 1, :n], rope[r : r + 1, :n])
            span = ops.make_spans(1, n, alone[r].capacity, end=before[r : r + 1] + n, causal=True)
            args = (*full(alone[r], rope), kv_b, span, None, 0.3, v)
            want = ops.mla_decode(q[r : r + 1, :n].contiguous(), *args)
            torch.testing.assert_close(out[r : r + 1, :n], want, **tol(torch.float32))
            size = int(alone[r].lengths)
            assert int(joint.lengths[r]) == size
            for ours, theirs in ((joint.latent, alone[r].latent), (joint.rope, alone[r].rope)):
                assert torch.equal(ours[r, :size], theirs[0, :size])
    assert joint.ragged


def full(layer, rope):
    """整个缓冲区：没有写过的槽位可能是未初始化的 NaN，spans 不许读到。"""
    keys = layer.rope if layer.rope.dtype == rope.dtype else layer.rope.to(rope.dtype)
    return layer.latent, keys, layer.scale


# ---- 坏输入 ----


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"logits": randn(2, 3, 5)}, r"logits 的形状应为 \[2, 4, \*\]，实际是 \[2, 3, 5\]"),
        ({"logits": randn(2, 4, 5).double()}, "logits 的类型.*float64"),
        ({"logits": randn(2, 4, 0)}, "词表大小.*实际是 0"),
        ({"drafts": torch.zeros(2, dtype=torch.int64)}, "drafts 的形状"),
        ({"drafts": torch.zeros(2, 3, dtype=torch.int32)}, "drafts 的类型应为 int64，实际是 int32"),
        (
            {"drafts": torch.tensor([[0, 0, 0], [0, 5, 0]])},
            r"drafts\[1, 1\] 应在 \[0, 5\) 内，实际是 5",
        ),
        ({"drafts": torch.tensor([[0, 0, -1], [0, 0, 0]])}, r"drafts\[0, 2\].*实际是 -1"),
        ({"draft_len": torch.tensor([1])}, "draft_len 的形状"),
        ({"draft_len": torch.tensor([1, 4])}, r"draft_len\[1\] 应在 0 与草稿个数 3 之间，实际是 4"),
        ({"draft_len": torch.tensor([1.0, 2.0])}, "draft_len 的类型"),
    ],
)
def test_bad_input_greedy(changes, message):
    args = {"logits": randn(2, 4, 5), "drafts": torch.zeros(2, 3, dtype=torch.int64)} | changes
    with pytest.raises(ValueError, match=f"deepseek_opt：mtp_verify_greedy：.*{message}"):
        ops.mtp_verify_greedy(**args)


def test_drafts_beyond_the_length_are_not_looked_at():
    tokens = torch.tensor([[0, -7], [99, 99]])
    ops.mtp_verify_greedy(randn(2, 3, 5), tokens, torch.tensor([1, 0]))


def even(*shape):
    return torch.full(shape, 0.2)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"probs": even(2, 4, 5).int()}, "probs 的类型.*int32"),
        ({"probs": even(2, 3, 5)}, "probs 的形状"),
        ({"draft_probs": even(2, 4, 5)}, r"draft_probs 的形状应为 \[2, 3, 5\]"),
        ({"draft_probs": even(2, 3, 5).double()}, "draft_probs 的类型"),
        ({"uniform": torch.rand(2, 3)}, r"uniform 的形状应为 \[2, 4\]"),
        (
            {"uniform": torch.rand(2, 4).half()},
            "uniform 的类型应为 float32 或 float64，实际是 float16",
        ),
        ({"uniform": torch.ones(2, 4)}, r"uniform 应在 \[0, 1\) 内，第 0 个是 1"),
        ({"uniform": torch.full((2, 4), torch.nan)}, "uniform 应在.*nan"),
        ({"probs": even(2, 4, 5) * torch.nan}, "第 0 行第 0 个位置的分布不对"),
        ({"probs": -even(2, 4, 5)}, "第 0 行第 0 个位置的分布不对"),
        ({"draft_probs": torch.zeros(2, 3, 5)}, "第 0 行第 0 个草稿的 draft_probs 应为正的有限数"),
    ],
)
def test_bad_input_sample(changes, message):
    args = {"probs": even(2, 4, 5), "drafts": torch.zeros(2, 3, dtype=torch.int64)}
    args |= {"uniform": torch.zeros(2, 4)} | changes
    with pytest.raises(ValueError, match=f"deepseek_opt：mtp_verify_sample：.*{message}"):
        ops.mtp_verify_sample(**args)


@pytest.mark.usefixtures("isa")
def test_sample_nan_is_named_only_where_it_is_read():
    probs, tokens = even(3, 3, 5), torch.zeros(3, 2, dtype=torch.int64)
    probs[1, 2, 4] = torch.nan
    with pytest.raises(ValueError, match="第 1 行第 2 个位置的分布不对"):
        ops.mtp_verify_sample(probs, tokens, torch.zeros(3, 3))
    uniform = torch.zeros(3, 3)
    uniform[1, 0] = 0.9
    assert ops.mtp_verify_sample(probs, tokens, uniform)[0].tolist() == [2, 0, 2]
