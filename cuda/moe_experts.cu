// moe_experts：选路径；各词元的加权和；专家表。
//
// 三步：h（收集在读入时，gate、up 一次算完，激活在写出时）、o、按词元求和。没有原子操作：一个词元的
// 各个 o 由一个线程按 j 的次序相加。
#include "config.cuh"
#include "moe_experts.cuh"

namespace {

using namespace dso;

constexpr int THREADS = 256;

// y[t] 的 V 列：Σ_j weights[t, j] o[行]，再加共享专家的。
template <int V>
__global__ __launch_bounds__(THREADS) void moe_combine_kernel(dso_cuda_moe_experts_params p) {
  grid_release();
  grid_wait();
  const dso_cuda_moe_routing &r = p.routing;
  int64_t chunks = p.n / V, flat = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (flat >= r.tokens * chunks) return;
  int64_t token = flat / chunks, column = flat % chunks * V;
  Vec<V> sum = {};
  auto add = [&](int64_t row, float weight) {
    Vec<V> o = load<V>(p.o, p.dtype, row * p.n + column);
#pragma unroll
    for (int i = 0; i < V; i++) sum.v[i] += weight * o.v[i];
  };
#pragma unroll 4
  for (int64_t slot = token * r.top_k; slot < (token + 1) * r.top_k; slot++)
    if (r.row[slot] >= 0) add(r.row[slot], p.weights ? p.weights[slot] : 1.0f);
  if (r.shared) add(r.tokens * r.top_k + token, p.w.shared_scale ? p.w.shared_scale[token] : 1.0f);
  store<V>(p.y, p.x.dtype, token * p.n + column, sum);
}

// 一行 k 个权重（或转置的）能按 16 字节读。量化的行不转置：int8、fp8 一行 k 字节，int4 一行是 16 的倍数。
bool rows_fit(const dso_mat &w, dso_dtype dtype, int64_t k) {
  if (reinterpret_cast<uintptr_t>(w.data) % 16 != 0) return false;
  if (w.dtype == DSO_I8 || w.dtype == DSO_F8) return w.rs % 16 == 0 && k % 16 == 0;
  if (w.dtype == DSO_I4) return w.rs % 16 == 0;
  return w.dtype == dtype && w.rs % 8 == 0;
}

// 一次带过去的专家数：核的参数 CUDA 12.1 起至多 32764 字节（torch 2.10 要的更新）。
constexpr int TABLE = 96;

struct Table {
  dso_expert expert[TABLE];
};

__global__ void moe_table_kernel(Table table, int count, dso_expert *to) {
  grid_release();
  grid_wait();
  int i = static_cast<int>(threadIdx.x);
  if (i < count) to[i] = table.expert[i];
}

}  // namespace

cudaError_t dso::moe_combine(const dso_cuda_moe_experts_params &p, cudaStream_t stream) {
  bool wide = wide_ok(p.o, p.dtype, p.n) && wide_ok(p.y, p.x.dtype, p.n);
  int64_t count = p.routing.tokens * p.n / (wide ? 8 : 1);
  dim3 grid(static_cast<unsigned>(ceil_div(count, THREADS)));
  if (grid.x == 0) return cudaSuccess;
  if (wide) return launch(moe_combine_kernel<8>, grid, dim3(THREADS), 0, stream, p);
  return launch(moe_combine_kernel<1>, grid, dim3(THREADS), 0, stream, p);
}

int dso_cuda_moe_fits(const dso_cuda_moe_experts_params *p, const dso_expert *expert, int64_t count,
                      dso_dtype dtype) {
  if (dtype == DSO_F32 || p->x.dtype != dtype || p->k % 8 != 0 || p->n % 8 != 0) return 0;
  if (!wide_ok(p->x.data, dtype, p->x.rs)) return 0;
  for (int64_t i = 0; i < count; i++) {
    const dso_expert &e = expert[i];
    bool up_apart = p->w.gated && !p->w.paired;
    if (e.inner % 8 != 0 || !rows_fit(e.gate, dtype, p->k) || !rows_fit(e.down, dtype, e.inner) ||
        (up_apart && !rows_fit(e.up, dtype, p->k)))
      return 0;
  }
  return 1;
}

namespace {

enum Path { GENERAL, DIRECT, SMALL, MMA, SM90 };

// 至多几个专家有词元。
int64_t used_experts(const dso_cuda_moe_routing &r) {
  int64_t slots = r.tokens * r.top_k;
  return slots < r.experts ? slots : r.experts;
}

// 多数块不满 8 行：用省寄存器的一份，在途的读更多。多于 8 行的专家分几块，后读的权重在 L2 里。
bool narrow(const dso_cuda_moe_routing &r) {
  return r.tokens <= 8 ||
         (r.tokens <= MOE_SMALL_TOKENS && r.tokens * r.top_k <= used_experts(r) * MOE_SMALL_NARROW);
}

Path path_of(const dso_cuda_moe_experts_params &p) {
  if (p.dtype == DSO_F32) return GENERAL;
  if (p.w.transposed) return MMA;
  if (hidden_columns(p) == 0) return MMA;  // 没有 h 的一步，算 o 的就不能提前读（moe_small.cu）
  int64_t slots = p.routing.tokens * p.routing.top_k, used = used_experts(p.routing);
  if (!p.saved && moe_direct_fits(p)) return DIRECT;
  bool few = p.routing.tokens <= MOE_SMALL_TOKENS ||
             (slots > 0 && slots <= used * MOE_SMALL_AVERAGE);  // 只有共享专家时看词元数
  if (few && !p.saved) return SMALL;
  // 词元少的界在 Hopper 上不变：一块不满 64 行时只有一组算，每周期要 64 字节权重，已是显存带宽的三倍，空行不花时间。
  Device device;
  bool hopper = device_of(&device) == cudaSuccess && moe_sm90_fits(p, device);
  return hopper ? SM90 : MMA;
}

}  // namespace

int64_t dso_cuda_moe_tile_rows(const dso_cuda_moe_experts_params *p) {
  switch (path_of(*p)) {
    case GENERAL:
      return MOE_GENERAL_ROWS;
    case DIRECT:
      return 0;
    case SMALL:
      return narrow(p->routing) ? 8 : MOE_SMALL_ROWS;
    default:
      return MOE_ROWS;
  }
}

cudaError_t dso_cuda_moe_experts(const dso_cuda_moe_experts_params *p, cudaStream_t stream) {
  if (p->routing.tokens == 0 || p->n == 0) return cudaSuccess;
  Path path = path_of(*p);
  decltype(&moe_mma) products[] = {moe_general, moe_small, moe_small, moe_mma, moe_sm90};
  auto product = products[path];
  cudaError_t error = product(*p, true, stream);
  if (error == cudaSuccess) error = product(*p, false, stream);
  return error == cudaSuccess && path != DIRECT ? moe_combine(*p, stream) : error;
}

cudaError_t dso_cuda_moe_table(const dso_expert *from, int64_t count, dso_expert *to,
                               cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  for (int64_t first = 0; first < count && error == cudaSuccess; first += TABLE) {
    Table table = {};
    int many = static_cast<int>(count - first < TABLE ? count - first : TABLE);
    for (int i = 0; i < many; i++) table.expert[i] = from[first + i];
    error = launch(moe_table_kernel, dim3(1), dim3(TABLE), 0, stream, table, many, to + first);
  }
  return error;
}
