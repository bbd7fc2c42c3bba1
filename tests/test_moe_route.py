"""moe_route：对照 fp64 参考，前向与反向；平局、NaN、空输入、坏输入。"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_opt import ops, reference
from tests.op_cases import FLOATS, flipped, randn, strided, wide
from tests.tolerances import tol

F32 = torch.float32
OP = torch.ops.deepseek_opt.moe_route


def rule(top_k, score="sigmoid", **options):
    """算子的后九个参数，次序同模式（schema）。"""
    names = {"normalize": True, "softmax_after": False, "n_group": 1, "topk_group": 1}
    names |= {"group_score": "top2", "scaling": 1.0, "eps": 1e-20} | options
    return (top_k, score, *names.values())


RULES = {
    "V3": rule(6, n_group=8, topk_group=3, scaling=2.5),
    "V2": rule(6, "softmax", normalize=False, n_group=8, topk_group=3, group_score="max"),
    "V4": rule(6, "sqrtsoftplus", scaling=1.5),
    "Mixtral": rule(2, "softmax"),
    "gpt-oss": rule(4, "softmax", normalize=False, softmax_after=True),
    "全部专家": rule(40, "sigmoid", scaling=0.5),
    "一个专家": rule(1, "softmax", normalize=False),
}


def inputs(tokens, width=33, experts=40, dtype=F32, bias=True):
    weight = randn(experts, width, dtype=dtype, scale=max(width, 1) ** -0.5)
    biases = (randn(experts, dtype=dtype), randn(experts, scale=0.1)) if bias else (None, None)
    return (randn(tokens, width, dtype=dtype), weight, *biases)


def exact_from(logits, choice_bias, options):
    """由算子自己的 logits 出发的 fp64 参考：选择是离散的，logits 的舍入会换掉近乎平局的专家。"""
    choice = None if choice_bias is None else choice_bias.double()
    return reference.moe_route(logits.double(), None, None, choice, *options)


def check(args, options):
    logits, weights, indices, counts = OP(*args, *options)
    want = reference.moe_route(*(wide(a) for a in args), *options)
    assert logits.dtype == weights.dtype == F32
    torch.testing.assert_close(logits.double(), want[0], **tol(F32))
    _, exact, chosen, totals = exact_from(logits, args[3], options)
    differ = (chosen != indices).any(-1)
    scores = choice_scores(logits.double(), args[3], options)
    gap = (scores.gather(1, chosen) - scores.gather(1, indices)).abs().amax(-1)
    assert not (differ & (gap > 1e-6)).any(), "换掉的不是平局的专家"
    torch.testing.assert_close(weights.double()[~differ], exact[~differ], **tol(F32))
    assert torch.equal(counts, torch.bincount(indices.flatten(), minlength=logits.shape[1]))
    assert differ.any() or torch.equal(counts, totals)
    return logits, weights, indices, counts


def choice_scores(logits, choice_bias, options):
    scores = logits if options[3] else reference.moe.route_scores(logits, options[1])
    return scores if choice_bias is None else scores + choice_bias.double()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", RULES)
def test_against_fp64(name, dtype):
    for tokens in (1, 7, 130):
        check(inputs(tokens, dtype=dtype), RULES[name])


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", FLOATS)
def test_shapes_that_cross_blocks(dtype):
    """多个列块与行块、奇数宽、专家数不是 16 的倍数。"""
    check(inputs(300, 601, 131, dtype, bias=False), rule(3))
    check(inputs(96, 17, 257, dtype), rule(8))
    check(inputs(97, 1, 3, dtype), rule(3, "softmax"))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", FLOATS)
def test_logits_as_input(dtype):
    x = randn(9, 24, dtype=dtype, scale=3.0)
    bias, choice = randn(24), randn(24, dtype=dtype)
    for options in (rule(4, n_group=6, topk_group=2), rule(4, "softmax", softmax_after=True)):
        logits, *_ = check((x, None, bias, choice), options)
        assert torch.equal(logits, x.float() + bias)
        assert OP(x, None, None, None, *options)[0].data_ptr() != x.data_ptr()


@pytest.mark.usefixtures("isa")
def test_views_and_mixed_dtypes():
    x, weight, bias, choice = inputs(5)
    want = OP(x, weight, bias, choice, *rule(4))
    for view in (strided, flipped):
        got = OP(view(x), view(weight), bias, choice, *rule(4))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
    check((x, weight.bfloat16(), bias.half(), choice), rule(4))
    check((x.half(), weight, None, choice.bfloat16()), rule(4, "softmax"))


@settings(max_examples=60)
@given(st.data())
def test_any_shape_and_rule(data):
    groups, size = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 12))
    chosen = data.draw(st.integers(1, groups))
    score = data.draw(st.sampled_from(ops.SCORES))
    options = rule(
        data.draw(st.integers(1, chosen * size)),
        score,
        normalize=data.draw(st.booleans()),
        softmax_after=score == "softmax" and data.draw(st.booleans()),
        n_group=groups,
        topk_group=chosen,
        group_score=data.draw(st.sampled_from(["top2", "max"])),
        scaling=data.draw(st.sampled_from([1.0, 2.5])),
    )
    tokens = data.draw(st.integers(0, 130))
    bias = data.draw(st.booleans())
    check(inputs(tokens, data.draw(st.integers(0, 40)), groups * size, bias=bias), options)


# ---- 选择的细节 ----


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("score", ops.SCORES)
def test_ties_take_the_lower_index(score):
    logits = torch.tensor([[1.0, 3.0, 3.0, 1.0, 3.0, 1.0], [0.0, -0.0, 0.0, -0.0, 0.0, -0.0]])
    _, weights, indices, counts = ops.moe_route(logits, top_k=4, score=score)
    assert indices.tolist() == [[1, 2, 4, 0], [0, 1, 2, 3]]
    assert (weights[1] == weights[1, 0]).all() and counts.tolist() == [2, 2, 2, 1, 1, 0]
    groups = {"n_group": 3, "topk_group": 2, "score": score}
    _, _, indices, _ = ops.moe_route(torch.zeros(2, 6), top_k=3, **groups)
    assert indices.tolist() == [[0, 1, 2]] * 2
    last = torch.tensor([[0.0, 0.0, 1.0, 1.0, 2.0, 2.0]])
    assert ops.moe_route(last, top_k=3, **groups)[2].tolist() == [[4, 5, 2]]


@pytest.mark.usefixtures("isa")
def test_negative_zero_ties_with_zero():
    logits = torch.tensor([[-1.0, -0.0, 0.0, -0.0]])
    options = {"score": "softmax", "softmax_after": True}
    assert ops.moe_route(logits, top_k=3, **options)[2].tolist() == [[1, 2, 3]]


def test_groups_are_really_limited():
    """每个词元选中的专家只来自 topk_group 组；选的是得分最高的组。"""
    _, _, indices, _ = OP(*inputs(200, bias=False), *RULES["V3"])
    assert max(len(set(row)) for row in (indices // 5).tolist()) <= 3
    logits = torch.tensor([[9.0, -9.0, 1.0, 1.0], [0.0, 0.0, 5.0, -9.0]])
    options = {"top_k": 1, "n_group": 2, "topk_group": 1, "score": "softmax", "softmax_after": True}
    assert ops.moe_route(logits, **options, group_score="max")[2].tolist() == [[0], [2]]
    logits = torch.tensor([[3.0, -9.0, 1.0, 1.0]])
    assert ops.moe_route(logits, **options, group_score="top2")[2].tolist() == [[2]]


def test_negative_choice_stays_inside_the_group():
    """偏置把选中组内的得分压到负数甚至 -inf，也不会选到组外。"""
    choice = torch.tensor([0.0, -torch.inf, -5.0, -5.0])
    options = {"n_group": 2, "topk_group": 1, "group_score": "max"}
    _, weights, indices, _ = ops.moe_route(
        torch.tensor([[1.0, 1.0, 1.0, 1.0]]), choice_bias=choice, top_k=2, **options
    )
    assert indices.tolist() == [[0, 1]]
    torch.testing.assert_close(weights, torch.full((1, 2), 0.5))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("name", RULES)
def test_non_finite_logits(name):
    """NaN、无穷：下标仍合法且不重复，别的词元不受影响；结果与逐步的 torch 写法一致。"""
    logits = randn(6, 40)
    clean = OP(logits, None, None, None, *RULES[name])
    logits[1, 7] = torch.nan
    logits[2] = torch.nan
    logits[3, 4] = -torch.inf
    logits[4] = -torch.inf
    logits[5, 9] = torch.inf
    got = OP(logits, None, None, None, *RULES[name])
    for a, b in zip(got[:3], clean[:3], strict=True):
        assert torch.equal(a[0], b[0])
    assert all(len(set(row)) == len(row) for row in got[2].tolist())
    assert got[2].min() >= 0 and got[2].max() < 40 and got[3].sum() == got[2].numel()
    want = reference.moe_route(logits.double(), None, None, None, *RULES[name])
    assert torch.equal(got[2], want[2])
    torch.testing.assert_close(got[1].double(), want[1], **tol(F32), equal_nan=True)
    assert got[1][1:3].isnan().any()


@pytest.mark.usefixtures("isa")
def test_extreme_logits():
    logits = torch.tensor([[1e4, -1e4, 90.0, -90.0, 60.0, -60.0, 0.0, 1e-30]])
    for score in ops.SCORES:
        check((logits, None, None, None), rule(8, score, normalize=False))


@pytest.mark.usefixtures("isa")
def test_empty():
    logits, weights, indices, counts = OP(*inputs(0), *RULES["V3"])
    assert logits.shape == (0, 40) and weights.shape == indices.shape == (0, 6)
    assert counts.tolist() == [0] * 40
    x, weight, *_ = inputs(0)
    weight.requires_grad_()
    ops.moe_route(x, weight, top_k=2)[1].sum().backward()
    assert (weight.grad == 0).all()
    check((randn(4, 0), randn(5, 0), randn(5), None), rule(2))


@pytest.mark.parametrize("dtype", FLOATS)
def test_same_result_for_any_thread_count(threads, dtype):
    for tokens in (1, 40, 700):
        args, runs = inputs(tokens, dtype=dtype), []
        for count in (1, 2, 5):
            threads(count)
            x, weight, bias = (t.clone().requires_grad_() for t in args[:3])
            out = OP(x, weight, bias, args[3], *RULES["V3"])
            (out[0].square().mean() + out[1].square().sum()).backward()
            runs.append([*out, x.grad, weight.grad, bias.grad])
        for other in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(other, runs[0], strict=True))


# ---- 求导、autocast、编译 ----


def gradients(function, args, options, weigh):
    leaves = [None if a is None else a.detach().clone().requires_grad_() for a in args[:3]]
    logits, weights, *_ = function(*leaves, args[3], *options)
    loss = (weights * weigh[1].to(weights.dtype)).sum()
    loss = loss + (0 if weigh[0] is None else (logits * weigh[0].to(logits.dtype)).sum())
    loss.backward()
    return [None if t is None else t.grad for t in leaves]


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("with_logits", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_gradients_against_fp64(name, with_logits):
    for tokens, with_weight in ((5, True), (130, True), (5, False)):
        args = inputs(tokens) if with_weight else (randn(5, 40), None, randn(40), randn(40))
        indices = OP(*args, *RULES[name])[2]
        weigh = (randn(tokens, 40) if with_logits else None, torch.randn(indices.shape))
        exact = tuple(wide(a) for a in args)
        assert torch.equal(reference.moe_route(*exact, *RULES[name])[2], indices)
        ours = gradients(OP, args, RULES[name], weigh)
        for a, b in zip(ours, gradients(reference.moe_route, exact, RULES[name], weigh)):
            assert (a is None) == (b is None)
            if b is not None:
                size = max(1.0, b.abs().max().item())
                torch.testing.assert_close(a.double() / size, b / size, **tol(F32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradient_dtypes(dtype):
    args = inputs(5, dtype=dtype)
    weigh = (None, torch.randn(5, 6))
    exact = tuple(wide(a) for a in args)
    assert torch.equal(reference.moe_route(*exact, *RULES["V3"])[2], OP(*args, *RULES["V3"])[2])
    ours = gradients(OP, args, RULES["V3"], weigh)
    for a, b in zip(ours, gradients(reference.moe_route, exact, RULES["V3"], weigh), strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, **tol(dtype))


@pytest.mark.parametrize("score", ops.SCORES)
@pytest.mark.parametrize("normalize", [False, True])
def test_gradcheck(score, normalize):
    """参考实现以 fp64 通过 gradcheck；算子的反向又与它一致（上面）。算子自己以 fp32 再查一遍。"""
    spread = torch.linspace(-1, 1, 8)  # 间隔 0.29：扰动不会改变选择
    logits = torch.stack([spread, spread.flip(0), spread.roll(3)]).requires_grad_()
    options = rule(3, score, normalize=normalize, scaling=2.0)

    def weights(function):
        return lambda z: function(z, None, None, None, *options)[:2]

    assert torch.autograd.gradcheck(
        weights(reference.moe_route), logits.detach().double().requires_grad_()
    )
    assert torch.autograd.gradcheck(weights(OP), logits, eps=1e-2, atol=2e-3, rtol=2e-3)


def test_saturated_scores_have_finite_gradients():
    """完全饱和的得分：梯度是 0 而不是 NaN。"""
    for score in ops.SCORES:
        logits = torch.tensor([[-200.0, 200.0, 0.0]], requires_grad=True)
        ops.moe_route(logits, top_k=3, score=score)[1].square().sum().backward()
        assert logits.grad.isfinite().all() and logits.grad[0, 0] == 0


def test_indices_and_counts_have_no_gradient():
    x, weight, bias, choice = inputs(5)
    out = OP(x.requires_grad_(), weight, bias, choice.requires_grad_(), *rule(3))
    assert [t.requires_grad for t in out] == [True, True, False, False]
    out[1].sum().backward()
    assert choice.grad is None and x.grad is not None and weight.grad is None


def test_autocast_keeps_fp32():
    args = inputs(5)
    want = OP(*args, *rule(3))
    with torch.autocast("cpu", torch.bfloat16):
        got = OP(*args, *rule(3))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("name", RULES)
def test_opcheck(name):
    x, weight, bias, choice = inputs(5)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    torch.library.opcheck(OP.default, (*leaves, choice, *RULES[name]))
    torch.library.opcheck(OP.default, (randn(3, 40), None, None, None, *RULES[name]))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic):
    def step(x, weight, choice):
        options = {"top_k": 4, "n_group": 8, "topk_group": 3, "scaling": 2.5}
        _, weights, indices, counts = ops.moe_route(x, weight, None, choice, **options)
        return (weights * indices).sum() + counts.float().square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for tokens in (3, 9):
        x, weight, _, choice = inputs(tokens)
        results = []
        for function in (step, compiled):
            leaves = [t.clone().requires_grad_() for t in (x, weight)]
            loss = function(*leaves, choice)
            loss.backward()
            results.append((loss.detach(), *(t.grad for t in leaves)))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


def test_mixtral_is_also_softmax_after():
    """对全部专家 softmax 再归一化，等于只对所选的 softmax。"""
    x, weight, *_ = inputs(30)
    first = ops.moe_route(x, weight, top_k=4, score="softmax")
    options = {"score": "softmax", "softmax_after": True, "normalize": False}
    second = ops.moe_route(x, weight, top_k=4, **options)
    assert torch.equal(first[2], second[2])
    torch.testing.assert_close(first[1], second[1], **tol(F32))


# ---- 坏输入 ----


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"x": randn(4)}, r"x 的形状应为 \[\*, \*\]，实际是 \[4\]"),
        ({"x": randn(3, 8).double()}, "x 的类型.*float64"),
        ({"weight": randn(12, 7)}, r"weight 的形状应为 \[\*, 8\]，实际是 \[12, 7\]"),
        ({"weight": randn(12, 8).long()}, "weight 的类型.*int64"),
        ({"weight": randn(0, 8)}, "top_k 应在 1 与专家数 0 之间"),
        ({"logit_bias": randn(11)}, r"logit_bias 的形状应为 \[12\]，实际是 \[11\]"),
        ({"logit_bias": randn(12).double()}, "logit_bias 的类型"),
        ({"choice_bias": randn(1, 12)}, "choice_bias 的形状"),
        ({"choice_bias": randn(12).long()}, "choice_bias 的类型"),
        ({"top_k": 13}, "top_k 应在 1 与专家数 12 之间，实际是 13"),
        ({"top_k": 0}, "top_k 应在 1 与专家数 12 之间，实际是 0"),
        ({"n_group": 5}, "n_group 应整除专家数 12，实际是 5"),
        ({"n_group": 0}, "n_group 应整除专家数 12，实际是 0"),
        ({"n_group": 3, "topk_group": 4}, "topk_group 应在 1 与 n_group = 3 之间，实际是 4"),
        ({"topk_group": 0}, "topk_group 应在"),
        ({"n_group": 6, "topk_group": 1}, r"top_k 应不大于可选的专家数 2（1 组，每组 2 个）.*3"),
        ({"score": "tanh"}, "score 应为 sigmoid、softmax、sqrtsoftplus 之一，实际是 tanh"),
        ({"group_score": "mean"}, "group_score 应为 top2、max 之一，实际是 mean"),
        ({"softmax_after": True}, "softmax_after 为 True 时 score 应为 softmax"),
        ({"scaling": float("nan")}, "scaling 应为有限的数"),
        ({"eps": -1.0}, "eps 应为非负的有限数"),
    ],
)
def test_bad_input(changes, message):
    good = {"x": randn(3, 8), "weight": randn(12, 8), "top_k": 3}
    ops.moe_route(**good)
    with pytest.raises(ValueError, match=message) as caught:
        ops.moe_route(**{**good, **changes})
    assert "deepseek_opt：moe_route：" in str(caught.value)


@pytest.mark.parametrize(
    "position, value, message",
    [
        (0, randn(3, 7), "d_logits 的形状"),
        (1, randn(3, 3), "d_weights 的形状"),
        (1, randn(3, 2).half(), "d_weights 的类型"),
        (2, randn(3, 8).half(), "logits 的类型"),
        (3, torch.tensor([[0, 8]] * 3), r"indices\[0, 1\] 应在 \[0, 8\) 内，实际是 8"),
        (3, torch.tensor([[0, -1]] * 3), "实际是 -1"),
        (3, torch.zeros(2, 2, dtype=torch.int64), "indices 的形状"),
        (3, torch.zeros(3, 2), "indices 的类型"),
        (4, "tanh", "score 应为"),
    ],
)
def test_bad_backward_input(position, value, message):
    args = [randn(3, 8), randn(3, 2), randn(3, 8), torch.tensor([[0, 7]] * 3)]
    args += ["sigmoid", True, False, 1.0, 1e-20]
    backward = torch.ops.deepseek_opt.moe_route_backward
    assert backward(*args).shape == (3, 8)
    args[position] = value
    with pytest.raises(ValueError, match=message):
        backward(*args)


def test_large_k_against_torch_topk():
    """k 接近专家数：与 torch.topk 的值一致。"""
    logits = randn(50, 256)
    for k in (1, 100, 255, 256):
        got = ops.moe_route(logits, top_k=k, normalize=False)[1]
        torch.testing.assert_close(got, logits.sigmoid().topk(k)[0], **tol(F32))
