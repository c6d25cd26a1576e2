/* The scan (scan.py) and its adjoint (adjoint.py) in float32. On a CPU with AVX-512: one block of tokens, of the scan by a
   rule that is known here. On any CPU: whether a sweep has settled. Built by cpu.py. */
#include "cpu.h"

#ifdef __AVX512F__
enum { MOST = 128 }; /* tokens of a block */
enum { ONES, POSITIVE, DERIVATIVE, SLOW, DELTA = 6 }; /* SLOW + gate: of the frozen weights' a */

typedef struct {
  float *a, *u;                        /* [T, O], T ≤ MOST: a has all that was written before the block */
  const float *G;                      /* [T, T], strictly lower triangular */
  const float *frozen, *target, *norm; /* [T, O], [T, O], [T]; null where neither rule nor clip looks */
  const unsigned char *write;          /* [T] */
  long a_t, u_t, G_t, frozen_t, target_t, T, O; /* strides; each O lies together */
  const float *rate, *gamma; /* of the row: one per neuron, or one for all where rate_o is 0 */
  long rate_o, gamma_o;
  float clip; /* inf for none */
  int rule, phi; /* φ's number, as in cpu.h */
} ScanArguments;

/* m ⊙ z of [ACROSS] */
INLINE void gated(const int id, int gate, const float *x, float *y) {
  if (gate == DERIVATIVE)
#pragma omp simd
    for (int j = 0; j < ACROSS; j++) y[j] = phi_prime(id, x[j]) * phi(id, x[j]);
  else
#pragma omp simd
    for (int j = 0; j < ACROSS; j++) {
      float z = phi(id, x[j]);
      y[j] = gate == POSITIVE ? (z > 0) * z : z; /* a product: NaN stays NaN */
    }
}

/* u [ACROSS] of one token */
static void values(const ScanArguments *p, const float *rate, const float *gamma, float norm, const float *a,
                   const float *frozen, const float *target, float *u) {
  const float *x = p->rule < SLOW ? a : frozen;
  int gate = p->rule % SLOW;
  if (p->rule == DELTA)
    for (int j = 0; j < ACROSS; j++) u[j] = target[j] - a[j];
  else if (p->phi == SILU) gated(SILU, gate, x, u);
  else if (p->phi == GELU) gated(GELU, gate, x, u);
  else if (p->phi == GELU_TANH) gated(GELU_TANH, gate, x, u);
  else gated(IDENTITY, gate, x, u);
  if (p->rule >= SLOW && p->rule != DELTA)
    for (int j = 0; j < ACROSS; j++) u[j] = gamma[j] * u[j] - (a[j] - frozen[j]);
  for (int j = 0; j < ACROSS; j++) u[j] *= rate[j];
  if (p->clip < INFINITY)
    for (int j = 0; j < ACROSS; j++) {
      float size = fabsf(u[j]) * norm;
      u[j] = size > p->clip ? u[j] * (p->clip / size) : u[j];
    }
}

/* Neurons o to o + n, n ≤ ACROSS, TALL tokens at a time. What earlier tokens wrote is added as one tile. */
static void neurons(const ScanArguments *p, long o, long n) {
  lanes u[MOST][WIDE] = {0}, a[WIDE] = {0}, frozen[WIDE] = {0}, target[WIDE] = {0}, sum[TALL][WIDE];
  float rate[ACROSS] = {0}, gamma[ACROSS] = {0};
  for (long j = 0; j < n; j++) rate[j] = p->rate[(o + j) * p->rate_o], gamma[j] = p->gamma[(o + j) * p->gamma_o];
  for (long t0 = 0; t0 < p->T; t0 += TALL) {
    long rows = p->T - t0 < TALL ? p->T - t0 : TALL, from = 0;
    if (rows == TALL) {
      tile(sum, p->G + t0 * p->G_t, p->G_t, 1, (float *)u, ACROSS, t0, WIDE);
      from = t0;
    } else
      memset(sum, 0, sizeof sum);
    for (long t = t0; t < t0 + rows; t++) {
      memcpy(a, p->a + t * p->a_t + o, n * sizeof(float));
      for (int j = 0; j < WIDE; j++) {
        lanes more = sum[t - t0][j];
        for (long s = from; s < t; s++) more += p->G[t * p->G_t + s] * u[s][j];
        a[j] += more;
      }
      memcpy(p->a + t * p->a_t + o, a, n * sizeof(float));
      if (p->write[t]) {
        if (p->frozen) memcpy(frozen, p->frozen + t * p->frozen_t + o, n * sizeof(float));
        if (p->target) memcpy(target, p->target + t * p->target_t + o, n * sizeof(float));
        values(p, rate, gamma, p->norm ? p->norm[t] : 0, (float *)a, (float *)frozen, (float *)target, (float *)u[t]);
      }
      memcpy(p->u + t * p->u_t + o, u[t], n * sizeof(float));
    }
  }
}

void scan_block(const ScanArguments *p, int threads) {
#pragma omp parallel for num_threads(threads)
  for (long o = 0; o < p->O; o += ACROSS) neurons(p, o, p->O - o < ACROSS ? p->O - o : ACROSS);
}
/* The adjoint: ā = c + slope ⊙ b, b_t += Σ_{r>t} G_rt ā_r, from the last token of the block to the first. */
typedef struct {
  const float *c, *slope; /* [T, O], T ≤ MOST; c is null where nothing came from above */
  const float *G;         /* [T, T]; only what lies below its diagonal is read */
  float *b, *above;       /* [T, O]: b has all that comes from after the block; above is ā */
  long c_t, slope_t, G_t, b_t, above_t, T, O; /* strides; each O lies together */
} AdjointArguments;

/* Neurons o to o + n, n ≤ ACROSS, TALL tokens at a time. What later tokens give back is added as one tile. */
static void back(const AdjointArguments *p, long o, long n) {
  lanes above[MOST][WIDE] = {0}, c[WIDE] = {0}, slope[WIDE] = {0}, b[WIDE] = {0}, sum[TALL][WIDE];
  for (long t1 = p->T; t1 > 0; t1 -= TALL) {
    long rows = t1 < TALL ? t1 : TALL, t0 = t1 - rows, end = p->T;
    if (rows == TALL) {
      tile(sum, p->G + t1 * p->G_t + t0, 1, p->G_t, (float *)above[t1], ACROSS, p->T - t1, WIDE);
      end = t1;
    } else
      memset(sum, 0, sizeof sum);
    for (long t = t1 - 1; t >= t0; t--) {
      memcpy(b, p->b + t * p->b_t + o, n * sizeof(float));
      memcpy(slope, p->slope + t * p->slope_t + o, n * sizeof(float));
      if (p->c) memcpy(c, p->c + t * p->c_t + o, n * sizeof(float));
      for (int j = 0; j < WIDE; j++) {
        lanes more = sum[t - t0][j];
        for (long r = t + 1; r < end; r++) more += p->G[r * p->G_t + t] * above[r][j];
        b[j] += more;
        above[t][j] = c[j] + slope[j] * b[j];
      }
      memcpy(p->b + t * p->b_t + o, b, n * sizeof(float));
      memcpy(p->above + t * p->above_t + o, above[t], n * sizeof(float));
    }
  }
}

void adjoint_block(const AdjointArguments *p, int threads) {
#pragma omp parallel for num_threads(threads)
  for (long o = 0; o < p->O; o += ACROSS) back(p, o, p->O - o < ACROSS ? p->O - o : ACROSS);
}
#endif

/* 1 if no column of [T, O] has changed by more than tolerance times its largest entry, 0 otherwise and with a NaN */
int settled(const float *now, const float *old, long T, long O, float tolerance) {
  for (long o = 0; o < O; o += 64) {
    float change[64] = {0}, scale[64] = {0};
    long n = O - o < 64 ? O - o : 64;
    int bad = 0;
    for (long t = 0; t < T; t++)
      for (long j = 0; j < n; j++) {
        float x = now[t * O + o + j], d = fabsf(x - old[t * O + o + j]);
        bad |= !(d - d == 0);
        change[j] = d > change[j] ? d : change[j];
        scale[j] = fabsf(x) > scale[j] ? fabsf(x) : scale[j];
      }
    for (long j = 0; j < n; j++) bad |= !(change[j] <= tolerance * scale[j]);
    if (bad) return 0;
  }
  return 1;
}
