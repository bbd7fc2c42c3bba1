/* deepseek_opt 的 C 接口：不依赖 torch，不开线程，不分配内存。
 *
 * 一个算子 = 一个参数结构体 + 一个 dso_op：
 *   plan(params)            要几个阶段（stage）、多少共享与每工人（worker）暂存；
 *   tasks(params, stage)    该阶段有多少个互不依赖的任务；
 *   run(ctx, task)          执行一个任务。
 * 阶段之间由调用者设栅栏；同一阶段的任务可以任意顺序、任意线程执行，结果逐位相同。
 *
 * 形状记号：B 行，T 新词元数，S 潜变量槽位数，H 头数，r = kv_lora_rank，
 * dr = qk_rope_head_dim，dn = qk_nope_head_dim，dv = v_head_dim。
 * 大小与步长都是 int64，单位是元素。
 */
#ifndef DSO_H
#define DSO_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* DSO_I4 只用于量化的权重，以字节（两个权重）为单位计大小与步长；打包见 dso_quant。
 * DSO_F8 是 e4m3fn（没有无穷，0x7f、0xff 是 NaN，最大 448），用于缓存里的潜变量与量化的权重。 */
typedef enum {
  DSO_F32 = 0,
  DSO_BF16 = 1,
  DSO_F16 = 2,
  DSO_I8 = 3,
  DSO_I4 = 4,
  DSO_F8 = 5
} dso_dtype;

typedef struct {
  int64_t stages;      /* 阶段数 */
  size_t shared_bytes; /* 全部任务共享的暂存 */
  size_t worker_bytes; /* 每个工人独占的暂存 */
  int64_t work;        /* 全部阶段约有多少次乘加；0 表示没有估计，当作很多 */
} dso_plan;

/* 至此不值得分给几个线程：唤醒与等待要几微秒，而这么多乘加一个线程也只要几微秒。 */
enum { DSO_SERIAL_WORK = 1 << 16 };

struct dso_isa;

typedef struct {
  const void *params;
  const struct dso_isa *isa;
  int64_t stage;
  void *shared;
  void *worker;
} dso_ctx;

typedef struct {
  const char *name;
  dso_plan (*plan)(const void *params, const struct dso_isa *isa);
  int64_t (*tasks)(const void *params, int64_t stage);
  void (*run)(const dso_ctx *ctx, int64_t task);
} dso_op;

/* 矩阵视图：行距 rs，列距恒为 1。 */
typedef struct {
  const void *data;
  int64_t rs;
  dso_dtype dtype;
} dso_mat;

/* 量化权重 W [n, k] 的尺度：W[n, k] = scale[n, k / group] * (码[n, k] - 零点[n, k / group])。
 * int8：每行一个尺度（groups 为 1，group 为 0），没有零点。
 * fp8（DSO_F8）：码是 e4m3fn 的数，没有零点；group 为 0 时每行一个尺度，否则每 group（32 的倍数）个一个，不补齐。
 * int4：group 为 32 的倍数；k 补齐到 group 的倍数（补的码任意），每 32 个权重 16 字节，第 j 字节的
 * 低 4 位是第 j 个、高 4 位是第 j + 16 个：一次解开两个向量。zero 为 NULL 时零点都是 8。 */
typedef struct {
  const float *scale;  /* [n, groups] */
  const uint8_t *zero; /* [n, groups] */
  int64_t group, groups;
} dso_quant;

/* y [M, N] = x [M, K] Wᵀ + b；W [N, K]（nn.Linear 的布局，原地读取）。 */
typedef struct {
  int64_t m, n, k;
  dso_mat x, weight;
  const void *bias; /* [N]，可为 NULL，dtype 与 weight 相同 */
  void *y;          /* [M, N] 连续 */
  dso_dtype y_dtype;
} dso_linear_params;

/* grad [M, N]；dx [M, K] = grad W；dw [N, K] = gradᵀ x；db [N] = 按列求和。不要的为 NULL。 */
typedef struct {
  int64_t m, n, k;
  dso_mat grad, x, weight;
  void *dx, *dw, *db; /* 连续；dx 与 x 同 dtype，dw、db 与 weight 同 dtype */
} dso_linear_backward_params;

/* y [M, N] = (silu(x gateᵀ) * (x upᵀ)) downᵀ；gate、up [I, K]，down [N, I]。 */
typedef struct {
  int64_t m, n, k, inner;
  dso_mat x, gate, up, down;
  void *y; /* [M, N] 连续，与 x 同 dtype */
} dso_swiglu_mlp_params;

/* 反向：中间量全部重算。dx [M, K]，dgate、dup [I, K]，ddown [N, I]，连续。 */
typedef struct {
  int64_t m, n, k, inner;
  dso_mat grad, x, gate, up, down;
  void *dx, *dgate, *dup, *ddown;
} dso_swiglu_mlp_backward_params;

/* y = norm(x (+ residual)) * weight；total 非 NULL 时写出 x + residual。 */
typedef struct {
  int64_t rows, dim;
  dso_mat x, residual; /* residual.data 可为 NULL */
  const void *weight;
  dso_dtype weight_dtype;
  void *y, *total; /* 连续，与 x 同 dtype */
  float eps;
} dso_rms_norm_params;

typedef struct {
  int64_t rows, dim;
  dso_mat grad, x;
  const void *weight;
  dso_dtype weight_dtype;
  void *dx; /* 与 x 同 dtype，可为 NULL */
  void *dw; /* 与 weight 同 dtype，可为 NULL */
  float eps;
} dso_rms_norm_backward_params;

/* x、y [B, T, H, d]；cos、sin [1 或 B, T, d/2] fp32（批步长 0 表示共用）。 */
typedef struct {
  int64_t b, t, h, d;
  const void *x;
  int64_t x_bs, x_ts, x_hs;
  dso_dtype dtype;
  const float *cos, *sin;
  int64_t cs_bs, cs_ts;
  void *y; /* 可以就是 x（原地） */
  int64_t y_bs, y_ts, y_hs;
  int interleaved, inverse, keep_pairs; /* keep_pairs 只与 interleaved 一起 */
} dso_rope_params;

/* 解码用的融合投影（行数少）：q_latent = norm(x q_aᵀ + b)，latent = norm(x kv_aᵀ 的前 r 列)，
 * rope = 旋转(后 dr 列)。x [M, K]；q_a [qr, K]；kv_a [r + dr, K]；cos、sin [1 或 M, dr/2] fp32。 */
typedef struct {
  int64_t m, k, q_rank, rank, rope_dim;
  dso_mat x, q_a, kv_a;
  const void *q_bias, *kv_bias; /* 可为 NULL，dtype 与各自权重相同 */
  const void *q_norm, *kv_norm; /* [qr]、[r] */
  dso_dtype norm_dtype;
  float q_eps, kv_eps;
  const float *cos, *sin;
  int64_t cs_rs;                  /* 行距；0 表示各行共用 */
  int interleaved, keep_pairs;    /* 同 dso_rope_params */
  void *q_latent, *latent, *rope; /* 连续，与 x 同 dtype */
} dso_mla_qkv_a_params;

/* 潜变量的量化：int8 与 fp8 都是逐词元对称的，尺度 = 最大绝对值 / 最大的码。 */
enum { DSO_I8_MOST = 127, DSO_F8_MOST = 448 };

static inline int dso_quantized_latent(dso_dtype dtype) {
  return dtype == DSO_I8 || dtype == DSO_F8;
}

/* 把 latent [B, T, r]、rope [B, T, dr] 写到 offsets[b] 起的槽位。 */
typedef struct {
  int64_t b, t, rank, rope_dim;
  const void *latent, *rope;
  int64_t latent_bs, latent_ts, rope_bs, rope_ts;
  dso_dtype latent_dtype, rope_dtype;
  void *latent_cache, *rope_cache;
  int64_t latent_cache_bs, latent_cache_ts, rope_cache_bs, rope_cache_ts;
  dso_dtype latent_cache_dtype, rope_cache_dtype;
  float *scale_cache; /* 量化时 [B, C] */
  int64_t scale_cache_bs;
  const int64_t *offsets;
} dso_mla_cache_write_params;

/* 一段查询看一段缓存：展平下标 [q_begin, q_end)、[kv_begin, kv_end)。 */
typedef struct {
  int64_t q_begin, q_end, kv_begin, kv_end;
} dso_span;

/* mla_decode、mla_prefill 与其反向共用的输入。 */
typedef struct {
  int64_t b, t, s, heads, rank, nope_dim, rope_dim, v_dim;
  const void *q; /* [B, T, H, dn + dr]，后 dr 维已旋转 */
  int64_t q_bs, q_ts, q_hs;
  dso_dtype q_dtype;
  const void *latent, *rope; /* [B, S, r]、[B, S, dr] */
  int64_t latent_bs, latent_ts, rope_bs, rope_ts;
  dso_dtype latent_dtype, rope_dtype;
  const float *scale; /* 量化的潜变量的每词元尺度 [B, S]，否则 NULL */
  int64_t scale_bs;
  dso_mat kv_b;           /* [H * (dn + dv), r] */
  const uint8_t *kv_mask; /* [B, S]，1 可见；可为 NULL */
  int64_t kv_mask_bs;
  const dso_span *spans;
  int64_t n_spans;
  float softmax_scale;
  int causal;
  /* 分页的缓存（只有 mla_decode）：latent、rope、scale 是 [页数, page_size, ...]，第 b 行的槽位 i 在
   * 第 pages[b, i / page_size] 页，共 page_count 页；s 是页表的宽乘 page_size。NULL 为连续的缓存。 */
  const int32_t *pages;
  int64_t pages_bs, page_size, page_count;
} dso_mla_inputs;

typedef struct {
  dso_mla_inputs in;
  void *out;  /* [B, T, H, dv] 连续，与 q 同 dtype；未覆盖的查询由调用者先清零 */
  float *lse; /* [B, T, H]，mla_prefill 用；未覆盖的由调用者先置 -inf */
} dso_mla_params;

typedef struct {
  dso_mla_inputs in;
  const void *grad, *out; /* [B, T, H, dv] 连续，与 q 同 dtype */
  const float *lse;
  void *dq;               /* [B, T, H, dn + dr] 连续，与 q 同 dtype，调用者先清零 */
  float *dlatent, *drope; /* [B, S, r]、[B, S, dr] fp32，调用者先清零 */
  float *dkv_b;           /* [H * (dn + dv), r] fp32，调用者先清零 */
} dso_mla_backward_params;

/* 激活：h = a(gate) * up；没有 up 时 h = a(gate)。CLIPPED 是 gpt-oss 的：
 * g = min(gate, limit)，u = clamp(up, -limit, limit)，h = g * sigmoid(alpha g) * (u + 1)；CLIPPED_SILU 是
 * DeepSeek-V4 的：同样截断，h = silu(g) * u，不看 alpha。这两种必须有 up，limit > 0。 */
typedef enum {
  DSO_SILU = 0,
  DSO_GELU,
  DSO_GELU_TANH,
  DSO_RELU,
  DSO_RELU2,
  DSO_CLIPPED,
  DSO_CLIPPED_SILU
} dso_act_kind;

typedef struct {
  dso_act_kind kind;
  float alpha, limit;
} dso_act;

static inline int dso_act_clips(dso_act_kind kind) {
  return kind == DSO_CLIPPED || kind == DSO_CLIPPED_SILU;
}

/* 一个专家的权重：gate、up [I, K]，down [N, I]；transposed 时 [K, I]、[I, N]。
 * paired（只与 transposed 同用）：gate 是 [K, 2 I]，偶数列是门、奇数列是 up。没有 up 时 up 不用。
 * 量化的（int8、int4、fp8）三个权重都量化，不转置，只做前向。 */
typedef struct {
  int64_t inner;
  dso_mat gate, up, down;
  const void *gate_bias, *up_bias, *down_bias; /* 可为 NULL */
  dso_dtype bias_dtype;
  int64_t bias_step; /* gate_bias、up_bias 相邻两个的间隔，元素数 */
  dso_quant gate_quant, up_quant, down_quant;
} dso_expert;

/* 行按专家排好：专家 e 的行是 [begin[e], begin[e + 1])，行 i 属于词元 token[i]（专家内不减；同一词元
 * 两次选同一专家时相邻），混合权重 weight[i]。其余的填好后调用 dso_moe_prepare。 */
typedef struct {
  int64_t tokens, k, n, experts;
  dso_mat x; /* [tokens, K] */
  const dso_expert *expert;
  const int64_t *begin, *token;
  const float *weight;
  dso_act act;
  int transposed, paired, gated; /* gated：有 up（权重为空时也可以是空指针，不能靠指针分辨） */
  /* 由 dso_moe_prepare 填，任务因此不必逐个专家数过来。 */
  const int64_t *hidden_at;                /* [experts + 1]：专家 e 之前的 Σ 行 * inner */
  const int64_t *task_at;                  /* [experts + 1]：专家 e 之前的中间阶段任务数 */
  const int64_t *packed_at;                /* [experts + 1]：专家 e 之前边读边解的量化专家的行数 */
  int64_t most_rows, widest, inner_blocks; /* 最多的行数；K、N、inner 的最大值；inner 最多的段数 */
  int all_bf16, backward, quantized;       /* quantized：有量化的专家 */
} dso_moe_inputs;

/* at 有 3 (experts + 1) 个位置，要活到执行结束。backward：为反向准备，块的宽度不同。 */
void dso_moe_prepare(dso_moe_inputs *in, int backward, int64_t *at);

/* 前向留给反向的 gate、up（加了偏置、激活之前，与 x 同 dtype）。有门时一行是两份、没有门时一份：路由的第 i 行从
 * i 份 rs 起，共享专家（在 routed 个路由专家之后）的第 t 行从 shared_at + t 份 inner 起；先是 gate，隔 rs（inner）是
 * up。 */
typedef struct {
  void *data; /* NULL：不留，反向重算 */
  int64_t rs, routed, shared_at;
} dso_moe_saved;

typedef struct {
  dso_moe_inputs in;
  void *y; /* [tokens, N] 连续，与 x 同 dtype */
  dso_moe_saved saved;
} dso_moe_params;

/* 一个专家的梯度，形状与 dtype 同权重；不要的为 NULL。 */
typedef struct {
  void *gate, *up, *down, *gate_bias, *up_bias, *down_bias;
  int64_t gate_rs, up_rs, down_rs;
  int add; /* 1：gate、up、down 加到原有的值上（偏置照常覆盖） */
} dso_expert_grad;

typedef struct {
  dso_moe_inputs in;
  dso_mat dy;                  /* [tokens, N] */
  void *dx;                    /* [tokens, K] 连续，与 x 同 dtype；可为 NULL */
  float *dweight;              /* [行]；可为 NULL */
  const dso_expert_grad *grad; /* [experts] */
  int64_t threads;             /* 只影响任务的划分，不影响结果 */
  const int64_t *task_at;      /* 由 dso_moe_backward_prepare 填 */
  dso_moe_saved saved;
} dso_moe_backward_params;

/* 其余的填好后调用（in 先 dso_moe_prepare）；task_at 有 3 experts + 1 个位置，要活到执行结束。 */
void dso_moe_backward_prepare(dso_moe_backward_params *p, int64_t *task_at);

/* 稳定的计数排序。index [tokens, top_k]；不在 [0, experts) 的（哨兵）舍去。begin [experts + 1]；
 * token、slot [至多 tokens * top_k]：各行的词元、它在 index 里的位置。 */
void dso_moe_sort(const int64_t *index, int64_t tokens, int64_t top_k, int64_t experts,
                  int64_t *begin, int64_t *token, int64_t *slot);

/* 路由的打分：逐元素的 sigmoid、sqrt(softplus)，或整行的 softmax。 */
typedef enum { DSO_SCORE_SIGMOID = 0, DSO_SCORE_SOFTMAX, DSO_SCORE_SQRTSOFTPLUS } dso_score;

/* softmax_after：按 logits 选，再对所选的做 softmax（score 为 SOFTMAX）。normalize：所选权重除以（其和 + eps）。
 * n_group > 1：先选得分最高的 topk_group 组（组得分为最高两项之和，group_max 时为最高项），再在其中选。 */
typedef struct {
  dso_score score;
  int normalize, softmax_after, group_max;
  int64_t top_k, n_group, topk_group;
  float scaling, eps;
} dso_route_rule;

/* logits = x weightᵀ + logit_bias；has_weight 为 0 时 x [tokens, experts] 就是 logits（再加偏置）。
 * choice_bias 只影响选择。indices 按得分从高到低，相同时下标小的在前；NaN 视为最大。 */
typedef struct {
  int64_t tokens, k, experts;
  int has_weight; /* k 为 0 的权重也可以是空指针，不能靠指针分辨 */
  dso_mat x, weight;
  const float *logit_bias, *choice_bias; /* [experts]，可为 NULL */
  dso_route_rule rule;
  float *logits, *weights;   /* [tokens, experts]、[tokens, top_k] */
  int64_t *indices, *counts; /* [tokens, top_k]、[experts] */
} dso_moe_route_params;

/* 由 d_weights（与 d_logits）求对 logits 的梯度；选择本身没有导数。 */
typedef struct {
  int64_t tokens, experts;
  dso_route_rule rule;
  const float *logits;
  const int64_t *indices;            /* [tokens, top_k]，在 [0, experts) */
  const float *d_logits, *d_weights; /* 可为 NULL */
  float *out;                        /* [tokens, experts] */
} dso_moe_route_backward_params;

/* [R, P, V]：第 (r, i) 个位置的 V 个数起于第 r * rs + i * ps 个元素，相邻。 */
typedef struct {
  const void *data;
  int64_t rs, ps;
  dso_dtype dtype;
} dso_positions;

/* 逐行核对草稿 draft [R, D]（前 draft_len[r] 个有效，其余不看；NULL 为都有效）：accepted 是从头连续接受的
 * 个数，next 是其后的词元。next < 0 是出错：位置 -1 - next 上的数不对，accepted 是 dso_mtp_fault。 */
typedef struct {
  int64_t rows, drafts, vocab;
  const int64_t *draft, *draft_len; /* [R, D]、[R] */
  int64_t *accepted, *next;         /* [R] */
} dso_mtp_rows;

typedef enum { DSO_MTP_BAD_TARGET = 0, DSO_MTP_BAD_DRAFT = 1 } dso_mtp_fault;

typedef struct {
  dso_mtp_rows in;
  dso_positions logits; /* [R, D + 1, V] */
} dso_mtp_verify_greedy_params;

typedef struct {
  dso_mtp_rows in;
  int one_hot;                    /* 1：草稿是确定地选出的，没有 proposal */
  dso_positions target, proposal; /* 概率 [R, D + 1, V]、[R, D, V] */
  const double *uniform;          /* [R, D + 1]，[0, 1)；最后一列用来抽 next */
} dso_mtp_verify_sample_params;

/* h' = W [norm(embedding); norm(hidden)]；embedding、hidden [M, K]，weight [N, 2 K]。 */
typedef struct {
  int64_t m, n, k;
  dso_mat embedding, hidden, weight;        /* embedding 与 hidden 同 dtype */
  const void *embedding_norm, *hidden_norm; /* [K] */
  dso_dtype embedding_norm_dtype, hidden_norm_dtype;
  float eps;
  void *y; /* [M, N] 连续，与 embedding 同 dtype */
} dso_mtp_input_params;

/* 各行的草稿 token[r] = argmax_v (W x_r + b)_v，v 在候选 vocabulary [count] 里（NULL 为 0 到 count - 1）；
 * 相同时取靠前的候选。token < 0 是出错：分数里有 NaN，或（只在 CUDA，内容没有先查）候选越界。 */
typedef struct {
  int64_t m, k, vocab, count;
  dso_mat x, weight;         /* [M, K]、[V, K] */
  const void *bias;          /* [V]，与 weight 同 dtype；没有则 NULL */
  const int64_t *vocabulary; /* [count]，都在 [0, V) 内 */
  int64_t *token;            /* [M] */
} dso_mtp_draft_head_params;

/* 采样前对 logits [R, P, V] 的处理，依次是重复惩罚、温度、top-k、top-p、min-p，再 softmax。
 * top_k 为 0、top_p >= 1、min_p <= 0、penalty 为 1 分别表示不用。 */
typedef struct {
  int64_t rows, positions, vocab;
  dso_positions logits;
  const int64_t *token;     /* [R, L] 已有的词元；不在 [0, V) 的不算。没有则 NULL */
  int64_t token_rs, tokens; /* 行距；L */
  const int64_t *token_len; /* [R, P]：各位置看前几个；NULL 为全部 */
  float penalty, temperature, min_p;
  int64_t top_k;
  double top_p;
  float *probs;   /* [R, P, V] 连续 */
  int64_t *fault; /* [R, P]：1 表示 logits 里有 NaN、+inf，或全是 -inf */
} dso_sample_filter_params;

/* 各行按概率抽一个：第一个累计超过 uniform * 总和的。token < 0 是出错。 */
typedef struct {
  int64_t rows, vocab;
  dso_mat probs;         /* [R, V] */
  const double *uniform; /* [R]，[0, 1) */
  int64_t *token;        /* [R] */
} dso_sample_tokens_params;

extern const dso_op dso_linear, dso_linear_backward;
extern const dso_op dso_swiglu_mlp, dso_swiglu_mlp_backward;
extern const dso_op dso_rms_norm, dso_rms_norm_backward;
extern const dso_op dso_rope, dso_mla_qkv_a, dso_mla_cache_write;
extern const dso_op dso_moe_route, dso_moe_route_backward;
extern const dso_op dso_moe_experts, dso_moe_experts_backward;
extern const dso_op dso_mtp_verify_greedy, dso_mtp_verify_sample, dso_mtp_input;
extern const dso_op dso_mtp_draft_head;
extern const dso_op dso_sample_filter, dso_sample_tokens;
extern const dso_op dso_mla_decode, dso_mla_prefill, dso_mla_prefill_backward;

/* 指令集：名字为 scalar、avx2、avx512、avx512_vnni、avx512_bf16。 */
const struct dso_isa *dso_isa_current(void);
const char *dso_isa_name(const struct dso_isa *isa);
const char *dso_isa_available(void); /* 本机可用，逗号分隔 */
const char *dso_isa_compiled(void);  /* 编译进来的，逗号分隔 */
int dso_isa_set(const char *name);   /* 0 成功；-1 未知或本机不可用 */

#ifdef __cplusplus
}
#endif
#endif
