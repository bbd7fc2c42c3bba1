// moe_experts 各算子的绑定共用：路由、共享专家、激活。
#pragma once

#include "binding.h"

namespace dso {

// 全部张量要活到执行结束。
struct Experts {
  Tensor x, gate_up, down, gate_up_bias, down_bias;
  std::vector<Tensor> shared;
  std::vector<dso_expert> list;
  std::vector<int64_t> begin, token, slot, at;
  std::vector<float> weight;
  int64_t routed = 0, inner = 0, rows = 0;
  dso_moe_inputs in{};
};

// 名字换成激活；截断的两种要有门、limit 要为正。
dso_act act_of(const char *op, const std::string &name, double alpha, double limit, bool gated);

// 路由：按专家排序，混合权重转 fp32。先填好 x、routed；shared 为共享专家的个数（0 或 1）。
void fill_routing(const char *op, Experts &m, const Tensor &indices, const Tensor &weights,
                  int64_t shared);

// 共享专家 [gate, up, down]（可再带一个逐词元的系数 [T]）：行是全部词元。接在 list 的路由专家之后。
void fill_shared(const char *op, Experts &m, const std::vector<Tensor> &shared);

// fill_shared 的两头：张量个数的检查；（list 里已有共享专家时）它的行与系数。
void check_shared_count(const char *op, const std::vector<Tensor> &shared);
void fill_shared_rows(const char *op, Experts &m, const std::vector<Tensor> &shared);

// list、路由填好之后：填 in 的其余部分，dso_moe_prepare。
void prepare(const char *op, Experts &m, const dso_act &act, bool backward);

// 与 t 同形状、未初始化的梯度；不要时是空张量。
Tensor grad_like(const Tensor &t, bool wanted);

struct CommonGrads {
  Tensor x, weights;
  std::vector<Tensor> shared;
};

// 执行反向：grads 与 list 等长，路由专家的已填好，共享专家的在这里分配。
CommonGrads run_backward(const char *op, Experts &m, const Tensor &grad, const Tensor &x,
                         const Tensor &weights, const std::vector<Tensor> &shared,
                         std::vector<dso_expert_grad> &grads, bool need_x, bool need_shared);

}  // namespace dso
