// Hopper 的展开式注意力（前向、反向）共用：Q、K、V 的 TMA 描述与读入。
#pragma once

#include <tma.cuh>

#include "mla_prefill.cuh"
#include "tile_sm90.cuh"

namespace dso {

struct PrefillMaps {
  CUtensorMap q, k, v, rope;
};

// 一次 queries 个查询、keys 个键，都是一个头的 64 列。
inline cudaError_t make_prefill_maps(const dso_cuda_mla_prefill_params &p, int queries, int keys,
                                     PrefillMaps *maps) {
  const dso_mla_inputs &in = p.in;
  int64_t width = in.nope_dim + in.v_dim, row = p.heads * width;
  int64_t t_step = in.t == 1 ? in.q_hs * in.heads : in.q_ts;  // 只有一个的一维，步长随便
  TensorBox q{in.q,
              p.dtype,
              4,
              {in.nope_dim + in.rope_dim, in.heads, in.t, in.b},
              {1, in.q_hs, t_step, in.q_bs},
              {BOX_COLUMNS, 1, queries, 1}};
  TensorBox k{p.kv,
              p.dtype,
              4,
              {in.nope_dim, p.heads, in.s, in.b},
              {1, width, row, in.s * row},
              {BOX_COLUMNS, 1, keys, 1}};
  TensorBox v = k;
  v.base = static_cast<const uint16_t *>(p.kv) + in.nope_dim, v.dims[0] = in.v_dim;
  TensorBox rope{in.rope,
                 p.dtype,
                 4,
                 {in.rope_dim, 1, in.s, in.b},
                 {1, in.rope_dim, in.rope_ts, in.rope_bs},
                 {BOX_COLUMNS, 1, keys, 1}};
  cudaError_t error = make_tensor_map(&maps->q, q);
  if (error == cudaSuccess) error = make_tensor_map(&maps->k, k);
  if (error == cudaSuccess) error = make_tensor_map(&maps->v, v);
  // 没有旋转部分：借用 K 的描述，从界外读。
  if (error == cudaSuccess) error = make_tensor_map(&maps->rope, in.rope_dim > 0 ? rope : k);
  return error;
}

// 第 row 行从词元 token 起的 Q、从槽位 slot 起的 K 或 V，各块（box 字节）依次放在 to 起。
template <int NOPE_BOXES>
__device__ void load_q(const PrefillMaps &maps, const dso_mla_inputs &in, int row, int token,
                       int head, unsigned char *to, int box, uint64_t *barrier) {
  for (int i = 0; i < NOPE_BOXES; i++)
    tma_load(to + i * box, &maps.q, barrier, i * BOX_COLUMNS, head, token, row);
  tma_load(to + NOPE_BOXES * box, &maps.q, barrier, static_cast<int>(in.nope_dim), head, token,
           row);
}

template <int NOPE_BOXES>
__device__ void load_k(const PrefillMaps &maps, const dso_mla_inputs &in, int row, int slot,
                       int head, unsigned char *to, int box, uint64_t *barrier) {
  for (int i = 0; i < NOPE_BOXES; i++)
    tma_load(to + i * box, &maps.k, barrier, i * BOX_COLUMNS, head, slot, row);
  // 没有旋转部分时从界外读：TMA 填 0。
  tma_load(to + NOPE_BOXES * box, &maps.rope, barrier,
           in.rope_dim > 0 ? 0 : NOPE_BOXES * BOX_COLUMNS, 0, slot, row);
}

template <int BOXES>
__device__ void load_v(const PrefillMaps &maps, int row, int slot, int head, unsigned char *to,
                       int box, uint64_t *barrier) {
  for (int i = 0; i < BOXES; i++)
    tma_load(to + i * box, &maps.v, barrier, i * BOX_COLUMNS, head, slot, row);
}

}  // namespace dso
