/* CUDA 启动函数：参数结构体与 csrc/dso.h 共用，指针指向设备内存；不依赖 torch。
 *
 * 每个函数把核排进 stream 后立即返回，不同步、不分配内存；返回启动的错误码。
 * 大小与步长都是 int64，单位是元素。结果与网格划分无关（归约次序只由形状决定）。
 */
#ifndef DSO_CUDA_H
#define DSO_CUDA_H

#include <cuda_runtime.h>

#include "dso.h"

#ifdef __cplusplus
extern "C" {
#endif

cudaError_t dso_cuda_rms_norm(const dso_rms_norm_params *p, cudaStream_t stream);

/* scratch：至少 dso_cuda_rms_norm_backward_scratch(rows, dim) 字节的设备内存，16 字节对齐。 */
size_t dso_cuda_rms_norm_backward_scratch(int64_t rows, int64_t dim);
cudaError_t dso_cuda_rms_norm_backward(const dso_rms_norm_backward_params *p, void *scratch,
                                       cudaStream_t stream);

cudaError_t dso_cuda_rope(const dso_rope_params *p, cudaStream_t stream);

/* capacity：缓存的槽位数 C。offsets 在设备上，越界在核里断言（不先同步回主机检查）。 */
cudaError_t dso_cuda_mla_cache_write(const dso_mla_cache_write_params *p, int64_t capacity,
                                     cudaStream_t stream);

/* 解码的一步写缓存：write.latent、write.rope 是 kv_a 投影的输出，这里先归一化、先旋转（各舍入到输入的类型）。
 * write.offsets 在设备上。spans 非 NULL 时写出各行看见自己整个缓存的 span [B]；advance 非 NULL（就是 offsets）时
 * 随后加上 T；queries.x 非 NULL 时就地旋转查询（y 就是 x，B、T 与写入的相同）：一步里不必再有别的核。 */
typedef struct {
  dso_mla_cache_write_params write;
  int64_t capacity; /* 缓存的槽位数 C */
  const void *norm; /* [r] */
  dso_dtype norm_dtype;
  float eps;
  const float *cos, *sin; /* [1 或 B, T, dr/2]，批步长 0 表示共用 */
  int64_t cs_bs, cs_ts;
  int interleaved, keep_pairs; /* 同 dso_rope_params */
  dso_span *spans;
  int64_t *advance;
  dso_rope_params queries;
} dso_cuda_mla_kv_write_params;

cudaError_t dso_cuda_mla_kv_write(const dso_cuda_mla_kv_write_params *p, cudaStream_t stream);

/* 撤回上面的前移：offsets [b] 各减 t。只在之后的步骤失败时用。 */
cudaError_t dso_cuda_mla_kv_rewind(int64_t *offsets, int64_t b, int64_t t, cudaStream_t stream);

/* 行极少的 y = x weightᵀ + bias：x [m, k]，16 位，各权重与它同类型，行都能按 16 字节读（dso_cuda_linear_fits）。
 * 没有第二个时 part[1].n 为 0；gated 时两个的 n 相同，part[0].y = silu(第一个) * 第二个，part[1].y 不用。batch 个（各头）
 * 同样的乘法一起算时，x、权重、y 各相隔 *_step 个元素。 */
typedef struct {
  dso_mat weight;   /* [n, k] */
  const void *bias; /* [n]，同类型，可为 NULL */
  int64_t n;
  void *y; /* [m, n]，行距 y_rs */
  int64_t y_rs, weight_step, y_step;
} dso_cuda_linear_part;

typedef struct {
  int64_t m, k, batch, x_step;
  dso_mat x;
  dso_cuda_linear_part part[2];
  int gated;
} dso_cuda_linear_params;

int dso_cuda_linear_fits(const dso_cuda_linear_params *p);
cudaError_t dso_cuda_linear(const dso_cuda_linear_params *p, cudaStream_t stream);

/* 各头的 y [m, n] = x [m, k] 乘权重，16 位的同一种类型，最后一维都是连续的；*_ms、w_rs 是行距，*_hs 是相邻的头。by_row：
 * w [n, k]（W_UV），否则 w [k, n]（吸收）。settled：流里的前两个核都没有写 w，其中至少一个不在 grid_wait 之前放行
 * （launch.cuh），于是可以不等前一个核就读它（只有 by_row 的这样做）。 */
typedef struct {
  int64_t m, heads, k, n;
  const void *x, *w;
  int64_t x_ms, x_hs, w_rs, w_hs;
  void *y;
  int64_t y_ms, y_hs;
  dso_dtype dtype;
  int by_row, settled;
} dso_cuda_heads_params;

/* 词元不多时的；行极少的吸收另有一个核（不看 by_row、settled）。 */
int dso_cuda_heads_fits(const dso_cuda_heads_params *p);
cudaError_t dso_cuda_heads(const dso_cuda_heads_params *p, cudaStream_t stream);
int dso_cuda_absorb_fits(const dso_cuda_heads_params *p);
cudaError_t dso_cuda_absorb(const dso_cuda_heads_params *p, cudaStream_t stream);

/* swiglu_mlp 的激活，三个都是连续的 count 个：grad 为 NULL 时 gate = silu(gate) * up；否则 grad 是对 h 的
 * 梯度，gate、up、grad 依次换成 dgate、dup、h。 */
typedef struct {
  int64_t count;
  dso_dtype dtype;
  void *gate, *up, *grad;
} dso_cuda_silu_params;

cudaError_t dso_cuda_silu(const dso_cuda_silu_params *p, cudaStream_t stream);

/* 解码的中间一步：潜变量空间里的注意力。吸收（q_nope · W_UK）与输出（· W_UV）是普通的矩阵乘，由调用者做。
 * 指针（含 in.spans、in.pages）都在设备上；in.kv_b、in.v_dim 不用。没有被任何 span 覆盖、或键范围为空的
 * 查询得到 0。 */
typedef struct {
  dso_mla_inputs in;
  const void *q_abs; /* [B*T, H, r] 连续 */
  void *o;           /* [B*T, H, r] 连续 */
  dso_dtype dtype;   /* q_abs 与 o 的类型 */
  int64_t most_rows; /* 一个 span 至多多少行（词元 x 头），只影响快慢 */
  int covered;       /* 已知每个查询都在键范围不空的 span 里 */
  int settled; /* 缓存、spans、kv_mask 都不是流里的前一个核写的，而且它不在 grid_wait 之前放行（见 launch.cuh）：可以先读 */
} dso_cuda_mla_decode_params;

cudaError_t dso_cuda_mla_decode_scratch(const dso_cuda_mla_decode_params *p, size_t *bytes);
cudaError_t dso_cuda_mla_decode(const dso_cuda_mla_decode_params *p, void *scratch,
                                cudaStream_t stream);

/* 展开式注意力，一组头。kv [B, S, heads, dn + dv] 是这组头展开的 K（不含旋转部分）与 V，in 的潜变量不读。
 * dtype 为 fp32 时走通用路径（kv 是 fp32，q、rope 任意），否则 kv、q、rope、out 都是 dtype，而且
 * dso_cuda_mla_prefill_fits。没有被任何 span 覆盖的查询不写。 */
typedef struct {
  dso_mla_inputs in;
  const void *kv;
  int64_t first_head, heads; /* 这组头是 [first_head, first_head + heads) */
  dso_dtype dtype;
  void *out; /* [B, T, H, dv] 连续 */
  dso_dtype out_dtype;
  float *lse; /* [B, T, H] */
} dso_cuda_mla_prefill_params;

/* 这些形状能不能以 dtype 在当前设备上算（维度、对齐、共享内存）；backward：反向。 */
int dso_cuda_mla_prefill_fits(const dso_mla_inputs *in, dso_dtype dtype, int backward);
cudaError_t dso_cuda_mla_prefill(const dso_cuda_mla_prefill_params *p, cudaStream_t stream);

/* 反向，一组头：in 同前向（out、lse 是前向的结果）。dkv [B, S, heads, dn + dv] 与 kv 同类型，全部写出；
 * drope [B, S, heads, dr] 是各头的旋转部分，全部写出；dq [B, T, H, dn + dr] 与 q 同类型，没有被任何 span
 * 覆盖的查询不写。delta [B, T, H] 由 dso_cuda_mla_backward_delta 先算好。 */
typedef struct {
  dso_cuda_mla_prefill_params in;
  const void *grad; /* [B, T, H, dv] 连续，与 q 同类型 */
  float *delta;
  void *dq, *dkv;
  float *drope;
} dso_cuda_mla_prefill_backward_params;

int dso_cuda_mla_prefill_backward_shared(const dso_mla_inputs *in, dso_dtype dtype); /* 字节 */
cudaError_t dso_cuda_mla_backward_delta(const dso_cuda_mla_prefill_backward_params *p,
                                        cudaStream_t stream);
cudaError_t dso_cuda_mla_prefill_backward(const dso_cuda_mla_prefill_backward_params *p,
                                          cudaStream_t stream);

/* 没有键可看的查询：rows [B, T, width] 写 0，lse [B, T, H]（可以是 NULL）写 -inf；其余不动。 */
typedef struct {
  dso_mla_inputs in; /* 只用 b、t、heads、spans、n_spans */
  void *rows;
  int64_t width;
  dso_dtype dtype;
  float *lse;
} dso_cuda_mla_unseen_params;

cudaError_t dso_cuda_mla_clear_unseen(const dso_cuda_mla_unseen_params *p, cudaStream_t stream);

/* in 的潜变量还原、清理成 [B, S, r]，见 mla_latents.cu；to 由调用者先清零。 */
cudaError_t dso_cuda_mla_latents(const dso_mla_inputs *in, void *to, dso_dtype dtype,
                                 cudaStream_t stream);

/* ---- MTP 与采样 ----
 *
 * 参数结构体同 CPU，指针（草稿、长度、均匀随机数、输出）都在设备上，内容没有先查：长度截到范围之内，越界的词元不读。
 * 数不对时记在输出里，不报错：next、token 为负，fault 为 1（这一行的 probs 全是 NaN）。scratch 16 字节对齐。 */
size_t dso_cuda_mtp_verify_greedy_scratch(const dso_mtp_rows *in);
cudaError_t dso_cuda_mtp_verify_greedy(const dso_mtp_verify_greedy_params *p, void *scratch,
                                       cudaStream_t stream);

size_t dso_cuda_mtp_verify_sample_scratch(const dso_mtp_rows *in);
cudaError_t dso_cuda_mtp_verify_sample(const dso_mtp_verify_sample_params *p, void *scratch,
                                       cudaStream_t stream);

size_t dso_cuda_mtp_draft_head_scratch(const dso_mtp_draft_head_params *p);
cudaError_t dso_cuda_mtp_draft_head(const dso_mtp_draft_head_params *p, void *scratch,
                                    cudaStream_t stream);

size_t dso_cuda_sample_tokens_scratch(const dso_sample_tokens_params *p);
cudaError_t dso_cuda_sample_tokens(const dso_sample_tokens_params *p, void *scratch,
                                   cudaStream_t stream);

size_t dso_cuda_sample_filter_scratch(const dso_sample_filter_params *p);
cudaError_t dso_cuda_sample_filter(const dso_sample_filter_params *p, void *scratch,
                                   cudaStream_t stream);

/* rows [M, 2 K] = [norm(embedding), norm(hidden)]：mtp_input 里矩阵乘之前的一步，乘 p->weight 由调用者交给 cuBLAS。
 * rows 与 embedding 同类型；p->weight、p->y 不用。 */
cudaError_t dso_cuda_mtp_input(const dso_mtp_input_params *p, void *rows, cudaStream_t stream);

/* ---- MoE ---- */

/* 一块行：专家 expert（等于 experts 的是共享专家）的 [row, row + rows)，rows 为 0 的是空块。 */
typedef struct {
  int32_t expert, row, rows, unused;
} dso_cuda_moe_tile;

/* 稳定地按专家排行，见 moe_sort.cu。行 i < begin[experts] 是路由的，专家 e 的是 [begin[e], begin[e + 1])，
 * 专家内按 slot（= 词元 * top_k + j）递增；共享专家的行固定在 tokens * top_k 起，第 t 行是词元 t。哨兵没有行。
 * 主机只知道上界：行数 tokens * top_k（+ tokens），块数 most_tiles；实际的都在设备上。 */
typedef struct {
  int64_t tokens, top_k, experts;
  int shared;               /* 1：另有共享专家 */
  int64_t tile_rows;        /* 一块至多多少行 */
  const int64_t *index;     /* [tokens, top_k]，不小于 0；不小于 experts 的是哨兵 */
  int64_t most_tiles;       /* 以下由 dso_cuda_moe_sort_place 填 */
  int32_t *begin;           /* [experts + 1]，再接一个：路由的有几块 */
  int32_t *token;           /* [tokens * top_k + shared * tokens]：各行的词元 */
  int32_t *slot;            /* [tokens * top_k]：路由的各行在 index 里的位置 */
  int32_t *row;             /* [tokens * top_k]：slot 的行，哨兵是 -1 */
  dso_cuda_moe_tile *tiles; /* [most_tiles]，按专家递增，空块都在末尾 */
  int32_t *counts;          /* 排序自己的暂存 */
} dso_cuda_moe_routing;

/* 填 most_tiles；memory 不为 NULL 时再把各数组放进去（16 字节对齐）。返回要多少字节。 */
size_t dso_cuda_moe_sort_place(dso_cuda_moe_routing *r, void *memory);
/* experts 至多多少：直方图要放进共享内存。 */
int64_t dso_cuda_moe_most_experts(void);
cudaError_t dso_cuda_moe_sort(const dso_cuda_moe_routing *r, cudaStream_t stream);

/* 成叠的权重：专家 e 的各指针是 first 的再加 e 份间隔（字节）。list 不为 NULL 时改看设备上的 list[e]，
 * first 只用来知道类型。shared 是共享专家的（不转置、不交错），中间宽可以不同。
 * paired 时 up 是 gate 的下一个元素，列的间隔是 2，偏置同样。 */
typedef struct {
  dso_expert first;
  int64_t gate_step, down_step, gate_bias_step, down_bias_step; /* up 同 gate */
  int64_t gate_scale_step, gate_zero_step, down_scale_step, down_zero_step;
  const dso_expert *list;
  dso_expert shared;
  const float *shared_scale; /* 共享专家的逐词元系数 [tokens]；NULL 为 1 */
  int transposed, paired, gated;
} dso_cuda_moe_weights;

/* 前向：h = act(x gate, x up)，o = h down，y[t] = Σ_j weights[t, j] o[行(t, j)]（+ 共享）。
 * dtype 是计算的类型：BF16、F16 时 x、权重（量化的除外）、h、o 都是它，而且 dso_cuda_moe_fits；F32 时 h、o 是
 * fp32，其余任意。h 的路由行 [tokens * top_k, h_rs]，共享的 [tokens, shared.inner] 接在后面；o
 * [行的上界, n] 连续。 */
typedef struct {
  dso_cuda_moe_routing routing;
  int64_t k, n, widest; /* widest：路由专家中间宽的最大值 */
  dso_mat x;            /* [tokens, K] */
  const float *weights; /* [tokens, top_k] */
  dso_cuda_moe_weights w;
  dso_act act;
  dso_dtype dtype;
  void *h, *o;
  int64_t h_rs;
  void *y;     /* [tokens, N] 连续，与 x 同 dtype */
  void *saved; /* gate、up：前向写、反向读，见 dso_moe_saved（rs 是 h_rs）；NULL：不留，反向重算 */
} dso_cuda_moe_experts_params;

/* x 与主机上的 expert [count]（连同共享专家）的类型、对齐能不能以 16 位的 dtype 计算：x 与没有量化的权重都是它，
 * 各行按 16 字节读。 */
int dso_cuda_moe_fits(const dso_cuda_moe_experts_params *p, const dso_expert *expert, int64_t count,
                      dso_dtype dtype);
/* 前向的各核一块多少行：dtype、各形状已填好。0：不必排序（词元极少），routing 只用到 index，o 也不用。 */
int64_t dso_cuda_moe_tile_rows(const dso_cuda_moe_experts_params *p);
/* 从排好的行到 y。 */
cudaError_t dso_cuda_moe_experts(const dso_cuda_moe_experts_params *p, cudaStream_t stream);

/* 反向：gate、up 由 in.saved 读入或重算，A = dY down（不乘混合权重），dw = <A, h>，其余由 A 得到。in 同前向，dtype 同样选；in.h 放
 * w h，in.o 放各行的 dx [行的上界, k]，in.y 是 dx [tokens, k]，不要时为 NULL。
 * gu：各行的 gate、up（in.saved 为空时），随后换成它们的梯度；路由行距 2 h_rs，gate 之后隔 h_rs（共享的接在后面，隔 shared.inner）
 * 是 up；没有门时行距 h_rs。16 位而且 paired 时 gate、up 相间，同权重。
 * grad 与 in.w 同样写，指针换成梯度的，不要的为 NULL；类型同权重。add：路由专家的
 * 加到 gate、up、down 原有的值上。 */
typedef struct {
  dso_cuda_moe_experts_params in;
  dso_mat dy; /* [tokens, N] */
  void *gu;
  float *partial; /* [行的上界, dso_cuda_moe_backward_blocks] */
  dso_cuda_moe_weights grad;
  int add;
  float *dweights; /* [tokens, top_k] */
  float *dscale;   /* [tokens]；没有共享专家的系数时为 NULL */
} dso_cuda_moe_experts_backward_params;

/* in.dtype 为 16 位时，dy 与主机上的各专家的梯度 grad [count] 能不能也按 16 字节读写。 */
int dso_cuda_moe_backward_fits(const dso_cuda_moe_experts_backward_params *p,
                               const dso_expert *grad, int64_t count);
int64_t dso_cuda_moe_backward_tile_rows(const dso_cuda_moe_experts_backward_params *p);
int64_t dso_cuda_moe_backward_blocks(const dso_cuda_moe_experts_backward_params *p);
/* 从排好的行到各梯度；没有词元时权重的梯度也写成 0。 */
cudaError_t dso_cuda_moe_experts_backward(const dso_cuda_moe_experts_backward_params *p,
                                          cudaStream_t stream);

/* 把主机上的专家写进设备上的表：作为核的参数带过去，所以可以录进 CUDA graph。 */
cudaError_t dso_cuda_moe_table(const dso_expert *from, int64_t count, dso_expert *to,
                               cudaStream_t stream);

/* 由 logits 到权重、下标、计数：p 与 CPU 的相同；has_weight 时 logits 是 x Wᵀ（还没有加偏置）：dso_cuda_moe_logits_parts
 * 不大于 1 时在 p->logits 里，否则是 parts 里各份之和（由这个核写进 p->logits）；没有 weight 时由 x 转来。has_weight 时
 * 不读 p->x、p->weight。 */
cudaError_t dso_cuda_moe_route(const dso_moe_route_params *p, const float *parts,
                               cudaStream_t stream);
cudaError_t dso_cuda_moe_route_backward(const dso_moe_route_backward_params *p,
                                        cudaStream_t stream);
/* 词元少时 logits = x Wᵀ 的部分和分几份；0：没有 weight，或词元多，由矩阵乘写进 p->logits。 */
int64_t dso_cuda_moe_logits_parts(const dso_moe_route_params *p);
/* 份数大于 0 时的 x Wᵀ，fp32 累加，任意类型：一份时写进 p->logits，否则写进 parts [份数][tokens][experts]。也把 counts 清零，
 * dso_cuda_moe_route 接着累加。 */
cudaError_t dso_cuda_moe_logits(const dso_moe_route_params *p, float *parts, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
#endif
