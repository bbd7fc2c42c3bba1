/* moe_sort、moe_experts 及其反向：与 double 的直白写法比较。缓冲区大小恰好，越界由 ASan 看到。 */
#include <stdio.h>
#include <string.h>

#include "dso.h"
#include "harness.h"

enum { MOST = 8 };

typedef struct {
  int64_t tokens, k, n, experts, top_k, inner;
  int transposed, paired, gated, biased;
  dso_act_kind act;
} shape;

/* 一组专家与输入；rows 为排序后的行数。 */
typedef struct {
  shape s;
  dso_dtype dtype;
  int64_t rows, begin[MOST + 1], *token, *slot, at[3 * (MOST + 1)];
  float *weight;
  buf x, gate, up, down, gate_bias, up_bias, down_bias;
  dso_expert expert[MOST];
  dso_moe_inputs in;
} problem;

static int64_t width_of(const shape *s) { return s->paired ? 2 * s->inner : s->inner; }

static dso_mat mat_at(const buf *b, int64_t each, int64_t e, int64_t rs) {
  return (dso_mat){dso_at(b->data, b->dtype, e * each), rs, b->dtype};
}

static void build_experts(problem *p) {
  const shape *s = &p->s;
  int64_t width = width_of(s), up_size = s->k * width, down_size = s->n * s->inner;
  double scale = 1.0 / sqrt((double)dso_max(1, s->k));
  p->gate = new_random(p->dtype, s->experts * up_size, scale);
  p->up = new_random(p->dtype, s->gated && !s->paired ? s->experts * up_size : 0, scale);
  p->down = new_random(p->dtype, s->experts * down_size, 1.0 / sqrt((double)dso_max(1, s->inner)));
  p->gate_bias = new_random(p->dtype, s->biased ? s->experts * width : 0, 1.0);
  p->up_bias = new_random(p->dtype, s->biased && p->up.n ? s->experts * width : 0, 1.0);
  p->down_bias = new_random(p->dtype, s->biased ? s->experts * s->n : 0, 1.0);
  for (int64_t e = 0; e < s->experts; e++) {
    dso_expert *x = &p->expert[e];
    memset(x, 0, sizeof *x);
    x->inner = s->inner, x->bias_dtype = p->dtype, x->bias_step = 1;
    x->gate = mat_at(&p->gate, up_size, e, s->transposed ? width : s->k);
    x->up = s->gated && !s->paired ? mat_at(&p->up, up_size, e, x->gate.rs)
                                   : (dso_mat){NULL, 0, p->dtype};
    x->down = mat_at(&p->down, down_size, e, s->transposed ? s->n : s->inner);
    if (!s->biased) continue;
    x->gate_bias = dso_at(p->gate_bias.data, p->dtype, e * width);
    if (x->up.data) x->up_bias = dso_at(p->up_bias.data, p->dtype, e * width);
    x->down_bias = dso_at(p->down_bias.data, p->dtype, e * s->n);
  }
}

/* 堆上大小恰好的数组，与 buf 一样由 free_all 释放。 */
static void *exact(int64_t count, size_t size) {
  return new_zeros(DSO_I8, count * (int64_t)size).data;
}

static problem build(const shape *s, dso_dtype dtype) {
  problem p = {.s = *s, .dtype = dtype};
  int64_t most = s->tokens * s->top_k, *index = exact(most, sizeof *index);
  for (int64_t i = 0; i < most; i++) index[i] = random_below(s->experts + 1); /* 含哨兵 */
  p.token = exact(most, sizeof *p.token), p.slot = exact(most, sizeof *p.slot);
  dso_moe_sort(index, s->tokens, s->top_k, s->experts, p.begin, p.token, p.slot);
  p.rows = p.begin[s->experts];
  int64_t kept = 0;
  for (int64_t i = 0; i < most; i++) kept += index[i] < s->experts;
  check(kept == p.rows, "moe_sort 的行数");
  for (int64_t e = 0; e < s->experts; e++)
    for (int64_t i = p.begin[e]; i < p.begin[e + 1]; i++)
      check(index[p.slot[i]] == e && p.token[i] == p.slot[i] / s->top_k &&
                (i == p.begin[e] || p.slot[i] > p.slot[i - 1]),
            "moe_sort 第 %lld 行", (long long)i);
  p.weight = exact(p.rows, sizeof *p.weight);
  for (int64_t i = 0; i < p.rows; i++) p.weight[i] = (float)random_normal();
  p.x = new_random(dtype, s->tokens * s->k, 1.0);
  build_experts(&p);
  return p;
}

/* p 不再移动之后才填：in 里是指向它的指针。 */
static void connect(problem *p, int backward) {
  p->in = (dso_moe_inputs){.tokens = p->s.tokens,
                           .k = p->s.k,
                           .n = p->s.n,
                           .experts = p->s.experts,
                           .x = {p->x.data, p->s.k, p->dtype},
                           .expert = p->expert,
                           .begin = p->begin,
                           .token = p->token,
                           .weight = p->weight,
                           .act = {p->s.act, 1.702f, 0.8f},
                           .transposed = p->s.transposed,
                           .gated = p->s.gated,
                           .paired = p->s.paired};
  dso_moe_prepare(&p->in, backward, p->at);
}

/* ---- double 参考 ---- */

/* 上投影第 i 个（up 为 1 时是 up 的）对输入 k 的权重在 gate / up 缓冲里的下标。 */
static int64_t up_index(const shape *s, int64_t e, int64_t i, int64_t k, int is_up) {
  int64_t width = width_of(s), column = s->paired ? 2 * i + is_up : i, base = e * s->k * width;
  return base + (s->transposed ? k * width + column : column * s->k + k);
}

static int64_t down_index(const shape *s, int64_t e, int64_t n, int64_t i) {
  int64_t base = e * s->n * s->inner;
  return base + (s->transposed ? i * s->n + n : n * s->inner + i);
}

static int64_t bias_index(const shape *s, int64_t e, int64_t i, int is_up) {
  return e * width_of(s) + (s->paired ? 2 * i + is_up : i);
}

static const buf *up_buf(const problem *p, int is_up) {
  return is_up && !p->s.paired ? &p->up : &p->gate;
}

static double projected(const problem *p, int64_t e, int64_t i, int64_t t, int is_up) {
  const shape *s = &p->s;
  const buf *w = up_buf(p, is_up);
  double sum = 0.0;
  for (int64_t k = 0; k < s->k; k++)
    sum += get(&p->x, t * s->k + k) * get(w, up_index(s, e, i, k, is_up));
  if (s->biased)
    sum += get(is_up && !s->paired ? &p->up_bias : &p->gate_bias, bias_index(s, e, i, is_up));
  return sum;
}

static double sigmoid(double x) { return 1.0 / (1.0 + exp(-x)); }

static double act_value(dso_act_kind kind, double x, double *slope) {
  double r = x > 0 ? x : 0, s = sigmoid(x), cdf = 0.5 * erfc(-x / sqrt(2.0));
  switch (kind) {
    case DSO_GELU:
      *slope = cdf + x * exp(-x * x / 2) / sqrt(2 * acos(-1.0));
      return x * cdf;
    case DSO_GELU_TANH: {
      double c = 2 * sqrt(2 / acos(-1.0)), q = sigmoid(c * (x + 0.044715 * x * x * x));
      *slope = q + x * q * (1 - q) * c * (1 + 3 * 0.044715 * x * x);
      return x * q;
    }
    case DSO_RELU:
      *slope = x > 0;
      return r;
    case DSO_RELU2:
      *slope = 2 * r;
      return r * r;
    default:
      *slope = s + x * s * (1 - s);
      return x * s;
  }
}

/* h 与它对 g、u 的导数。 */
static double gated(const problem *p, double g, double u, double *dg, double *du) {
  const dso_act *act = &p->in.act;
  double slope;
  if (dso_act_clips(act->kind)) {
    int silu = act->kind == DSO_CLIPPED_SILU;
    double limit = act->limit, alpha = silu ? 1 : act->alpha, x = g < limit ? g : limit;
    double y = (u < -limit ? -limit : u > limit ? limit : u) + !silu, s = sigmoid(alpha * x);
    *dg = g <= limit ? y * (s + alpha * x * s * (1 - s)) : 0;
    *du = u >= -limit && u <= limit ? x * s : 0;
    return x * s * y;
  }
  double a = act_value(act->kind, g, &slope);
  *dg = slope * (p->s.gated ? u : 1), *du = a;
  return p->s.gated ? a * u : a;
}

static void forward_reference(const problem *p, double *y) {
  const shape *s = &p->s;
  for (int64_t e = 0; e < s->experts; e++)
    for (int64_t r = p->begin[e]; r < p->begin[e + 1]; r++) {
      int64_t t = p->token[r];
      for (int64_t n = 0; s->biased && n < s->n; n++)
        y[t * s->n + n] += p->weight[r] * get(&p->down_bias, e * s->n + n);
      for (int64_t i = 0; i < s->inner; i++) {
        double dg, du, u = s->gated ? projected(p, e, i, t, 1) : 1;
        double h = gated(p, projected(p, e, i, t, 0), u, &dg, &du);
        for (int64_t n = 0; n < s->n; n++)
          y[t * s->n + n] += p->weight[r] * h * get(&p->down, down_index(s, e, n, i));
      }
    }
}

typedef struct {
  double *dx, *dweight, *gate, *up, *down, *gate_bias, *up_bias, *down_bias;
} grads;

/* 一行、一个中间元素对各梯度的贡献。 */
static void back_one(const problem *p, const buf *dy, int64_t e, int64_t r, int64_t i,
                     const grads *to) {
  const shape *s = &p->s;
  int64_t t = p->token[r];
  double dg, du, u = s->gated ? projected(p, e, i, t, 1) : 1, a = 0;
  double h = gated(p, projected(p, e, i, t, 0), u, &dg, &du);
  for (int64_t n = 0; n < s->n; n++) {
    double grad = get(dy, t * s->n + n);
    a += grad * get(&p->down, down_index(s, e, n, i));
    to->down[down_index(s, e, n, i)] += p->weight[r] * grad * h;
  }
  to->dweight[r] += a * h;
  for (int is_up = 0; is_up <= s->gated; is_up++) {
    double d = p->weight[r] * a * (is_up ? du : dg);
    double *w = is_up && !s->paired ? to->up : to->gate;
    double *b = is_up && !s->paired ? to->up_bias : to->gate_bias;
    for (int64_t k = 0; k < s->k; k++) {
      int64_t at = up_index(s, e, i, k, is_up);
      w[at] += d * get(&p->x, t * s->k + k);
      to->dx[t * s->k + k] += d * get(up_buf(p, is_up), at);
    }
    if (s->biased) b[bias_index(s, e, i, is_up)] += d;
  }
}

static void backward_reference(const problem *p, const buf *dy, const grads *to) {
  const shape *s = &p->s;
  for (int64_t e = 0; e < s->experts; e++)
    for (int64_t r = p->begin[e]; r < p->begin[e + 1]; r++) {
      for (int64_t n = 0; s->biased && n < s->n; n++) {
        double grad = get(dy, p->token[r] * s->n + n);
        to->dweight[r] += grad * get(&p->down_bias, e * s->n + n);
        to->down_bias[e * s->n + n] += p->weight[r] * grad;
      }
      for (int64_t i = 0; i < s->inner; i++) back_one(p, dy, e, r, i, to);
    }
}

/* ---- 用例 ---- */

static void forward_case(const dso_isa *isa, const shape *s, dso_dtype dtype) {
  problem p = build(s, dtype);
  connect(&p, 0);
  buf y = new_buf(dtype, s->tokens * s->n), *outs[] = {&y};
  dso_moe_params params = {.in = p.in, .y = y.data};
  double *want = doubles(y.n);
  forward_reference(&p, want);
  char label[96];
  snprintf(label, sizeof label, "%s moe_experts %s T=%lld act=%d", isa->name, dtype_name(dtype),
           (long long)s->tokens, (int)s->act);
  execute(label, &dso_moe_experts, &params, isa, outs, 1);
  check_close(label, &y, want, tolerance(dtype), 4.0);
}

static void *grad_at(const buf *b, int64_t each, int64_t e) {
  return b->n ? dso_at_mut(b->data, b->dtype, e * each) : NULL;
}

/* 前向留给反向的 gate、up：最后一个专家当作共享专家来存放（它的行本来就在末尾），位置多出来的也要写得下。 */
static dso_moe_saved saved_by_forward(const dso_isa *isa, problem *p) {
  const shape *s = &p->s;
  int64_t times = s->gated ? 2 : 1, routed = s->experts - 1;
  dso_moe_saved saved = {NULL, s->inner + 3, routed, times * p->begin[routed] * (s->inner + 3)};
  int64_t count = saved.shared_at + times * (p->rows - p->begin[routed]) * s->inner;
  buf kept = new_buf(p->dtype, count), y = new_buf(p->dtype, s->tokens * s->n), *outs[] = {&y};
  saved.data = kept.data;
  connect(p, 0);
  dso_moe_params params = {p->in, y.data, saved};
  execute("moe_experts 留下 gate、up", &dso_moe_experts, &params, isa, outs, 1);
  return saved;
}

static void backward_case(const dso_isa *isa, const shape *s, dso_dtype dtype, int kept) {
  problem p = build(s, dtype);
  dso_moe_saved saved = {0};
  if (kept) saved = saved_by_forward(isa, &p);
  connect(&p, 1);
  int64_t width = width_of(s), up_size = s->k * width, down_size = s->n * s->inner;
  buf dy = new_random(dtype, s->tokens * s->n, 1.0), dx = new_buf(dtype, p.x.n),
      dw = new_buf(DSO_F32, p.rows), gate = new_buf(dtype, p.gate.n), up = new_buf(dtype, p.up.n),
      down = new_buf(dtype, p.down.n), gate_bias = new_buf(dtype, p.gate_bias.n),
      up_bias = new_buf(dtype, p.up_bias.n), down_bias = new_buf(dtype, p.down_bias.n);
  dso_expert_grad grad[MOST];
  for (int64_t e = 0; e < s->experts; e++)
    grad[e] = (dso_expert_grad){.gate = grad_at(&gate, up_size, e),
                                .up = grad_at(&up, up_size, e),
                                .down = grad_at(&down, down_size, e),
                                .gate_bias = grad_at(&gate_bias, width, e),
                                .up_bias = grad_at(&up_bias, width, e),
                                .down_bias = grad_at(&down_bias, s->n, e),
                                .gate_rs = p.expert[e].gate.rs,
                                .up_rs = p.expert[e].up.rs,
                                .down_rs = p.expert[e].down.rs};
  int64_t *task_at = exact(3 * s->experts + 1, sizeof *task_at);
  dso_moe_backward_params params = {.in = p.in,
                                    .dy = {dy.data, s->n, dtype},
                                    .dx = dx.data,
                                    .dweight = dw.data,
                                    .grad = grad,
                                    .threads = 1 + random_below(4),
                                    .saved = saved};
  dso_moe_backward_prepare(&params, task_at);
  grads want = {doubles(dx.n),   doubles(dw.n),        doubles(gate.n),    doubles(up.n),
                doubles(down.n), doubles(gate_bias.n), doubles(up_bias.n), doubles(down_bias.n)};
  backward_reference(&p, &dy, &want);
  buf *outs[] = {&dx, &dw, &gate, &up, &down, &gate_bias, &up_bias, &down_bias};
  const double *exact_grads[] = {want.dx,   want.dweight,   want.gate,    want.up,
                                 want.down, want.gate_bias, want.up_bias, want.down_bias};
  char label[96];
  snprintf(label, sizeof label, "%s moe_experts_backward %s T=%lld act=%d 留下=%d", isa->name,
           dtype_name(dtype), (long long)s->tokens, (int)s->act, kept);
  execute(label, &dso_moe_experts_backward, &params, isa, outs, 8);
  for (int i = 0; i < 8; i++)
    check_close(label, outs[i], exact_grads[i], 4 * tolerance(dtype), 8.0);
}

static shape random_shape(int trial) {
  shape s = {.tokens = random_below(trial % 6 ? 12 : 130),
             .k = 1 + random_below(40),
             .n = 1 + random_below(40),
             .experts = 1 + random_below(MOST),
             .inner = random_below(36),
             .act = (dso_act_kind)(trial % (DSO_CLIPPED_SILU + 1))};
  s.top_k = 1 + random_below(3);
  s.transposed = trial & 1, s.biased = (int)random_below(2);
  s.gated = dso_act_clips(s.act) || random_below(2);
  s.paired = s.transposed && s.gated && random_below(2);
  return s;
}

void test_moe(void) {
  const dso_isa *isas[8];
  int count = list_isas(isas, 8);
  const dso_dtype dtypes[] = {DSO_F32, DSO_BF16, DSO_F16};
  for (int i = 0; i < count; i++)
    for (int trial = 0; trial < 36; trial++) {
      shape s = random_shape(trial);
      forward_case(isas[i], &s, dtypes[trial % 3]);
      backward_case(isas[i], &s, dtypes[trial % 3], 0);
      backward_case(isas[i], &s, dtypes[trial % 3], 1);
      free_all();
    }
}
