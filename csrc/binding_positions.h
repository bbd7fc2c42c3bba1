// mtp_verify_*、sample_* 的绑定共用：按位置排的张量，[0, 1) 的均匀随机数。
#pragma once

#include "binding.h"

namespace dso {

// 三维 [R, P, V] 的视图；最后一维步长应为 1（先 row_major）。
inline dso_positions positions_of(const Tensor &t, dso_dtype dtype) {
  return {t.const_data_ptr(), t.stride(0), t.stride(1), dtype};
}

inline const int64_t *integers(const Tensor &t) {
  return static_cast<const int64_t *>(t.const_data_ptr());
}

inline void expect_vocab(const char *op, const char *name, const Tensor &t) {
  const int64_t vocab = t.size(t.dim() - 1);
  expect(vocab > 0 && vocab <= INT32_MAX, op, "：", name, " 的最后一维（词表大小）应在 1 与 ",
         INT32_MAX, " 之间，实际是 ", vocab, "。");
}

// 均匀随机数换成连续的 fp64，逐个核对在 [0, 1) 内。
inline Tensor uniform_doubles(const char *op, const Tensor &t) {
  expect(t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::Double, op,
         "：uniform 的类型应为 float32 或 float64，实际是 ", dtype_name(t.scalar_type()), "。");
  Tensor wide = torch::stable::contiguous(torch::stable::to(t, ScalarType::Double));
  const auto *u = static_cast<const double *>(wide.const_data_ptr());
  for (int64_t i = 0; i < wide.numel(); i++)
    expect(u[i] >= 0.0 && u[i] < 1.0, op, "：uniform 应在 [0, 1) 内，第 ", i, " 个是 ", u[i], "。");
  return wide;
}

}  // namespace dso
