// mla_decode、mla_prefill 与其反向共用：span 的定位、缓存槽位的地址。约定同 csrc/mla_common.h；
// 参数里的指针（含 spans）都在设备上。
#pragma once

#include "vec.cuh"

namespace dso {

constexpr float LOG2_E = 1.4426950408889634f;

// 得分以 2 为底：exp2(x * score_scale - m)。
__device__ inline float score_scale(const dso_mla_inputs &in) { return in.softmax_scale * LOG2_E; }

// 在线 softmax 的基准不必是最大值：大出 2 的这么多次方才换，绝大多数块就不必缩放旧的结果。概率至多 256，结果只差舍入。
constexpr float SOFTMAX_SLACK = 8.0f;

// 一行的基准换成 next（这一块的最大值）：换了返回真，keep 是旧结果的缩放。
__device__ inline bool rebase(float next, float *base, float *keep) {
  *keep = 1.0f;
  if (!(next > *base + SOFTMAX_SLACK)) return false;
  *keep = fast_exp2(*base - next), *base = next;
  return true;
}

// 归一化：除以指数之和；什么都没看见的是 0。
__device__ inline float inverse_of(float sum) { return sum == 0.0f ? 0.0f : 1.0f / sum; }

// span 的键所在的行与槽位。词元数、槽位数都小于 2^31（绑定检查），只有乘上步长之后才需要 int64。
struct Place {
  int q_begin, q_len, row, slot, kv_len;
};

__device__ inline dso_span span_at(const dso_mla_inputs &in, int64_t index) {
  const dso_span *span = in.spans + index;
  return {load_l2(&span->q_begin), load_l2(&span->q_end), load_l2(&span->kv_begin),
          load_l2(&span->kv_end)};
}

__device__ inline Place locate(const dso_mla_inputs &in, int64_t index) {
  dso_span span = span_at(in, index);
  int64_t slots = in.s > 0 ? in.s : 1, row = span.kv_begin / slots;
  auto narrow = [](int64_t x) { return static_cast<int>(x); };
  return {narrow(span.q_begin), narrow(span.q_end - span.q_begin), narrow(row),
          narrow(span.kv_begin - row * slots), narrow(span.kv_end - span.kv_begin)};
}

// 查询 i（span 内）可见的键数：causal 时右下对齐。
__device__ inline int visible_keys(const dso_mla_inputs &in, const Place &at, int i) {
  return in.causal ? at.kv_len - at.q_len + i + 1 : at.kv_len;
}

// 第 row 行的槽位 slot 是否没有被 kv_mask 遮住。
__device__ inline bool slot_seen(const dso_mla_inputs &in, int row, int slot) {
  return !in.kv_mask || in.kv_mask[row * in.kv_mask_bs + slot];
}

__device__ inline bool slot_seen(const dso_mla_inputs &in, const Place &at, int slot) {
  return slot_seen(in, at.row, slot);
}

// 第 row 行槽位 slot 的起点（元素）；bs、ts 是这个张量的步长。
__device__ inline int64_t slot_at(const dso_mla_inputs &in, int row, int slot, int64_t bs,
                                  int64_t ts) {
  if (!in.pages) return row * bs + slot * ts;
  int size = static_cast<int>(in.page_size);
  int64_t page = in.pages[row * in.pages_bs + slot / size];
  return page * bs + slot % size * ts;
}

struct Found {
  int64_t index, before;  // 哪个 span（没有为 n_spans）；它之前共有多少单位
};

// 各 span 有 units(i) 个单位，排成一列：满足 wanted(i, 之前的单位数, 它的单位数) 的第一个 span。
// 整个 warp 一起调用。
template <class Units, class Wanted>
__device__ Found find_span_by(const dso_mla_inputs &in, Units units, Wanted wanted) {
  int lane = static_cast<int>(threadIdx.x) % WARP;
  int64_t before = 0;
  for (int64_t base = 0; base < in.n_spans; base += WARP) {
    int64_t own = base + lane < in.n_spans ? units(base + lane) : 0, upto = own;
#pragma unroll
    for (int step = 1; step < WARP; step *= 2) {
      int64_t left = __shfl_up_sync(ALL_LANES, upto, step);
      if (lane >= step) upto += left;
    }
    bool mine = base + lane < in.n_spans && wanted(base + lane, before + upto - own, own);
    unsigned hits = __ballot_sync(ALL_LANES, mine);
    if (hits) {
      int first = __ffs(static_cast<int>(hits)) - 1;
      return {base + first, before + __shfl_sync(ALL_LANES, upto - own, first)};
    }
    before += __shfl_sync(ALL_LANES, upto, WARP - 1);
  }
  return {in.n_spans, before};
}

// 第 token 个查询（展平）有没有键可看；整个 warp 一起调用，结果一致。
__device__ inline bool token_seen(const dso_mla_inputs &in, int64_t token) {
  bool seen = false;
  for (int64_t i = threadIdx.x % WARP; i < in.n_spans; i += WARP) {
    dso_span span = in.spans[i];
    seen |= span.q_begin <= token && token < span.q_end && span.kv_begin < span.kv_end;
  }
  return __any_sync(ALL_LANES, seen) != 0;
}

// 没有键可看的第 token 个查询：它在 rows 里的 width 个结果写 0。整个 warp 一起调用；返回写了没有。
__device__ inline bool clear_unseen(const dso_mla_inputs &in, int64_t token, void *rows,
                                    dso_dtype dtype, int64_t width) {
  if (token >= in.b * in.t || token_seen(in, token)) return false;
  for (int64_t i = threadIdx.x % WARP; i < width; i += WARP)
    store_one(rows, dtype, token * width + i, 0.0f);
  return true;
}

__device__ inline const char *element(const void *base, dso_dtype dtype, int64_t i) {
  return static_cast<const char *>(base) + i * bytes_of(dtype);
}

// 查询 token（展平）的头 head：[dn + dr]。
__device__ inline int64_t query_at(const dso_mla_inputs &in, int64_t token, int64_t head) {
  return token / in.t * in.q_bs + token % in.t * in.q_ts + head * in.q_hs;
}

}  // namespace dso
