/* mtp_verify_greedy、mtp_verify_sample：逐行核对一串草稿，给出接受的个数与其后的词元。
 *
 * 每任务一行，从头看起，遇到第一个不接受的就停：后面位置的 logits 不读，其中的 NaN 也无妨。
 * greedy  草稿等于 argmax 就接受；next 是停下处的 argmax（全部接受时是多出的那个位置的）。
 * sample  u < p / q 就接受；停下处从 max(0, p - q) 抽，全部接受时从多出的那个位置的 p 抽。q 集中在
 *         草稿上（one_hot）时就是以概率 p 接受，否则从去掉草稿的 p 里抽。不论 q 怎样，结果的分布恰好是 p
 *         （Leviathan 等，arXiv 2211.17192）。用 < 而不是 <=：u 取得到 0，p 为 0 的词元不能被接受。
 */
#include <float.h>
#include <math.h>

#include "sample.h"

enum { CHUNK = 1024 }; /* argmax 每次转成 fp32 的元素数 */

static const void *position(const dso_positions *x, int64_t row, int64_t i, int64_t at) {
  return dso_at(x->data, x->dtype, row * x->rs + i * x->ps + at);
}

static int64_t tasks(const void *params, int64_t stage) {
  (void)stage;
  return ((const dso_mtp_rows *)params)->rows; /* 两种参数都以 dso_mtp_rows 开头 */
}

static int64_t draft_count(const dso_mtp_rows *in, int64_t row) {
  return in->draft_len ? in->draft_len[row] : in->drafts;
}

static void reject_row(const dso_mtp_rows *in, int64_t row, int64_t i, dso_mtp_fault fault) {
  in->accepted[row] = fault, in->next[row] = -1 - i;
}

/* ---- 贪心 ---- */

static dso_plan greedy_plan(const void *params, const dso_isa *isa) {
  const dso_mtp_verify_greedy_params *p = params;
  (void)isa;
  return (dso_plan){1, 0, CHUNK * sizeof(float), p->in.rows * (p->in.drafts + 1) * p->in.vocab};
}

/* 最大值的下标，相同时取最小的；有 NaN 时返回 -1。 */
static int64_t argmax(const dso_isa *isa, const void *x, dso_dtype dtype, int64_t n, float *v) {
  float best = -INFINITY;
  int64_t from = 0;
  for (int64_t i = 0; i < n; i += CHUNK) {
    isa->to_f32(v, dso_at(x, dtype, i), dtype, dso_min(CHUNK, n - i));
    float top = isa->vmax(v, dso_min(CHUNK, n - i));
    if (top != top) return -1;
    if (top > best) best = top, from = i;
  }
  isa->to_f32(v, dso_at(x, dtype, from), dtype, dso_min(CHUNK, n - from));
  int64_t at = 0;
  while (v[at] != best) at++;
  return from + at;
}

static void greedy_run(const dso_ctx *ctx, int64_t row) {
  const dso_mtp_verify_greedy_params *p = ctx->params;
  const int64_t *draft = p->in.draft + row * p->in.drafts, len = draft_count(&p->in, row);
  for (int64_t i = 0; i <= len; i++) {
    int64_t best = argmax(ctx->isa, position(&p->logits, row, i, 0), p->logits.dtype, p->in.vocab,
                          ctx->worker);
    if (best < 0) {
      reject_row(&p->in, row, i, DSO_MTP_BAD_TARGET);
      return;
    }
    p->in.accepted[row] = i, p->in.next[row] = best;
    if (i < len && draft[i] != best) return;
  }
}

const dso_op dso_mtp_verify_greedy = {"mtp_verify_greedy", greedy_plan, tasks, greedy_run};

/* ---- 采样 ---- */

static dso_plan sample_plan(const void *params, const dso_isa *isa) {
  const dso_mtp_verify_sample_params *p = params;
  (void)isa;
  return (dso_plan){1, 0, dso_pick_scratch(p->in.vocab), 4 * p->in.rows * p->in.vocab};
}

static float value_at(const dso_isa *isa, const dso_positions *x, int64_t row, int64_t i,
                      int64_t at) {
  float v;
  isa->to_f32(&v, position(x, row, i, at), x->dtype, 1);
  return v;
}

/* 从头接受的个数；出错时是 -1 - 位置，*fault 为原因。 */
static int64_t accept(const dso_ctx *ctx, int64_t row, dso_mtp_fault *fault) {
  const dso_mtp_verify_sample_params *p = ctx->params;
  const int64_t *draft = p->in.draft + row * p->in.drafts, len = draft_count(&p->in, row);
  const double *u = p->uniform + row * (p->in.drafts + 1);
  for (int64_t i = 0; i < len; i++) {
    float prob = value_at(ctx->isa, &p->target, row, i, draft[i]), q = 1.0f;
    if (!p->one_hot) q = value_at(ctx->isa, &p->proposal, row, i, draft[i]);
    int target_ok = prob >= 0.0f && prob <= FLT_MAX, draft_ok = q > 0.0f && q <= FLT_MAX;
    *fault = target_ok ? DSO_MTP_BAD_DRAFT : DSO_MTP_BAD_TARGET;
    if (!target_ok || !draft_ok) return -1 - i;
    if (!(u[i] * q < prob)) return i;
  }
  return len;
}

static void sample_run(const dso_ctx *ctx, int64_t row) {
  const dso_mtp_verify_sample_params *p = ctx->params;
  dso_mtp_fault fault = DSO_MTP_BAD_TARGET;
  int64_t n = accept(ctx, row, &fault);
  if (n < 0) {
    reject_row(&p->in, row, -1 - n, fault);
    return;
  }
  dso_weights w = {.n = p->in.vocab,
                   .p = position(&p->target, row, n, 0),
                   .p_dtype = p->target.dtype,
                   .without = -1};
  double u = p->uniform[row * (p->in.drafts + 1) + p->in.drafts];
  int64_t token = DSO_PICK_NOTHING;
  if (n < draft_count(&p->in, row)) {
    dso_weights rest = w;
    if (p->one_hot)
      rest.without = p->in.draft[row * p->in.drafts + n];
    else
      rest.q = position(&p->proposal, row, n, 0), rest.q_dtype = p->proposal.dtype;
    token = dso_pick(ctx->isa, &rest, u, ctx->worker);
  }
  /* 剩余处处为 0 只出于舍入（p 与 q 相同时本应接受），改从 p 抽 */
  if (token == DSO_PICK_NOTHING) token = dso_pick(ctx->isa, &w, u, ctx->worker);
  p->in.accepted[row] = n, p->in.next[row] = token;
  if (token < 0) reject_row(&p->in, row, n, DSO_MTP_BAD_TARGET);
}

const dso_op dso_mtp_verify_sample = {"mtp_verify_sample", sample_plan, tasks, sample_run};
