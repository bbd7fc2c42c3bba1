"""训练用的紧凑前向：与 transformers 的 DeepseekV3ForCausalLM 共用参数，输出相同，CPU 上快得多。

与原版的差别只在算法组织：权重每步转一次 bf16；token 按专家排序后成段做矩阵乘，反向手写；
语言模型头与交叉熵按块合算，不保留整张 logits。``torch.compile`` 融合其余的逐元素运算。
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# 语言模型头每块的行数：块的 fp32 logits（2048 x 4096）约 32 MB，能在块内复用缓存。
_HEAD_ROWS = 2048


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """HF 语义的 RMS 归一化：fp32 里归一，转回输入类型后再乘权重。"""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight.to(x.dtype) * wide.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """交错输入、半分输出的旋转位置编码；x 为 [B, T, H, d]，cos/sin 为 [B, T, 1, d/2]。"""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.cat([even * cos - odd * sin, odd * cos + even * sin], dim=-1)


def _segments(counts: Tensor) -> list[tuple[int, int, int]]:
    """把每个专家的 token 数变成 (专家, 起, 止) 列表，略去没有 token 的专家。"""
    result, begin = [], 0
    for expert, count in enumerate(counts.tolist()):
        if count:
            result.append((expert, begin, begin + count))
        begin += count
    return result


@torch.library.custom_op("stdlib_model::experts", mutates_args=())
def experts(
    x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """路由专家：x [N, h]，index/weight [N, k]，gate_up [E, 2I, h]，down [E, h, I]。

    返回 (y [N, h], 反向所需的 gate_up 输出 [N*k, 2I]、加权前输出 [N*k, h]、排序、每专家 token 数)。
    """
    top_k = index.shape[1]
    flat = index.reshape(-1)
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=gate_up.shape[0])
    rows = x.index_select(0, order // top_k)
    hidden = x.new_empty(rows.shape[0], gate_up.shape[1])
    out = x.new_empty(rows.shape[0], x.shape[1])
    for expert, begin, end in _segments(counts):
        torch.mm(rows[begin:end], gate_up[expert].t(), out=hidden[begin:end])
    gate, up = hidden.chunk(2, dim=-1)
    act = F.silu(gate).mul_(up)
    for expert, begin, end in _segments(counts):
        torch.mm(act[begin:end], down[expert].t(), out=out[begin:end])
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel()))
    picked = out.index_select(0, inverse).view(x.shape[0], top_k, x.shape[1])
    y = torch.bmm(weight.to(x.dtype).unsqueeze(1), picked).squeeze(1)
    return y, hidden, out, order, counts


@experts.register_fake
def _(x, index, weight, gate_up, down):  # pylint: disable=unused-argument
    rows = index.numel()
    return (
        torch.empty_like(x),
        x.new_empty(rows, gate_up.shape[1]),
        x.new_empty(rows, x.shape[1]),
        index.new_empty(rows),
        index.new_empty(gate_up.shape[0]),
    )


@torch.library.custom_op("stdlib_model::experts_backward", mutates_args=())
def experts_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    gate_up: Tensor,
    down: Tensor,
    hidden: Tensor,
    out: Tensor,
    order: Tensor,
    counts: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`experts` 的反向，返回 x、weight、gate_up、down 的梯度。"""
    top_k = weight.shape[1]
    token = order // top_k
    rows = x.index_select(0, token)
    grad_rows = grad.index_select(0, token)
    scale = weight.reshape(-1).index_select(0, order)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel()))
    grad_scale = torch.linalg.vecdot(grad_rows.float(), out.float())
    grad_weight = grad_scale.index_select(0, inverse).view_as(weight).to(weight.dtype)
    grad_rows.mul_(scale.to(grad.dtype).unsqueeze(1))

    gate, up = hidden.chunk(2, dim=-1)
    silu = F.silu(gate)
    act = silu * up
    grad_act = torch.empty_like(act)
    grad_gate_up, grad_down = torch.zeros_like(gate_up), torch.zeros_like(down)
    for expert, begin, end in _segments(counts):
        torch.mm(grad_rows[begin:end], down[expert], out=grad_act[begin:end])
        torch.mm(grad_rows[begin:end].t(), act[begin:end], out=grad_down[expert])
    grad_hidden = torch.empty_like(hidden)
    torch.mul(grad_act, silu, out=grad_hidden[:, gate.shape[1] :])
    grad_hidden[:, : gate.shape[1]] = torch.ops.aten.silu_backward(grad_act.mul_(up), gate)
    grad_sorted = torch.empty_like(rows)
    for expert, begin, end in _segments(counts):
        torch.mm(grad_hidden[begin:end], gate_up[expert], out=grad_sorted[begin:end])
        torch.mm(grad_hidden[begin:end].t(), rows[begin:end], out=grad_gate_up[expert])
    grad_x = grad_sorted.index_select(0, inverse).view(-1, top_k, x.shape[1]).sum(1)
    return grad_x, grad_weight, grad_gate_up, grad_down


@experts_backward.register_fake
def _(grad, x, weight, gate_up, down, hidden, out, order, counts):
    # pylint: disable=unused-argument
    return (
        torch.empty_like(x),
        torch.empty_like(weight),
        torch.empty_like(gate_up),
        torch.empty_like(down),
    )


def _save_experts(ctx, inputs, output):
    x, _, weight, gate_up, down = inputs
    _, hidden, out, order, counts = output
    ctx.save_for_backward(x, weight, gate_up, down, hidden, out, order, counts)
    ctx.set_materialize_grads(False)


def _grad_experts(ctx, grad, *_):
    grad_x, grad_weight, grad_gate_up, grad_down = experts_backward(
        grad.contiguous(), *ctx.saved_tensors
    )
    return grad_x, None, grad_weight, grad_gate_up, grad_down


experts.register_autograd(_grad_experts, setup_context=_save_experts)


def route(router: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """sigmoid 打分、带修正偏置选 top-k（n_group 为 1），返回下标与归一后的权重 [N, k]。"""
    scores = F.linear(x.float(), router.weight).sigmoid()
    index = (scores + router.e_score_correction_bias).topk(router.top_k, dim=-1, sorted=False)[1]
    weight = scores.gather(1, index)
    weight = weight / (weight.sum(-1, keepdim=True) + 1e-20) * router.routed_scaling_factor
    return index, weight


@torch.compile(dynamic=False)
def _softmax_grad(logits: Tensor, want: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """一块 logits [n, V] 的交叉熵之和乘 scale，以及它对 logits 的梯度。"""
    wide = logits.float()
    log_sum = torch.logsumexp(wide, dim=-1, keepdim=True)
    hit = torch.arange(wide.shape[1]) == want[:, None]
    loss = (log_sum.squeeze(1) - wide.gather(1, want[:, None]).squeeze(1)).sum() * scale
    grad = (torch.exp(wide - log_sum) - hit.float()) * scale
    return loss, grad.to(logits.dtype)


class _HeadLoss(torch.autograd.Function):
    """按块合算语言模型头与交叉熵：前向里就算好梯度，任何时候只有一块 logits。"""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float32)
        grad_x, grad_weight = torch.empty_like(x), torch.zeros_like(weight, dtype=torch.float32)
        scale = 1.0 / x.shape[0]
        for begin in range(0, x.shape[0], _HEAD_ROWS):
            rows, want = x[begin : begin + _HEAD_ROWS], target[begin : begin + _HEAD_ROWS]
            part, grad = _softmax_grad(torch.mm(rows, weight.t()), want, scale)
            total += part
            torch.mm(grad, weight, out=grad_x[begin : begin + _HEAD_ROWS])
            grad_weight += torch.mm(grad.t(), rows)
        ctx.save_for_backward(grad_x, grad_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad_x, grad_weight = ctx.saved_tensors
        return grad_x * grad.to(grad_x.dtype), grad_weight * grad.to(grad_weight.dtype), None


class FastForward(nn.Module):
    """共用 HF 模型参数的训练前向。

    参数:
        model: DeepseekV3ForCausalLM，参数为 fp32（主权重）。
        dtype: 计算类型；bf16 用于训练，fp32 用于与原版核对。
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype = torch.bfloat16):
        super().__init__()
        self.model = model
        self.config = model.config
        self.dtype = dtype
        inv_freq, _ = model.model.rotary_emb.compute_default_rope_parameters(model.config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def forward(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, list[Tensor]]:
        """tokens、positions [B, T] → 末层归一后的隐藏 [B*T, h] 与各 MoE 层的专家下标。"""
        batch, length = tokens.shape
        angle = positions[..., None].float() * self.inv_freq
        cos, sin = angle.cos().to(self.dtype)[:, :, None], angle.sin().to(self.dtype)[:, :, None]
        x = F.embedding(tokens.reshape(-1), self.model.model.embed_tokens.weight).to(self.dtype)
        chosen: list[Tensor] = []
        for layer in self.model.model.layers:
            eps = layer.input_layernorm.variance_epsilon
            normed = rms_norm(x, layer.input_layernorm.weight, eps)
            x = x + self._attention(layer.self_attn, normed, cos, sin, batch, length)
            normed = rms_norm(x, layer.post_attention_layernorm.weight, eps)
            x = x + self._mlp(layer.mlp, normed, chosen)
        norm = self.model.model.norm
        return rms_norm(x, norm.weight, norm.variance_epsilon), chosen

    def loss(self, hidden: Tensor, target: Tensor) -> Tensor:
        """末层隐藏 [N, h] 与目标 [N] 的平均交叉熵（nat / token）。"""
        return _HeadLoss.apply(hidden, self.model.lm_head.weight.to(self.dtype), target)

    def _linear(self, x: Tensor, module: nn.Module) -> Tensor:
        return F.linear(x, module.weight.to(self.dtype))

    def _attention(
        self, attn: nn.Module, x: Tensor, cos: Tensor, sin: Tensor, batch: int, length: int
    ) -> Tensor:
        config = self.config
        nope, rope, value = (
            config.qk_nope_head_dim,
            config.qk_rope_head_dim,
            config.v_head_dim,
        )
        low = rms_norm(self._linear(x, attn.q_a_proj), attn.q_a_layernorm.weight, 1e-6)
        query = self._linear(low, attn.q_b_proj).view(batch, length, -1, nope + rope)
        query = torch.cat([query[..., :nope], rotate(query[..., nope:], cos, sin)], dim=-1)
        latent, k_rope = self._linear(x, attn.kv_a_proj_with_mqa).split(
            [config.kv_lora_rank, rope], dim=-1
        )
        latent = rms_norm(latent, attn.kv_a_layernorm.weight, 1e-6)
        k_rope = rotate(k_rope.view(batch, length, 1, rope), cos, sin)
        expanded = self._linear(latent, attn.kv_b_proj).view(batch, length, -1, nope + value)
        k_rope = k_rope.expand(-1, -1, expanded.shape[2], -1)
        key = torch.cat([expanded[..., :nope], k_rope], dim=-1)
        out = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            expanded[..., nope:].transpose(1, 2),
            is_causal=True,
            scale=attn.scaling,
        )
        return self._linear(out.transpose(1, 2).reshape(batch * length, -1), attn.o_proj)

    def _mlp(self, mlp: nn.Module, x: Tensor, chosen: list[Tensor]) -> Tensor:
        if not hasattr(mlp, "experts"):
            return self._swiglu(mlp, x)
        index, weight = route(mlp.gate, x)
        chosen.append(index)
        routed = experts(
            x,
            index,
            weight,
            mlp.experts.gate_up_proj.to(self.dtype),
            mlp.experts.down_proj.to(self.dtype),
        )[0]
        return routed + self._swiglu(mlp.shared_experts, x)

    def _swiglu(self, mlp: nn.Module, x: Tensor) -> Tensor:
        gate = F.silu(self._linear(x, mlp.gate_proj))
        return self._linear(gate * self._linear(x, mlp.up_proj), mlp.down_proj)


@torch.no_grad()
def update_router_bias(model: nn.Module, chosen: Sequence[Tensor], rate: float) -> list[float]:
    """无辅助损失的负载均衡：选得少的专家加偏置、多的减，返回各层 最忙/平均 的负载比。"""
    ratios, routers = [], [m.mlp.gate for m in model.model.layers if hasattr(m.mlp, "gate")]
    for router, index in zip(routers, chosen, strict=True):
        load = torch.bincount(index.reshape(-1), minlength=router.weight.shape[0]).float()
        router.e_score_correction_bias += rate * torch.sign(load.mean() - load)
        ratios.append(float(load.max() / load.mean()))
    return ratios
