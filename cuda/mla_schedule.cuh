// 解码的工作划分。工作的单位是（span，一组查询，一块键）；全部单位排成一列，平分给固定个数的 CTA，
// 所以各行长短不一也是均衡的，而且不必在主机上知道长度（spans 在设备上，可以放进 CUDA graph）。
//
// CTA 分成几路（tracks，2 的幂），一路一列单位：span i 的第 g 组查询归第 (g + i) % tracks 路。各路看的键大致相同，
// 相邻的 CTA 在不同的路上、同时读同一段键，于是几组查询只从显存读一遍。
//
// 一个 CTA 分到连续的一段：其中完整的（span，组）直接写出结果；只占一部分的写部分结果，由合并核收尾。
// 一段至多有两个不完整：开头的用部分结果槽 2c，结尾的用 2c + 1。划分只取决于形状与 CTA 数，结果逐位确定。
// 各 span 的长度一个 CTA 至多扫两遍（求总数；不都一样时找起点），之后逐个往后走。各 span 一样长时，一段尽量与一组查询的边界对齐。
#pragma once

#include "config.cuh"
#include "mla_common.cuh"

namespace dso {

// 一组查询、一块键的大小、路数都是 2 的幂：找一段在每个核的开头，除法换成移位就短得多。
struct Schedule {
  int log_rows, log_keys;
  int ctas, minimum_units;  // CTA 数（tracks 的倍数）、每个 CTA 至少几个单位
  int log_tracks;           // CTA c 在第 c % tracks 路上，是其中的第 c / tracks 个
  int log_box;              // 一块键从 2^log_box 的倍数的槽位起；0 为从 span 的起点起
  __host__ __device__ int rows() const { return 1 << log_rows; }
  __host__ __device__ int keys() const { return 1 << log_keys; }
  __host__ __device__ int tracks() const { return 1 << log_tracks; }
};

struct Load {  // 一个 span 在一路上的工作量：从第 first 组起，每隔 tracks 组
  int first, groups, blocks;
  __device__ int64_t units() const { return static_cast<int64_t>(groups) * blocks; }
};

// 从 begin 起的一个 span，第一块里它之前有几个键。begin 可以是展平的：一行的槽位数也是 2^log_box 的倍数。
__device__ inline int skipped(const Schedule &s, int64_t begin) {
  return static_cast<int>(begin) & ((1 << s.log_box) - 1);
}

__device__ inline Load load_of(const dso_mla_inputs &in, const Schedule &s, int track,
                               int64_t index) {
  dso_span span = span_at(in, index);
  int rows = static_cast<int>(span.q_end - span.q_begin) * static_cast<int>(in.heads);
  int keys = static_cast<int>(span.kv_end - span.kv_begin);
  if (keys > 0) keys += skipped(s, span.kv_begin);
  int groups = (rows + s.rows() - 1) >> s.log_rows;
  int first = (track - static_cast<int>(index)) & (s.tracks() - 1);
  return {first, (groups - first + s.tracks() - 1) >> s.log_tracks,
          (keys + s.keys() - 1) >> s.log_keys};
}

// 一个 CTA 走到哪里：还没有做的单位 [begin, end)，begin 在第 index 个 span 里或之后，它之前有 before 个单位。
struct Walk {
  int64_t begin, end, before;
  int index, each;  // each：这一路上每个 CTA 的单位数
};

// 各 span 都是 blocks 块时，一组查询的边界每 blocks 个单位一个：每个 CTA 多做得不多（config.cuh）就能与边界对齐（整数组，
// 或一组正好分成几段）的，给那么多，否则还是 each。
__device__ inline int aligned_share(int each, int blocks) {
  int share = each;
  if (each > blocks) {
    share = (each + blocks - 1) / blocks * blocks;
  } else {
    int pieces = blocks / each, piece = (blocks + pieces - 1) / pieces;
    if (blocks % piece == 0) share = piece;
  }
  int extra = share - each;
  return extra <= each / DECODE_ALIGN_SHARE && extra <= DECODE_ALIGN_UNITS ? share : each;
}

// 各 span 的单位数合起来看。
struct Totals {
  int64_t units;
  int blocks;       // 有单位的 span 的块数（不都一样时是其中一个）；都没有单位时为 0
  bool one_length;  // 有单位的 span 块数都相同
  bool one_size;    // 全部 span 的单位数都相同
};

// 整个 warp 一起调用；一次看 ROUND 批，各批的读一起发出。
__device__ inline Totals count_units(const dso_mla_inputs &in, const Schedule &s, int track) {
  constexpr int ROUND = 2;
  int64_t total = 0, first = 0;
  int blocks = 0;
  bool mixed = false, uneven = false;
#pragma unroll 1
  for (int64_t base = threadIdx.x % WARP; base < in.n_spans; base += ROUND * WARP) {
    Load loads[ROUND];
#pragma unroll
    for (int j = 0; j < ROUND; j++) {
      const int64_t i = base + j * WARP;
      loads[j] = i < in.n_spans ? load_of(in, s, track, i) : Load{0, 0, 0};
    }
    if (base < WARP) first = loads[0].units();
#pragma unroll
    for (int j = 0; j < ROUND; j++) {
      const int64_t units = loads[j].units();
      uneven |= base + j * WARP < in.n_spans && units != first;
      if (units == 0) continue;
      total += units;
      mixed |= blocks != 0 && blocks != loads[j].blocks;
      blocks = loads[j].blocks;
    }
  }
#pragma unroll
  for (int step = WARP / 2; step > 0; step /= 2) total += __shfl_xor_sync(ALL_LANES, total, step);
  const int64_t wanted = __shfl_sync(ALL_LANES, first, 0);
  uneven |= static_cast<int64_t>(threadIdx.x % WARP) < in.n_spans && first != wanted;
  unsigned busy = __ballot_sync(ALL_LANES, blocks != 0);
  const int common = __shfl_sync(ALL_LANES, blocks, busy ? __ffs(static_cast<int>(busy)) - 1 : 0);
  mixed |= blocks != 0 && blocks != common;
  return {total, common, __any_sync(ALL_LANES, mixed) == 0, __any_sync(ALL_LANES, uneven) == 0};
}

// 整个 warp 一起调用。
__device__ inline Walk start_walk(const dso_mla_inputs &in, const Schedule &s, int cta) {
  const int track = cta & (s.tracks() - 1), ctas = s.ctas >> s.log_tracks;
  const Totals all = count_units(in, s, track);
  int each = static_cast<int>((all.units + ctas - 1) / ctas);
  if (each < s.minimum_units) each = s.minimum_units;
  if (all.one_length && all.blocks != 0) each = aligned_share(each, all.blocks);
  int64_t begin = static_cast<int64_t>(cta >> s.log_tracks) * each;
  int64_t end = begin + each < all.units ? begin + each : all.units;
  Walk walk{begin, end, all.units, static_cast<int>(in.n_spans), each};
  if (begin >= end) return walk;
  if (all.one_size) {  // 不必逐个找
    const int64_t size = all.units / in.n_spans;
    walk.index = static_cast<int>(begin / size), walk.before = walk.index * size;
    return walk;
  }
  Found found = find_span_by(
      in, [&](int64_t i) { return load_of(in, s, track, i).units(); },
      [&](int64_t, int64_t before, int64_t own) { return begin < before + own; });
  walk.index = static_cast<int>(found.index), walk.before = found.before;
  return walk;
}

// 一个 CTA 连续处理的一段：一组查询看 [key_begin, key_end)（span 内）。at 的起点移到了 2^log_box 的倍数处，前 skip 个键不看。
struct Piece {
  Place at;
  int group, key_begin, key_end, skip;
  int units;
  bool whole;  // 这组查询的全部键：直接写结果
  int slot;    // 部分结果槽
  int last;    // 是一组的第一段而不是全部时：最后一段在哪个 CTA
};

// 下一段；没有了返回假。
__device__ inline bool next_piece(const dso_mla_inputs &in, const Schedule &s, int cta, Walk *walk,
                                  Piece *piece) {
  if (walk->begin >= walk->end) return false;
  int track = cta & (s.tracks() - 1);
  Load load = load_of(in, s, track, walk->index);
  while (walk->begin >= walk->before + load.units()) {
    walk->before += load.units();
    load = load_of(in, s, track, ++walk->index);
  }
  int64_t inside = walk->begin - walk->before, room = walk->end - walk->begin;
  int nth = static_cast<int>(inside / load.blocks);
  int block = static_cast<int>(inside - static_cast<int64_t>(nth) * load.blocks);
  int last = load.blocks - block < room ? load.blocks : block + static_cast<int>(room);
  piece->at = locate(in, walk->index);
  piece->skip = skipped(s, piece->at.slot);
  piece->at.slot -= piece->skip, piece->at.kv_len += piece->skip;
  piece->group = load.first + (nth << s.log_tracks);
  piece->key_begin = block << s.log_keys;
  piece->key_end = last == load.blocks ? piece->at.kv_len : last << s.log_keys;
  piece->units = last - block;
  piece->whole = block == 0 && last == load.blocks;
  piece->slot = 2 * cta + (block == 0 ? 1 : 0);  // 从中间接着的是开头的一段
  piece->last = cta;
  if (block == 0 && !piece->whole)
    piece->last =
        (static_cast<int>((walk->begin + load.blocks - 1) / walk->each) << s.log_tracks) + track;
  walk->begin += piece->units;
  return true;
}

}  // namespace dso
