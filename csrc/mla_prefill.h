/* mla_prefill 与其反向共用：按头打包的上投影权重、一块键的展开。 */
#ifndef DSO_MLA_PREFILL_H
#define DSO_MLA_PREFILL_H

#include "mla_common.h"

enum {
  DSO_KV_CHUNK = 256,  /* 一次展开的键数：K、V 块与得分块一起放得进二级缓存 */
  DSO_EXPAND_ROWS = 64 /* 展开时一次的行数 */
};

/* 各种补齐后的宽度，单位是元素。 */
typedef struct {
  dso_dtype fmt;
  int64_t nope, rope, qk; /* 键的两部分补齐到计算格式的配对；qk 为其和 */
  int64_t v16, kv16;      /* v_dim、nope_dim + v_dim 向上取整到面板 */
  int64_t rank;           /* 潜变量宽度，补齐 */
  int64_t weight;         /* 一个头打包后的权重元素数 */
} dso_mla_dims;

static inline dso_mla_dims dso_mla_dims_of(const dso_isa *isa, const dso_mla_inputs *in) {
  dso_mla_dims d;
  d.fmt = dso_mla_format(isa, in);
  d.nope = dso_mla_pad(d.fmt, in->nope_dim);
  d.rope = dso_mla_pad(d.fmt, in->rope_dim);
  d.qk = d.nope + d.rope;
  d.v16 = dso_round_up(in->v_dim, DSO_PANEL);
  d.kv16 = dso_round_up(in->nope_dim + in->v_dim, DSO_PANEL);
  d.rank = dso_mla_pad(d.fmt, in->rank);
  d.weight = d.kv16 / DSO_PANEL * dso_panel_elems(d.fmt, in->rank);
  return d;
}

/* 头 head 的上投影权重 [dn + dv, r] 打包到 dst。 */
static inline void dso_mla_pack_weight(const dso_isa *isa, const dso_mla_inputs *in,
                                       const dso_mla_dims *d, int64_t head, void *dst) {
  int64_t width = in->nope_dim + in->v_dim;
  isa->pack_t(dst, d->fmt, dso_panel_elems(d->fmt, in->rank),
              dso_at(in->kv_b.data, in->kv_b.dtype, head * width * in->kv_b.rs), in->kv_b.dtype,
              in->kv_b.rs, width, in->rank);
}

/* 展开一个小块：rows [n, kv16] fp32 = 潜变量 · 权重；n <= DSO_EXPAND_ROWS。 */
static inline void dso_mla_expand(const dso_isa *isa, const dso_mla_inputs *in,
                                  const dso_mla_dims *d, const dso_mla_keys *keys,
                                  const void *weight, int64_t n, float *rows) {
  isa->gemm(d->fmt, n, d->kv16 / DSO_PANEL, d->rank, keys->latent, keys->latent_rs, weight,
            dso_panel_elems(d->fmt, in->rank), rows, d->kv16, 0);
}

/* 词元 [first, first + n) 的一个头的查询，补齐成 [n, qk] 的计算格式。 */
static inline void dso_mla_copy_queries(const dso_isa *isa, const dso_mla_inputs *in,
                                        const dso_mla_dims *d, int64_t first, int64_t n,
                                        int64_t head, void *dst, float *row) {
  for (int64_t i = 0; i < n; i++) {
    const void *q = dso_mla_query(in, first + i, head);
    void *to = dso_at_mut(dst, d->fmt, i * d->qk);
    dso_mla_copy(isa, to, d->fmt, d->nope, q, in->q_dtype, 0, 1, in->nope_dim, row);
    dso_mla_copy(isa, dso_at_mut(to, d->fmt, d->nope), d->fmt, d->rope,
                 dso_at(q, in->q_dtype, in->nope_dim), in->q_dtype, 0, 1, in->rope_dim, row);
  }
}

#endif
