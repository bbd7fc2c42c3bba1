// moe_experts 的反向：只用前向的输入与留下的 gate、up（没有留下时重算），h 重算；步骤见 moe_backward.cuh，做法见 SonicMoE（arXiv 2512.14080）。
//
// 各行的 dx 先写成一行一行的，再按词元相加，次序固定，没有原子操作；权重的梯度一次写成，k 是专家的全部行。
#include "config.cuh"
#include "moe_backward.cuh"

namespace {

using namespace dso;

// ---- 偏置的梯度（共享专家没有）：一块一个专家的 32 列，各 warp 隔着取行，再按 warp 的次序相加 ----

constexpr int BIAS_WARPS = 16;

__global__ __launch_bounds__(BIAS_WARPS *WARP, 2) void moe_bias_grads(BackwardParams p, bool down) {
  __shared__ float part[BIAS_WARPS][WARP];
  grid_wait();
  const dso_cuda_moe_experts_params &in = p.in;
  int lane = static_cast<int>(threadIdx.x) % WARP, warp = static_cast<int>(threadIdx.x) / WARP;
  int64_t e = blockIdx.x, inner = expert_at(in.w, in.routing.experts, e).inner;
  dso_expert to = expert_at(p.grad, in.routing.experts, e);
  int64_t column = static_cast<int64_t>(blockIdx.y) * WARP + lane;
  bool up = !down && column >= inner;
  int64_t n = up ? column - inner : column, columns = down ? in.n : in.w.gated ? 2 * inner : inner;
  const void *bias = down ? to.down_bias : up ? to.up_bias : to.gate_bias;
  ExpertRows rows = rows_of(in.routing, e);
  bool wanted = bias && column < columns;
  float sum = 0.0f;
  if (wanted && down) {
    for (int i = warp; i < rows.rows; i += BIAS_WARPS) {
      int64_t row = rows.begin + i;
      float dy = load_one(p.dy.data, p.dy.dtype, in.routing.token[row] * p.dy.rs + n);
      sum += in.weights[in.routing.slot[row]] * dy;
    }
  } else if (wanted) {
    GradientRow g = gradient_row(p, rows.begin);
    int64_t at = g.at + (up ? g.up : 0) + n * g.step;
    for (int i = warp; i < rows.rows; i += BIAS_WARPS)
      sum += load_one(p.gu, in.dtype, at + i * g.stride);
  }
  part[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || !wanted) return;
  sum = 0.0f;
  for (int w = 0; w < BIAS_WARPS; w++) sum += part[w][lane];
  store_one(const_cast<void *>(bias), to.bias_dtype, n * (down ? 1 : to.bias_step), sum);
}

cudaError_t bias_grads(const BackwardParams &p, bool down, cudaStream_t stream) {
  int64_t columns = down ? p.in.n : gate_up_columns(p.in);
  dim3 grid(static_cast<unsigned>(p.in.routing.experts),
            static_cast<unsigned>(ceil_div(columns, WARP)));
  // 单独给出的专家里，第一个的中间宽可以是 0（指针为空），别的仍有偏置。
  const void *one = down ? p.grad.first.down_bias : p.grad.first.gate_bias;
  if (grid.x == 0 || grid.y == 0 || (!one && !p.grad.list)) return cudaSuccess;
  return launch(moe_bias_grads, grid, dim3(BIAS_WARPS * WARP), 0, stream, p, down);
}

// ---- 混合权重的梯度：一个 warp 一个 slot（随后是共享专家的各词元） ----

constexpr int WEIGHT_WARPS = 8;

__global__ __launch_bounds__(WEIGHT_WARPS *WARP) void moe_mix_grads(BackwardParams p, int width) {
  grid_wait();
  const dso_cuda_moe_experts_params &in = p.in;
  const dso_cuda_moe_routing &r = in.routing;
  int lane = static_cast<int>(threadIdx.x) % WARP;
  int64_t slots = r.tokens * r.top_k;
  int64_t slot =
      static_cast<int64_t>(blockIdx.x) * WEIGHT_WARPS + static_cast<int>(threadIdx.x) / WARP;
  if (slot >= slots + (p.dscale ? r.tokens : 0)) return;
  int64_t row = slot < slots ? r.row[slot] : slot;
  float sum = 0.0f;
  if (row >= 0) {
    int64_t e = slot < slots ? r.index[slot] : r.experts,
            blocks = ceil_of(hidden_columns(in), width);
    dso_expert expert = expert_at(in.w, r.experts, e);
    for (int64_t j = lane; j < ceil_of(expert.inner, width); j += WARP)
      sum += p.partial[row * blocks + j];
    for (int64_t n = lane; expert.down_bias && n < in.n; n += WARP)
      sum += load_one(expert.down_bias, expert.bias_dtype, n) *
             load_one(p.dy.data, p.dy.dtype, r.token[row] * p.dy.rs + n);
    sum = warp_sum(sum);
  }
  if (lane == 0) (slot < slots ? p.dweights[slot] : p.dscale[slot - slots]) = sum;
}

cudaError_t mix_grads(const BackwardParams &p, int width, cudaStream_t stream) {
  int64_t slots = p.in.routing.tokens * p.in.routing.top_k;
  int64_t count = slots + (p.dscale ? p.in.routing.tokens : 0);
  dim3 grid(static_cast<unsigned>(ceil_div(count, WEIGHT_WARPS)));
  if (grid.x == 0) return cudaSuccess;
  return launch(moe_mix_grads, grid, dim3(WEIGHT_WARPS * WARP), 0, stream, p, width);
}

cudaError_t input_grads(const BackwardParams &p, cudaStream_t stream) {
  dso_cuda_moe_experts_params sum = p.in;
  sum.n = p.in.k, sum.weights = sum.w.shared_scale = nullptr;  // dg、du 里已有系数
  return moe_combine(sum, stream);
}

// 一条路径：按行的三步、权重的梯度、一块至多几行、dw 的部分和各管几列。
struct Path {
  decltype(&moe_backward_rows_mma) rows;
  decltype(&moe_backward_weights_mma) weights;
  int tile_rows, part_columns;
};

Path path_of(const dso_cuda_moe_experts_params &p) {
  if (p.dtype == DSO_F32)
    return {moe_backward_rows_general, moe_backward_weights_general, MOE_GENERAL_ROWS,
            MOE_GENERAL_ROWS};
  if (moe_backward_sm90_fits(p))
    return {moe_backward_rows_sm90, moe_backward_weights_sm90, MOE_ROWS, 64};
  return {moe_backward_rows_mma, moe_backward_weights_mma, MOE_ROWS, 64};
}

bool is_aligned(const dso_mat &m) {
  return reinterpret_cast<uintptr_t>(m.data) % 16 == 0 && (!m.data || m.rs % 8 == 0);
}

}  // namespace

int dso_cuda_moe_backward_fits(const dso_cuda_moe_experts_backward_params *p,
                               const dso_expert *grad, int64_t count) {
  if (p->dy.dtype != p->in.dtype || !is_aligned(p->dy)) return 0;
  for (int64_t i = 0; i < count; i++) {
    bool up_apart = p->in.w.gated && !p->in.w.paired;
    if (!is_aligned(grad[i].gate) || !is_aligned(grad[i].down) ||
        (up_apart && !is_aligned(grad[i].up)))
      return 0;
  }
  return 1;
}

int64_t dso_cuda_moe_backward_tile_rows(const dso_cuda_moe_experts_backward_params *p) {
  return path_of(p->in).tile_rows;
}

int64_t dso_cuda_moe_backward_blocks(const dso_cuda_moe_experts_backward_params *p) {
  return ceil_div(hidden_columns(p->in), path_of(p->in).part_columns);
}

cudaError_t dso_cuda_moe_experts_backward(const dso_cuda_moe_experts_backward_params *p,
                                          cudaStream_t stream) {
  Path path = path_of(p->in);
  cudaError_t error = p->in.saved ? cudaSuccess : path.rows(*p, GATE_UP, stream);
  if (error == cudaSuccess) error = path.rows(*p, HIDDEN_GRAD, stream);
  if (error == cudaSuccess) error = mix_grads(*p, path.part_columns, stream);
  if (error == cudaSuccess) error = path.weights(*p, DOWN_WEIGHT, stream);
  if (error == cudaSuccess) error = path.weights(*p, GATE_UP_WEIGHT, stream);
  if (error == cudaSuccess) error = bias_grads(*p, false, stream);
  if (error == cudaSuccess) error = bias_grads(*p, true, stream);
  if (error != cudaSuccess || !p->in.y) return error;
  error = path.rows(*p, INPUT_GRAD, stream);
  return error == cudaSuccess ? input_grads(*p, stream) : error;
}
