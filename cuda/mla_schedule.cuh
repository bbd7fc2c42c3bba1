// 解码的工作划分。工作的单位是（span，一组查询，一块键）；全部单位排成一列，平分给固定个数的 CTA，
// 所以各行长短不一也是均衡的，而且不必在主机上知道长度（spans 在设备上，可以放进 CUDA graph）。
//
// 一个 CTA 分到连续的一段：其中完整的（span，组）直接写出结果；只占一部分的写部分结果，由合并核收尾。
// 一段至多有两个不完整：开头的用部分结果槽 2c，结尾的用 2c + 1。划分只取决于形状与 CTA 数，结果逐位确定。
#pragma once

#include "mla_common.cuh"

namespace dso {

struct Schedule {
  int rows, keys;           // 一组查询、一块键的大小
  int ctas, minimum_units;  // CTA 数、每个 CTA 至少几个单位
};

struct Load {  // 一个 span 的工作量
  int groups, blocks;
  __device__ int64_t units() const { return static_cast<int64_t>(groups) * blocks; }
};

__device__ inline Load load_of(const dso_mla_inputs &in, const Schedule &s, int64_t index) {
  Place at = locate(in, index);
  return {static_cast<int>((at.q_len * in.heads + s.rows - 1) / s.rows),
          (at.kv_len + s.keys - 1) / s.keys};
}

// 每个 CTA 几个单位；整个 warp 一起调用。
__device__ inline int64_t units_per_cta(const dso_mla_inputs &in, const Schedule &s) {
  int64_t total = 0;
  for (int64_t i = threadIdx.x % WARP; i < in.n_spans; i += WARP)
    total += load_of(in, s, i).units();
#pragma unroll
  for (int step = WARP / 2; step > 0; step /= 2) total += __shfl_xor_sync(ALL_LANES, total, step);
  int64_t each = (total + s.ctas - 1) / s.ctas;
  return each > s.minimum_units ? each : s.minimum_units;
}

// 满足 wanted(i, 之前的单位数, 它的单位数) 的第一个 span；整个 warp 一起调用。
template <class Wanted>
__device__ Found find_span(const dso_mla_inputs &in, const Schedule &s, Wanted wanted) {
  return find_span_by(in, [&](int64_t i) { return load_of(in, s, i).units(); }, wanted);
}

// 一个 CTA 连续处理的一段：一组查询看 [key_begin, key_end)（span 内）。
struct Piece {
  Place at;
  int group, key_begin, key_end;
  int units;
  bool whole;  // 这组查询的全部键：直接写结果
  int slot;    // 部分结果槽
};

// 从单位 unit 开始的一段，至多到 end；[first, end) 是本 CTA（编号 cta）的全部。整个 warp 一起调用。
__device__ inline bool next_piece(const dso_mla_inputs &in, const Schedule &s, int cta,
                                  int64_t unit, int64_t end, Piece *piece) {
  Found found =
      find_span(in, s, [&](int64_t, int64_t before, int64_t own) { return unit < before + own; });
  if (found.index >= in.n_spans) return false;
  Load load = load_of(in, s, found.index);
  int64_t inside = unit - found.before;
  int block = static_cast<int>(inside % load.blocks), left = load.blocks - block;
  int last = left < end - unit ? load.blocks : block + static_cast<int>(end - unit);
  piece->at = locate(in, found.index);
  piece->group = static_cast<int>(inside / load.blocks);
  piece->key_begin = block * s.keys;
  piece->key_end = last == load.blocks ? piece->at.kv_len : last * s.keys;
  piece->units = last - block;
  piece->whole = block == 0 && last == load.blocks;
  piece->slot = 2 * cta + (block == 0 ? 1 : 0);  // 从中间接着的是开头的一段
  return true;
}

}  // namespace dso
