// moe_experts_backward 的 16 位路径共用（sm_80 与 Hopper 只差流水）：每个分组矩阵乘的操作数在哪里、结果怎样写出。
#pragma once

#include "moe_act.cuh"
#include "moe_backward.cuh"

namespace dso {

__device__ __forceinline__ const uint16_t *elements(const void *p) {
  return static_cast<const uint16_t *>(p);
}

// ---- 按行的三步：一块行乘一个专家的权重 ----

// 一块的形状：列数，k 分几段、各多长（dg、du 各一段）。
struct RowShape {
  int inner, columns, depth, segments;
  bool paired, apart;  // apart：列（GATE_UP）或 k（INPUT_GRAD）先是 gate、再是 up

  __device__ __forceinline__ RowShape(const BackwardParams &p, BackwardStep step, int e) {
    const dso_cuda_moe_experts_params &in = p.in;
    paired = in.w.paired && e < in.routing.experts;
    apart = step != HIDDEN_GRAD && in.w.gated && !paired;
    inner = static_cast<int>(expert_at(in.w, in.routing.experts, e).inner);
    int both = in.w.gated ? 2 * inner : inner;
    columns = step == GATE_UP ? both : step == HIDDEN_GRAD ? inner : static_cast<int>(in.k);
    segments = step == INPUT_GRAD && apart ? 2 : 1;
    depth = static_cast<int>(step == GATE_UP ? in.k : step == HIDDEN_GRAD ? in.n : both / segments);
  }
};

// 操作数的位置。WIDE：权重按 [k][列] 存，否则 [列][k]。
template <bool WIDE>
struct RowOperands : RowShape {
  const uint16_t *left_base, *low, *high;  // 第 half 列起、第二段在 high
  int64_t left_rs, low_rs, high_rs;
  const int32_t *token;  // 收集的行；NULL 时是这一块自己的行
  int rows, half, left_next;

  __device__ __forceinline__ RowOperands(const BackwardParams &p, const dso_cuda_moe_tile &tile,
                                         BackwardStep step)
      : RowShape(p, step, tile.expert), rows(tile.rows) {
    const dso_cuda_moe_experts_params &in = p.in;
    dso_expert e = expert_at(in.w, in.routing.experts, tile.expert);
    bool down = step == HIDDEN_GRAD;
    low = elements(down ? e.down.data : e.gate.data), high = elements(e.up.data);
    low_rs = down ? e.down.rs : e.gate.rs, high_rs = e.up.rs;
    half = step == GATE_UP && apart ? inner : columns;
    token = step == INPUT_GRAD ? nullptr : in.routing.token + tile.row;
    GradientRow gu = gradient_row(p, tile.row);
    left_next = gu.up;
    left_base = step == INPUT_GRAD ? elements(p.gu) + gu.at
                                   : elements(step == GATE_UP ? in.x.data : p.dy.data);
    left_rs = step == INPUT_GRAD ? gu.stride : step == GATE_UP ? in.x.rs : p.dy.rs;
  }

  // 一块的第 row 行是 left_base 的第几行；越界的是 -1。
  __device__ __forceinline__ int left_index(int row) const {
    return row >= rows ? -1 : token ? token[row] : row;
  }

  // 第 c 列在 k = 0 的地址；越界的为空。转置的权重里 up 的列紧接 gate 的。
  __device__ __forceinline__ const uint16_t *right(int c) const {
    if (c >= columns) return nullptr;
    if (WIDE) return low + c;
    bool up = c >= half;
    return up ? high + (c - half) * high_rs : low + c * low_rs;
  }

  // WIDE 时 k 的间隔；second：第二段，另隔 high - low。
  __device__ __forceinline__ int64_t right_stride(bool second) const {
    return second ? high_rs : low_rs;
  }
};

// 结果怎样写出。
template <class E>
struct RowResults : RowShape {
  const BackwardParams &p;
  const dso_cuda_moe_experts_params &in;
  dso_cuda_moe_tile tile;
  BackwardStep step;

  __device__ __forceinline__ RowResults(const BackwardParams &params, const dso_cuda_moe_tile &at,
                                        BackwardStep s)
      : RowShape(params, s, at.expert), p(params), in(params.in), tile(at), step(s) {}

  // HIDDEN_GRAD 写出第 row 行第 c 列起的 8 个结果要用的 gate、up，各 8 个，还没有解开（重算的、成对存的相间）。
  struct Kept {
    Half16<8> low, high;
  };
  __device__ __forceinline__ Kept fetch(int row, int c) const {
    Kept kept = {};
    if (step != HIDDEN_GRAD || row >= tile.rows || c >= columns) return kept;
    const uint16_t *from;
    int up;
    if (in.saved) {
      SavedRow at = saved_row(in, tile.row + row);
      from = elements(in.saved) + at.at + c, up = at.up;
    } else {
      GradientRow at = gradient_row(p, tile.row + row);
      from = elements(p.gu) + at.at + c * at.step, up = paired ? 8 : at.up;
    }
    kept.low = *reinterpret_cast<const Half16<8> *>(from);
    if (in.w.gated) kept.high = *reinterpret_cast<const Half16<8> *>(from + up);
    return kept;
  }

  // 第 row 行的混合权重；只有 HIDDEN_GRAD 用。
  __device__ __forceinline__ float weight_of(int row) const {
    return step == HIDDEN_GRAD && row < tile.rows ? row_weight(in, tile.row + row) : 0.0f;
  }

  // 第 row 行第 c 列起的 8 个结果；返回其中的 <A, h>。
  __device__ __forceinline__ float finish(int row, int c, const Vec<8> &v, const Kept &kept,
                                          float weight) const {
    if (row >= tile.rows || c >= columns) return 0.0f;
    if (step == HIDDEN_GRAD) return store_hidden(tile.row + row, c, v, kept, weight);
    if (step == GATE_UP)
      store_gate_up(tile.row + row, c, v);
    else
      store<8>(in.o, E::dtype, (tile.row + row) * in.k + c, v);
    return 0.0f;
  }

  // 加偏置，写进 gu；8 列在同一边。
  __device__ __forceinline__ void store_gate_up(int64_t row, int c, Vec<8> v) const {
    bool up = !paired && c >= inner;
    int n = up ? c - inner : c;
    dso_expert expert = expert_at(in.w, in.routing.experts, tile.expert);
    int64_t bias_step = paired ? 1 : expert.bias_step;
    const void *bias = up ? expert.up_bias : expert.gate_bias;
#pragma unroll
    for (int j = 0; j < 8; j++) {
      float x = v.v[j];
      if (bias) x += load_one(bias, E::dtype, (n + j) * bias_step);
      v.v[j] = kept_value(in.act, paired ? j % 2 != 0 : up, E::dtype, x);
    }
    GradientRow to = gradient_row(p, row);
    store<8>(p.gu, E::dtype, to.at + (up ? to.up : 0) + n, v);
  }

  // 8 对梯度写进 gu；成对存的相间。
  __device__ __forceinline__ void store_grads(const GradientRow &to, int c, const Vec<8> &gate,
                                              const Vec<8> &up) const {
    if (paired) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        Vec<8> both;
#pragma unroll
        for (int j = 0; j < 4; j++)
          both.v[2 * j] = gate.v[4 * half + j], both.v[2 * j + 1] = up.v[4 * half + j];
        store<8>(p.gu, E::dtype, to.at + 2 * c + 8 * half, both);
      }
      return;
    }
    store<8>(p.gu, E::dtype, to.at + c, gate);
    if (in.w.gated) store<8>(p.gu, E::dtype, to.at + to.up + c, up);
  }

  // A 的 8 列：gu 换成梯度，写 w h。
  __device__ __forceinline__ float store_hidden(int64_t row, int c, const Vec<8> &a,
                                                const Kept &kept, float weight) const {
    auto value = [](unsigned short bits) {
      return E::dtype == DSO_BF16 ? bf16_bits(bits) : half_bits(bits);
    };
    bool mixed = paired && !in.saved;
    Vec<8> gate, up, h;
    float dot = 0.0f;
#pragma unroll
    for (int j = 0; j < 8; j++) {
      const Half16<8> &half = j < 4 ? kept.low : kept.high;
      float g = value(mixed ? half.v[2 * (j % 4)] : kept.low.v[j]),
            u = value(mixed ? half.v[2 * (j % 4) + 1] : kept.high.v[j]);
      Activated d = activate_backward<true>(in.act, in.w.gated, g, u, weight * a.v[j]);
      dot += a.v[j] * d.h;
      h.v[j] = weight * d.h, gate.v[j] = d.gate, up.v[j] = d.up;
    }
    store_grads(gradient_row(p, row), c, gate, up);
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
  bool transposed, paired, add;
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
    transposed = in.w.transposed && routed, paired = in.w.paired && routed, add = adds(p, e);
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
           n < right.columns && !(add && rows.rows == 0);
  }

  // 第 m 行第 n 列起的 8 个结果；它们在 gate 或 up 的同一边。
  __device__ __forceinline__ void finish(int m, int n, Vec<8> v) const {
    if (m >= left.columns || n >= right.columns) return;
    // 逐个字段按值选：取地址会把整个对象放进局部内存。
    const void *base = grad.down.data;
    int64_t rs = grad.down.rs;
    if (step == GATE_UP_WEIGHT) {
      bool up = in.w.gated && !paired && (transposed ? n : m) >= inner;
      if (up && transposed) n -= inner;
      if (up && !transposed) m -= inner;
      base = up ? grad.up.data : grad.gate.data, rs = up ? grad.up.rs : grad.gate.rs;
    }
    void *data = const_cast<void *>(base);
    int64_t at = m * rs + n;
    if (add) {
      Vec<8> old = load<8>(data, E::dtype, at);
#pragma unroll
      for (int j = 0; j < 8; j++) v.v[j] += old.v[j];
    }
    store<8>(data, E::dtype, at, v);
  }
};

}  // namespace dso
