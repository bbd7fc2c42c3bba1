// torch.ops.deepseek_opt 的模式（schema）与执行器。各算子的实现在 binding_*.cpp。
#include "binding.h"

#include <memory>

#include "binding_buffers.h"

namespace dso {

namespace {
constexpr size_t kAlign = 64;

size_t aligned(size_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

// 算子的暂存：小的用本线程常备的一块（解码时一层要十几次，经分派器分配每次一两微秒），大的从池里来，执行完归还。
// 算子不会在执行中再执行别的算子，所以一块就够。
class Scratch {
 public:
  explicit Scratch(size_t bytes) {
    if (bytes <= kResidentBytes) {
      static thread_local std::unique_ptr<char[]> resident(new char[kResidentBytes]);
      data_ = resident.get();
      return;
    }
    pooled_ = bytes >= kPooledBytes ? buffer_take(bytes) : nullptr;
    data_ = static_cast<char *>(pooled_);
    if (pooled_ != nullptr) return;
    tensor_ = torch::stable::empty({static_cast<int64_t>(bytes)}, ScalarType::Byte);
    data_ = static_cast<char *>(tensor_->mutable_data_ptr());
  }
  Scratch(const Scratch &) = delete;
  Scratch &operator=(const Scratch &) = delete;
  ~Scratch() {
    if (pooled_ != nullptr) buffer_give(pooled_);
  }
  char *data() const { return data_; }

 private:
  static constexpr size_t kResidentBytes = size_t{1} << 20;

  char *data_ = nullptr;
  void *pooled_ = nullptr;
  std::optional<Tensor> tensor_;
};
}  // namespace

void execute(const dso_op &op, const void *params) {
  const dso_isa *isa = dso_isa_current();
  const dso_plan plan = op.plan(params, isa);
  int64_t most = 1;
  for (int64_t stage = 0; stage < plan.stages; stage++) {
    const int64_t tasks = op.tasks(params, stage);
    most = tasks > most ? tasks : most;
  }
  const bool serial = plan.work > 0 && plan.work <= DSO_SERIAL_WORK;
  const int64_t threads = serial ? 1 : torch::stable::get_num_threads();
  const int64_t workers = threads < most ? threads : most;
  const size_t shared = aligned(plan.shared_bytes), each = aligned(plan.worker_bytes);
  Scratch scratch(shared + each * static_cast<size_t>(workers) + kAlign);
  auto address = reinterpret_cast<uintptr_t>(scratch.data());
  char *base = reinterpret_cast<char *>(aligned(address));
  for (int64_t stage = 0; stage < plan.stages; stage++) {
    const int64_t tasks = op.tasks(params, stage);
    std::atomic<int64_t> next{0};
    auto work = [&](int64_t begin, int64_t end) {
      for (int64_t worker = begin; worker < end; worker++) {
        dso_ctx ctx{params, isa, stage, base, base + shared + each * static_cast<size_t>(worker)};
        for (int64_t task = next++; task < tasks; task = next++) op.run(&ctx, task);
      }
    };
    const int64_t used = workers < tasks ? workers : tasks;
    if (used > 1)
      torch::stable::parallel_for(0, used, 1, work);
    else if (used == 1)
      work(0, 1);
  }
}

namespace {
std::string isa_name() { return dso_isa_name(dso_isa_current()); }
std::string isa_available() { return dso_isa_available(); }
int64_t release_buffers() { return buffer_release(); }
std::string isa_compiled() { return dso_isa_compiled(); }
void isa_set(std::string name) {
  expect(dso_isa_set(name.c_str()) == 0, "指令集 ", name, " 不可用（可用：", dso_isa_available(),
         "）。");
}
}  // namespace

}  // namespace dso

STABLE_TORCH_LIBRARY(deepseek_opt, m) {
  m.def("_isa() -> str");
  m.def("_available_isas() -> str");
  m.def("_compiled_isas() -> str");
  m.def("_set_isa(str name) -> ()");
  m.def("_release_buffers() -> int");
  m.def("_advise_huge_pages(Tensor t) -> ()");
  m.def("linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor");
  m.def(
      "linear_backward(Tensor grad, Tensor x, Tensor weight, bool need_x, bool need_weight, bool "
      "need_bias)"
      " -> (Tensor, Tensor, Tensor)");
  m.def("swiglu_mlp(Tensor x, Tensor gate, Tensor up, Tensor down) -> Tensor");
  m.def(
      "swiglu_mlp_backward(Tensor grad, Tensor x, Tensor gate, Tensor up, Tensor down)"
      " -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def("rms_norm_backward(Tensor grad, Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)");
  m.def("add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)");
  m.def(
      "rope(Tensor x, Tensor cos, Tensor sin, bool interleaved, bool inverse=False, bool "
      "keep_pairs=False) -> Tensor");
  m.def(
      "rope_(Tensor(a!) x, Tensor cos, Tensor sin, bool interleaved, bool keep_pairs=False) -> ()");
  m.def(
      "mla_layer_decode(Tensor hidden, Tensor? q_a_weight, Tensor? q_a_bias, Tensor? "
      "q_norm_weight, float q_eps, Tensor q_weight, Tensor? q_bias,"
      " Tensor kv_a_weight, Tensor? kv_a_bias, Tensor kv_norm_weight, float kv_eps, Tensor "
      "kv_b_weight, Tensor o_weight, Tensor? o_bias, Tensor cos, Tensor sin, bool interleaved,"
      " Tensor(a!) latent_cache, Tensor(b!) rope_cache, Tensor(c!)? scale_cache, Tensor(d!) "
      "offsets, Tensor? spans, Tensor? kv_mask, float softmax_scale, int num_heads, bool "
      "keep_pairs=False) -> Tensor");
  m.def(
      "mla_cache_write(Tensor(a!) latent_cache, Tensor(b!) rope_cache, Tensor(c!)? scale_cache, "
      "Tensor latent,"
      " Tensor rope, Tensor offsets) -> ()");
  m.def(
      "mla_decode(Tensor q, Tensor latent, Tensor rope, Tensor? scale, Tensor kv_b_weight, Tensor "
      "spans,"
      " Tensor? kv_mask, float softmax_scale, int v_head_dim, bool causal=True, Tensor? "
      "block_table=None) -> Tensor");
  m.def(
      "mla_prefill(Tensor q, Tensor latent, Tensor rope, Tensor? scale, Tensor kv_b_weight, Tensor "
      "spans,"
      " Tensor? kv_mask, float softmax_scale, int v_head_dim, bool causal=True) -> (Tensor, "
      "Tensor)");
  m.def(
      "mla_prefill_backward(Tensor grad, Tensor q, Tensor latent, Tensor rope, Tensor kv_b_weight, "
      "Tensor spans,"
      " Tensor? kv_mask, Tensor out, Tensor lse, float softmax_scale, int v_head_dim, bool causal)"
      " -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "moe_route(Tensor x, Tensor? weight, Tensor? logit_bias, Tensor? choice_bias, int top_k, str "
      "score, bool normalize, bool softmax_after, int n_group, int topk_group, str group_score,"
      " float scaling, float eps) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "moe_route_backward(Tensor? d_logits, Tensor? d_weights, Tensor logits, Tensor indices, str "
      "score, bool normalize, bool softmax_after, float scaling, float eps) -> Tensor");
  m.def(
      "moe_experts(Tensor x, Tensor indices, Tensor weights, Tensor gate_up, Tensor? gate_up_bias,"
      " Tensor down, Tensor? down_bias, Tensor[] shared, str activation, float alpha, float limit,"
      " bool transposed, bool interleaved, bool gated, bool save=False) -> (Tensor, Tensor)");
  m.def(
      "moe_experts_list(Tensor x, Tensor indices, Tensor weights, Tensor[] gate, Tensor[] up, "
      "Tensor[] down, Tensor[] gate_bias, Tensor[] up_bias, Tensor[] down_bias, Tensor[] shared,"
      " str activation, float alpha, float limit, bool gated, bool save=False) -> (Tensor, "
      "Tensor)");
  m.def(
      "moe_experts_list_backward(Tensor grad, Tensor x, Tensor indices, Tensor weights, Tensor[] "
      "gate, Tensor[] up, Tensor[] down, Tensor[] gate_bias, Tensor[] up_bias, Tensor[] down_bias,"
      " Tensor[] shared, str activation, float alpha, float limit, bool gated, bool need_x, bool "
      "need_experts, bool need_shared, Tensor? saved=None)"
      " -> (Tensor, Tensor, Tensor[], Tensor[], Tensor[], Tensor[], Tensor[], Tensor[], Tensor[])");
  m.def(
      "moe_experts_quantized(Tensor x, Tensor indices, Tensor weights, Tensor gate_up, Tensor "
      "gate_up_scale, Tensor? gate_up_zero, Tensor down, Tensor down_scale, Tensor? down_zero,"
      " Tensor[] shared, int group_size, str activation, float alpha, float limit, bool gated,"
      " Tensor[] shared_scale, Tensor[] shared_zero, Tensor? gate_up_bias, Tensor? down_bias)"
      " -> Tensor");
  m.def(
      "moe_experts_backward(Tensor grad, Tensor x, Tensor indices, Tensor weights, Tensor gate_up,"
      " Tensor? gate_up_bias, Tensor down, Tensor? down_bias, Tensor[] shared, str activation,"
      " float alpha, float limit, bool transposed, bool interleaved, bool gated, bool need_x, bool "
      "need_experts, bool need_shared, Tensor? saved=None)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor[])");
  m.def(
      "moe_experts_backward_into(Tensor grad, Tensor x, Tensor indices, Tensor weights, Tensor "
      "gate_up, Tensor? gate_up_bias, Tensor down, Tensor? down_bias, Tensor[] shared, str "
      "activation, float alpha, float limit, bool transposed, bool interleaved, bool gated, bool "
      "need_x, bool need_shared, Tensor(a!) gate_up_grad, Tensor(b!) down_grad, Tensor? saved=None)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("mtp_draft_head(Tensor hidden, Tensor weight, Tensor? bias, Tensor? vocabulary) -> Tensor");
  m.def("mtp_verify_greedy(Tensor logits, Tensor drafts, Tensor? draft_len) -> (Tensor, Tensor)");
  m.def(
      "mtp_verify_sample(Tensor probs, Tensor drafts, Tensor? draft_len, Tensor? draft_probs,"
      " Tensor uniform) -> (Tensor, Tensor)");
  m.def(
      "mtp_input(Tensor embedding, Tensor hidden, Tensor embedding_norm, Tensor hidden_norm, "
      "Tensor weight, float eps) -> Tensor");
  m.def(
      "sample_filter(Tensor logits, Tensor? token_ids, Tensor? token_len, float temperature, int "
      "top_k, float top_p, float min_p, float repetition_penalty) -> Tensor");
  m.def("sample_tokens(Tensor probs, Tensor uniform) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(deepseek_opt, CompositeExplicitAutograd, m) {
  m.impl("_isa", TORCH_BOX(&dso::isa_name));
  m.impl("_available_isas", TORCH_BOX(&dso::isa_available));
  m.impl("_compiled_isas", TORCH_BOX(&dso::isa_compiled));
  m.impl("_release_buffers", TORCH_BOX(&dso::release_buffers));
  m.impl("_advise_huge_pages", TORCH_BOX(&dso::advise_huge_pages));
  m.impl("_set_isa", TORCH_BOX(&dso::isa_set));
}
