/* sample_tokens：每行按概率抽一个词元。每任务一行。 */
#include "sample.h"

static dso_plan plan(const void *params, const dso_isa *isa) {
  const dso_sample_tokens_params *p = params;
  (void)isa;
  return (dso_plan){1, 0, dso_pick_scratch(p->vocab), 4 * p->rows * p->vocab};
}

static int64_t tasks(const void *params, int64_t stage) {
  (void)stage;
  return ((const dso_sample_tokens_params *)params)->rows;
}

static void run(const dso_ctx *ctx, int64_t row) {
  const dso_sample_tokens_params *p = ctx->params;
  dso_weights w = {.n = p->vocab,
                   .p = dso_at(p->probs.data, p->probs.dtype, row * p->probs.rs),
                   .p_dtype = p->probs.dtype,
                   .without = -1};
  p->token[row] = dso_pick(ctx->isa, &w, p->uniform[row], ctx->worker);
}

const dso_op dso_sample_tokens = {"sample_tokens", plan, tasks, run};
