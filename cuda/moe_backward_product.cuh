// moe_experts_backward 的 16 位路径共用（sm_80 与 Hopper 只差流水）：每个分组矩阵乘的操作数在哪里、结果怎样写出。
#pragma once

#include "moe_act.cuh"
#include "moe_backward.cuh"

namespace dso {

__device__ __forceinline__ const uint16_t *elements(const void *p) {
  return static_cast<const uint16_t *>(p);
}

// gate、up 以 16 位存下时，截断与否仍按 fp32 的值：舍入越过了 limit 就退回（或进到）相邻的数。
template <class E>
__device__ __forceinline__ float keep_side(float x, float limit) {
  float rounded = round_to(E::dtype, x);
  bool over = fabsf(x) > limit;
  if ((fabsf(rounded) > limit) == over) return rounded;
  unsigned short bits = E::dtype == DSO_BF16 ? to_bf16_bits(rounded) : to_half_bits(rounded);
  bits = static_cast<unsigned short>(over ? bits + 1 : bits - 1);
  return E::dtype == DSO_BF16 ? bf16_bits(bits) : half_bits(bits);
}

// ---- 按行的三步：一块行乘一个专家的权重 ----

// WIDE：权重按 [k][列] 存，否则 [列][k]。
template <class E, bool WIDE>
struct RowProduct {
  const BackwardParams &p;
  const dso_cuda_moe_experts_params &in;
  dso_cuda_moe_tile tile;
  BackwardStep step;
  dso_expert expert;
  bool paired;
  int inner, columns, depth, segments;  // k 分几段，各 depth：dg、du 各一段
  int64_t left_next, right_next;        // 下一段在哪里

  __device__ __forceinline__ RowProduct(const BackwardParams &params, const dso_cuda_moe_tile &at,
                                        BackwardStep s)
      : p(params),
        in(params.in),
        tile(at),
        step(s),
        expert(expert_at(params.in.w, params.in.routing.experts, at.expert)) {
    paired = in.w.paired && at.expert < in.routing.experts;
    inner = static_cast<int>(expert.inner);
    int both = in.w.gated ? 2 * inner : inner;
    columns = step == GATE_UP ? both : step == HIDDEN_GRAD ? inner : static_cast<int>(in.k);
    segments = step == INPUT_GRAD && in.w.gated && !paired ? 2 : 1;
    depth = static_cast<int>(step == GATE_UP ? in.k : step == HIDDEN_GRAD ? in.n : both / segments);
    left_next = segments == 2 ? gradient_row(p, tile.row).up : 0;
    right_next = segments == 2 ? elements(expert.up.data) - elements(expert.gate.data) : 0;
  }

  // 一块的第 row 行；越界的为空。
  __device__ __forceinline__ const uint16_t *left(int row) const {
    if (row >= tile.rows) return nullptr;
    int64_t at = tile.row + row;
    if (step == GATE_UP) return elements(in.x.data) + in.routing.token[at] * in.x.rs;
    if (step == HIDDEN_GRAD) return elements(p.dy.data) + in.routing.token[at] * p.dy.rs;
    return elements(p.gu) + gradient_row(p, at).at;
  }

  // 第 c 列在 k = 0 的地址；越界的为空。GATE_UP 的列是 gate 的全部、再 up 的全部。
  __device__ __forceinline__ const uint16_t *right(int c) const {
    if (c >= columns) return nullptr;
    if (step == HIDDEN_GRAD) return elements(expert.down.data) + (WIDE ? c : c * expert.down.rs);
    bool up = step == GATE_UP && !paired && c >= inner;
    int n = up ? c - inner : c;
    const uint16_t *base = elements(up ? expert.up.data : expert.gate.data);
    return base + (WIDE ? n : n * (up ? expert.up.rs : expert.gate.rs));
  }

  // WIDE 时 k 的间隔；second：第二段。
  __device__ __forceinline__ int64_t right_stride(bool second) const {
    if (step == HIDDEN_GRAD) return expert.down.rs;
    return second ? expert.up.rs : expert.gate.rs;
  }

  // 第 row 行第 c 列起的 8 个结果；返回其中的 <A, h>。
  __device__ __forceinline__ float finish(int row, int c, Vec<8> v) const {
    if (row >= tile.rows || c >= columns) return 0.0f;
    if (step == HIDDEN_GRAD) return store_hidden(tile.row + row, c, v);
    if (step == GATE_UP)
      store_gate_up(tile.row + row, c, v);
    else
      store<8>(in.o, E::dtype, (tile.row + row) * in.k + c, v);
    return 0.0f;
  }

  // 加偏置，写进 gu；8 列在同一边。
  __device__ __forceinline__ void store_gate_up(int64_t row, int c, Vec<8> v) const {
    bool up = !paired && c >= inner, clips = dso_act_clips(in.act.kind);
    int n = up ? c - inner : c;
    int64_t bias_step = paired ? 1 : expert.bias_step;
    const void *bias = up ? expert.up_bias : expert.gate_bias;
#pragma unroll
    for (int j = 0; j < 8; j++) {
      float x = v.v[j];
      if (bias) x += load_one(bias, E::dtype, (n + j) * bias_step);
      bool one_sided = paired ? j % 2 == 0 : !up;  // gate 只截上面
      v.v[j] = clips && !(one_sided && x < 0.0f) ? keep_side<E>(x, in.act.limit) : x;
    }
    GradientRow to = gradient_row(p, row);
    store<8>(p.gu, E::dtype, to.at + (up ? to.up : 0) + n, v);
  }

  // A 的 8 列：gu 换成梯度，写 w h。
  __device__ __forceinline__ float store_hidden(int64_t row, int c, const Vec<8> &a) const {
    GradientRow to = gradient_row(p, row);
    Vec<8> h;
    float weight = row_weight(in, row), dot = 0.0f;
    auto one = [&](int j, float &gate, float &up) {
      Activated d = activate_backward<true>(in.act, in.w.gated, gate, up, weight * a.v[j]);
      dot += a.v[j] * d.h;
      h.v[j] = weight * d.h, gate = d.gate, up = d.up;
    };
    if (paired) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        int64_t pairs = to.at + 2 * c + 8 * half;
        Vec<8> both = load<8>(p.gu, E::dtype, pairs);
#pragma unroll
        for (int j = 0; j < 4; j++) one(4 * half + j, both.v[2 * j], both.v[2 * j + 1]);
        store<8>(p.gu, E::dtype, pairs, both);
      }
    } else {
      Vec<8> gate = load<8>(p.gu, E::dtype, to.at + c), up = {};
      if (in.w.gated) up = load<8>(p.gu, E::dtype, to.at + to.up + c);
#pragma unroll
      for (int j = 0; j < 8; j++) one(j, gate.v[j], up.v[j]);
      store<8>(p.gu, E::dtype, to.at + c, gate);
      if (in.w.gated) store<8>(p.gu, E::dtype, to.at + to.up + c, up);
    }
    store<8>(in.h, E::dtype, hidden_at(in, row) + c, h);
    return dot;
  }
};

// ---- 权重的梯度：k 是专家的全部行 ----

// 一边：[专家的行][列]。
struct WeightSide {
  const uint16_t *data;  // 不收集时是专家的第一行
  int64_t rs;
  bool gathered;
  int columns, half, skip;  // 第 half 列起另隔 skip 个元素

  // 第 c 列在第 0 行的地址；越界的为空。
  __device__ __forceinline__ const uint16_t *column(int c) const {
    return c < columns ? data + c + (c >= half ? skip : 0) : nullptr;
  }
};

template <class E>
struct WeightProduct {
  const BackwardParams &p;
  const dso_cuda_moe_experts_params &in;
  WeightStep step;
  bool transposed, paired;
  int inner;
  ExpertRows rows;
  dso_expert grad;
  WeightSide left, right;

  __device__ __forceinline__ WeightProduct(const BackwardParams &params, WeightStep s, int64_t e)
      : p(params),
        in(params.in),
        step(s),
        rows(rows_of(params.in.routing, e)),
        grad(expert_at(params.grad, params.in.routing.experts, e)) {
    bool routed = e < in.routing.experts;
    transposed = in.w.transposed && routed, paired = in.w.paired && routed;
    inner = static_cast<int>(expert_at(in.w, in.routing.experts, e).inner);
    if (step == GATE_UP_WEIGHT) {
      GradientRow g = gradient_row(p, rows.begin);
      int both = in.w.gated ? 2 * inner : inner;
      left = {elements(p.gu) + g.at, g.stride, false, both, inner, paired ? 0 : g.up - inner};
      right = whole(in.x, in.k);
    } else {
      left = whole(p.dy, in.n);
      right = {elements(in.h) + hidden_at(in, rows.begin),
               routed ? in.h_rs : in.w.shared.inner,
               false,
               inner,
               inner,
               0};
    }
    if (transposed) {
      WeightSide other = left;
      left = right, right = other;
    }
  }

  __device__ static WeightSide whole(const dso_mat &m, int64_t columns) {
    return {elements(m.data), m.rs, true, static_cast<int>(columns), static_cast<int>(columns), 0};
  }

  // 要不要算从 (m, n) 起的一块。
  __device__ __forceinline__ bool wanted(int m, int n) const {
    return (step == DOWN_WEIGHT ? grad.down.data : grad.gate.data) && m < left.columns &&
           n < right.columns && !(p.add && rows.rows == 0);
  }

  // 第 m 行第 n 列起的 8 个结果；它们在 gate 或 up 的同一边。
  __device__ __forceinline__ void finish(int m, int n, Vec<8> v) const {
    if (m >= left.columns || n >= right.columns) return;
    const dso_mat *to = &grad.down;
    if (step == GATE_UP_WEIGHT) {
      int at = transposed ? n : m;
      bool up = in.w.gated && !paired && at >= inner;
      if (up && transposed) n -= inner;
      if (up && !transposed) m -= inner;
      to = up ? &grad.up : &grad.gate;
    }
    void *data = const_cast<void *>(to->data);
    int64_t at = m * to->rs + n;
    if (p.add) {
      Vec<8> old = load<8>(data, E::dtype, at);
#pragma unroll
      for (int j = 0; j < 8; j++) v.v[j] += old.v[j];
    }
    store<8>(data, E::dtype, at, v);
  }
};

}  // namespace dso
