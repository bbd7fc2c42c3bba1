/* mla_decode、mla_prefill 与其反向共用：span 的定位、潜变量块的读取、计算格式。 */
#ifndef DSO_MLA_COMMON_H
#define DSO_MLA_COMMON_H

#include <math.h>
#include <string.h>

#include "arena.h"
#include "gemm.h"

/* span 的键所在的行与槽位。 */
typedef struct {
  int64_t row, slot, kv_len, q_len;
} dso_mla_place;

static inline dso_mla_place dso_mla_locate(const dso_mla_inputs *in, const dso_span *span) {
  int64_t slots = dso_max(1, in->s); /* 没有槽位时键范围只能是空的 */
  return (dso_mla_place){span->kv_begin / slots, span->kv_begin % slots,
                         span->kv_end - span->kv_begin, span->q_end - span->q_begin};
}

/* 查询 i（span 内）可见的键数：causal 时右下对齐。 */
static inline int64_t dso_mla_visible(const dso_mla_inputs *in, const dso_mla_place *at,
                                      int64_t i) {
  return in->causal ? at->kv_len - at->q_len + i + 1 : at->kv_len;
}

/* 量化的潜变量还原后按 bf16 参与计算：它自身的误差已大于 bf16 的舍入。 */
static inline dso_dtype dso_mla_format(const dso_isa *isa, const dso_mla_inputs *in) {
  int latent = in->latent_dtype == DSO_BF16 || dso_quantized_latent(in->latent_dtype);
  return dso_compute_format(isa, latent && in->q_dtype == DSO_BF16 && in->rope_dtype == DSO_BF16 &&
                                     in->kv_b.dtype == DSO_BF16);
}

static inline int64_t dso_mla_pad(dso_dtype fmt, int64_t n) {
  return fmt == DSO_BF16 ? dso_round_up(n, 2) : n;
}

/* n 行宽 width 的数据转成计算格式、行距 ld（>= width，多出的一个元素补 0）。 */
static inline void dso_mla_copy(const dso_isa *isa, void *dst, dso_dtype fmt, int64_t ld,
                                const void *src, dso_dtype dtype, int64_t rs, int64_t n,
                                int64_t width, float *row) {
  for (int64_t i = 0; i < n; i++) {
    const void *from = dso_at(src, dtype, i * rs);
    void *to = dso_at_mut(dst, fmt, i * ld);
    if (dtype == fmt) {
      memcpy(to, from, (size_t)(width * dso_size_of(fmt)));
    } else if (dtype == DSO_F32) {
      isa->from_f32(to, fmt, from, width);
    } else {
      isa->to_f32(row, from, dtype, width);
      isa->from_f32(to, fmt, row, width);
    }
    if (ld > width)
      memset(dso_at_mut(to, fmt, width), 0, (size_t)((ld - width) * dso_size_of(fmt)));
  }
}

/* 第 row 行槽位 slot 的起点（元素）；bs、ts 是这个张量的步长。 */
static inline int64_t dso_mla_slot_at(const dso_mla_inputs *in, int64_t row, int64_t slot,
                                      int64_t bs, int64_t ts) {
  if (!in->pages) return row * bs + slot * ts;
  int64_t page = in->pages[row * in->pages_bs + slot / in->page_size];
  return page * bs + slot % in->page_size * ts;
}

/* 一块键的潜变量与旋转部分，计算格式，行主序。 */
typedef struct {
  const void *latent, *rope;
  int64_t latent_rs, rope_rs;
} dso_mla_keys;

static inline size_t dso_mla_keys_bytes(const dso_mla_inputs *in, int64_t rows) {
  return (size_t)(rows * (in->rank + in->rope_dim + 4) + in->rank + in->rope_dim) * 4;
}

/* 读槽位 [slot, slot + n)，n 大于 0：格式相同、无遮盖而且在一页之内时直接用缓存；否则转到 buffer，被
 * kv_mask 遮住的行清零（那里可能是未初始化的 NaN）。 */
static inline dso_mla_keys dso_mla_load_keys(const dso_isa *isa, const dso_mla_inputs *in,
                                             dso_dtype fmt, int64_t row, int64_t slot, int64_t n,
                                             void *buffer) {
  int64_t rank = dso_mla_pad(fmt, in->rank), width = dso_mla_pad(fmt, in->rope_dim);
  int exact =
      in->latent_dtype == fmt && in->rope_dtype == fmt && rank == in->rank && width == in->rope_dim;
  int near = !in->pages || slot % in->page_size + n <= in->page_size;
  if (exact && near && !in->kv_mask)
    return (dso_mla_keys){
        dso_at(in->latent, fmt, dso_mla_slot_at(in, row, slot, in->latent_bs, in->latent_ts)),
        dso_at(in->rope, fmt, dso_mla_slot_at(in, row, slot, in->rope_bs, in->rope_ts)),
        in->latent_ts, in->rope_ts};
  float *scratch = buffer;
  void *to = scratch + in->rank + in->rope_dim, *rope_to = dso_at_mut(to, fmt, n * rank);
  for (int64_t i = 0; i < n; i++) {
    const void *from = dso_at(in->latent, in->latent_dtype,
                              dso_mla_slot_at(in, row, slot + i, in->latent_bs, in->latent_ts));
    void *dst = dso_at_mut(to, fmt, i * rank);
    if (in->scale) {
      isa->to_f32(scratch, from, in->latent_dtype, in->rank);
      isa->vscale(scratch, in->scale[dso_mla_slot_at(in, row, slot + i, in->scale_bs, 1)],
                  in->rank);
      dso_mla_copy(isa, dst, fmt, rank, scratch, DSO_F32, 0, 1, in->rank, scratch);
    } else {
      dso_mla_copy(isa, dst, fmt, rank, from, in->latent_dtype, 0, 1, in->rank, scratch);
    }
    from = dso_at(in->rope, in->rope_dtype,
                  dso_mla_slot_at(in, row, slot + i, in->rope_bs, in->rope_ts));
    dso_mla_copy(isa, dso_at_mut(rope_to, fmt, i * width), fmt, width, from, in->rope_dtype, 0, 1,
                 in->rope_dim, scratch);
  }
  for (int64_t i = 0; in->kv_mask && i < n; i++) {
    if (in->kv_mask[row * in->kv_mask_bs + slot + i]) continue;
    memset(dso_at_mut(to, fmt, i * rank), 0, (size_t)(rank * dso_size_of(fmt)));
    memset(dso_at_mut(rope_to, fmt, i * width), 0, (size_t)(width * dso_size_of(fmt)));
  }
  return (dso_mla_keys){to, rope_to, rank, width};
}

/* 一行得分里被 kv_mask 遮住的置 -inf。 */
static inline void dso_mla_hide(const dso_mla_inputs *in, int64_t row, int64_t slot, float *score,
                                int64_t n) {
  if (!in->kv_mask) return;
  const uint8_t *mask = in->kv_mask + row * in->kv_mask_bs + slot;
  for (int64_t j = 0; j < n; j++)
    if (!mask[j]) score[j] = -INFINITY;
}

/* 词元 token（展平）的查询：[H, dn + dr]，头距 q_hs。 */
static inline const void *dso_mla_query(const dso_mla_inputs *in, int64_t token, int64_t head) {
  int64_t b = token / in->t, t = token % in->t;
  return dso_at(in->q, in->q_dtype, b * in->q_bs + t * in->q_ts + head * in->q_hs);
}

#endif
