// mla_decode：选路径、划分。吸收与输出的 W_UV 是普通的矩阵乘，词元不多时另有核，其余由绑定交给 cuBLAS；中间一步算法同
// csrc/mla_decode.c 的阶段 1、2，几条路径（mla_decode_{mma,sm90,general}.cu）各算各的一段键，最后合并
// （mla_decode_combine.cu）。
#include <cstddef>

#include "config.cuh"
#include "mla_decode.cuh"

namespace {

using namespace dso;

bool chunks_ok(const void *data, dso_dtype dtype, int64_t bs, int64_t ts) {
  int64_t each = 16 / bytes_of(dtype);
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && bs % each == 0 && ts % each == 0;
}

// 能不能走 mma：16 位的同一种类型，各行都能按 16 字节拷贝。
bool mma_ok(const dso_cuda_mla_decode_params *p) {
  const dso_mla_inputs &in = p->in;
  if (p->dtype == DSO_F32 || in.q_dtype != p->dtype || in.rope_dtype != p->dtype) return false;
  if (in.latent_dtype != p->dtype && !quantized(in.latent_dtype)) return false;
  int64_t each = 16 / bytes_of(in.latent_dtype);
  return in.rank <= 512 && in.rank % each == 0 && in.rope_dim % 8 == 0 && in.nope_dim % 8 == 0 &&
         chunks_ok(in.latent, in.latent_dtype, in.latent_bs, in.latent_ts) &&
         (in.rope_dim == 0 || chunks_ok(in.rope, in.rope_dtype, in.rope_bs, in.rope_ts)) &&
         chunks_ok(in.q, in.q_dtype, in.q_bs, in.q_ts) && in.q_hs % 8 == 0 &&
         reinterpret_cast<uintptr_t>(p->q_abs) % 16 == 0;
}

constexpr int log_of(int power) { return power == 1 ? 0 : 1 + log_of(power / 2); }

struct Plan {
  DecodeArgs args;
  cudaError_t (*run)(const DecodeArgs &args, int *bytes, cudaStream_t stream);  // 走的路径
  int cluster;  // 几个 SM 合起来算 Schedule 的一个 CTA
  size_t scratch;
};

int shared_bytes(const Plan &plan) {
  int bytes = 0;
  plan.run(plan.args, &bytes, nullptr);
  return bytes;
}

// 分页时一次 TMA 读一页里的几个槽位（2 的幂的对数）：除得尽页的大小，至多一块键。
int log_box_of(const dso_mla_inputs &in) {
  int log_box = 0;
  while (1 << log_box < DECODE_KEYS_SM90 && in.page_size % (2 << log_box) == 0) log_box++;
  return log_box;
}

// TMA 一次拷贝几个连续的槽位（分页时至少 8 个：128 字节交错的一轮）、潜变量整 64 列；各维的步长是正数。
bool tma_ok(const dso_cuda_mla_decode_params *p, const Device &device) {
  const dso_mla_inputs &in = p->in;
  const int64_t rows = in.pages ? in.page_count : in.b, slots = in.pages ? in.page_size : in.s;
  auto strides_ok = [&](int64_t bs, int64_t ts) {
    return (bs > 0 || rows == 1) && (ts > 0 || slots == 1);
  };
  return device.major == 9 && device.shared_limit >= SHARED_SM90 && in.latent_dtype == p->dtype &&
         (!in.pages || log_box_of(in) >= 3) && in.s > 0 && rows > 0 && in.rank % 64 == 0 &&
         in.rope_dim <= 64 && strides_ok(in.latent_bs, in.latent_ts) &&
         (in.rope_dim == 0 || strides_ok(in.rope_bs, in.rope_ts));
}

// 64 行一组、最长的 span 有 groups 组时，要不要两组交给一个 cluster：组数是偶数，那个 span 不会多算一组；短的 span
// 平均也多于一组，多算的有限。
bool cluster_ok(const dso_mla_inputs &in, const Device &device, int64_t groups) {
  return device.sms >= DECODE_CLUSTER_SM90 && in.rank > DECODE_CLUSTER_RANK &&
         groups % DECODE_CLUSTER_SM90 == 0 &&
         in.b * in.t * in.heads > DECODE_MOST_ROWS * in.n_spans;
}

// 行数：能一组就一组；几组时分得匀一些，再取够用的最小一档，共享内存放不下就降一档。
void choose_tile(const dso_cuda_mla_decode_params *p, const Device &device, Plan *plan) {
  Schedule &s = plan->args.schedule;
  int64_t most = p->most_rows < 1 ? 1 : p->most_rows;
  int64_t groups = ceil_div(most, DECODE_MOST_ROWS), wanted = ceil_div(most, groups);
  if (plan->run == run_decode_general) {
    s.log_rows = log_of(GENERAL_ROWS), s.log_keys = log_of(GENERAL_KEYS);
    while (s.log_keys > 0 && shared_bytes(*plan) > device.shared_limit) s.log_keys--;
    return;
  }
  if (plan->run == run_decode_sm90) {
    s.log_keys = log_of(DECODE_KEYS_SM90);
    if (p->in.pages) s.log_box = log_box_of(p->in);
    for (int rows : DECODE_ROWS_SM90)
      if (s.log_rows == 0 || s.rows() < wanted) s.log_rows = log_of(rows);
    if (cluster_ok(p->in, device, groups))
      plan->cluster = DECODE_CLUSTER_SM90, s.log_rows += log_of(plan->cluster);
    return;
  }
  s.log_keys = log_of(DECODE_KEYS);
  for (int rows : DECODE_ROWS) {
    int old = s.log_rows;
    s.log_rows = log_of(rows);
    if (old && shared_bytes(*plan) > device.shared_limit) {
      s.log_rows = old;
      return;
    }
    if (rows >= wanted) return;
  }
}

cudaError_t make_plan(const dso_cuda_mla_decode_params *p, Plan *plan) {
  Device device;
  cudaError_t error = device_of(&device);
  if (error != cudaSuccess) return error;
  *plan = {};
  plan->cluster = 1;
  plan->args.in = p->in, plan->args.q_abs = p->q_abs, plan->args.o = p->o;
  plan->args.dtype = p->dtype, plan->args.settled = p->settled != 0;
  plan->run = !mma_ok(p)          ? run_decode_general
              : tma_ok(p, device) ? run_decode_sm90
                                  : run_decode_mma;
  choose_tile(p, device, plan);
  int bytes = shared_bytes(*plan);
  if (bytes > device.shared_limit) return cudaErrorInvalidValue;
  Schedule &s = plan->args.schedule;
  s.minimum_units = plan->run == run_decode_sm90 ? DECODE_MIN_UNITS_SM90 : DECODE_MIN_UNITS;
  // 单位数的上界只用主机知道的形状；实际的在核里数。
  int64_t groups = ceil_div(p->in.b * p->in.t * p->in.heads, s.rows()) + p->in.n_spans;
  int64_t units = groups * ceil_div(p->in.s, s.keys());
  int resident = (device.shared_limit + 1024) / (bytes + 1024);
  int64_t most = ceil_div(units, s.minimum_units);
  s.ctas = device.sms / plan->cluster * (resident < 1 ? 1 : resident);
  if (s.ctas > most) s.ctas = most < 1 ? 1 : static_cast<int>(most);
  auto more_tracks = [&] {
    int twice = 2 * s.tracks();
    return twice <= DECODE_TRACKS && twice * s.rows() <= p->most_rows + s.rows() - 1 &&
           twice <= s.ctas;
  };
  while (more_tracks()) s.log_tracks++;
  s.ctas -= s.ctas % s.tracks();
  plan->scratch = static_cast<size_t>(2 * s.ctas * s.rows()) * static_cast<size_t>(p->in.rank + 2) *
                      sizeof(float) +
                  static_cast<size_t>(s.ctas) * sizeof(Split);
  return cudaSuccess;
}

}  // namespace

cudaError_t dso_cuda_mla_decode_scratch(const dso_cuda_mla_decode_params *p, size_t *bytes) {
  Plan plan;
  cudaError_t error = make_plan(p, &plan);
  *bytes = plan.scratch;
  return error;
}

cudaError_t dso_cuda_mla_decode(const dso_cuda_mla_decode_params *p, void *scratch,
                                cudaStream_t stream) {
  if (p->in.b * p->in.t * p->in.heads == 0) return cudaSuccess;
  Plan plan;
  cudaError_t error = make_plan(p, &plan);
  if (error != cudaSuccess) return error;
  DecodeArgs &args = plan.args;
  const Schedule &s = args.schedule;
  args.part = static_cast<float *>(scratch);
  args.part_m = args.part + 2 * s.ctas * s.rows() * args.in.rank;
  args.part_l = args.part_m + 2 * s.ctas * s.rows();
  args.splits = reinterpret_cast<Split *>(args.part_l + 2 * s.ctas * s.rows());
  if (args.in.n_spans > 0) error = plan.run(args, nullptr, stream);
  if (error != cudaSuccess) return error;
  return run_decode_combine(args, *p, stream);
}
