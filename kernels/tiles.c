/* On a CPU with AVX-512: products of many rows, and attention of many queries, in float32. Built by cpu.py.
   Shapes: M rows, O out, I in; the attention's as in cpu.c. */
#include "cpu.h"

#ifdef __AVX512F__
enum { STRIP = 64 };

/* y [M, O] = x Wᵀ + b, x [M, I] and W [O, I], O ≥ TALL. scratch: threads I ACROSS floats, aligned */
void product_rows(const float *W, const float *x, const float *b, float *y, long O, long I, long M, float *scratch,
                  int threads) {
#pragma omp parallel num_threads(threads)
  {
    float *panel = scratch + omp_get_thread_num() * I * ACROSS; /* ACROSS rows of x, [I, ACROSS] */
    long strips = (O + STRIP - 1) / STRIP, from, to, packed = -1;
    share((M + ACROSS - 1) / ACROSS * strips, &from, &to);
    for (; from < to; from++) {
      long m = from / strips * ACROSS, rows = M - m < ACROSS ? M - m : ACROSS, n = (rows + LANES - 1) / LANES;
      if (packed != m)
        for (long r = 0; r < n * LANES; r++)
          for (long i = 0; i < I; i++) panel[i * ACROSS + r] = r < rows ? x[(m + r) * I + i] : 0;
      packed = m;
      long end = from % strips * STRIP + STRIP;
      if (end > O) end = O;
      for (long o = from % strips * STRIP; o < end; o += TALL) {
        if (o > O - TALL) o = O - TALL; /* the last tile may do some outputs again */
        lanes sum[TALL][WIDE];
        any_tile(sum, W + o * I, I, 1, panel, ACROSS, I, n);
        const float *s = (const float *)sum;
        for (long r = 0; r < rows; r++)
          for (long j = 0; j < TALL; j++) y[(m + r) * O + o + j] = s[j * ACROSS + r] + (b ? b[o + j] : 0);
      }
    }
  }
}

/* y [M, O] (+)= x W, x [M, I] and W [I, O], M ≥ TALL and O ≥ ACROSS; rows of y, x and W lie ldy, ldx and ldw apart */
void product_columns(const float *W, long ldw, const float *x, long ldx, float *y, long ldy, long O, long I, long M, int add,
                     int threads) {
#pragma omp parallel num_threads(threads)
  {
    long from, to;
    share((O + ACROSS - 1) / ACROSS, &from, &to);
    for (; from < to; from++) {
      long o = from * ACROSS, skip = o > O - ACROSS ? o - (O - ACROSS) : 0; /* columns that the tile before has done */
      for (long done = 0; done < M; done += TALL) {
        long m = done > M - TALL ? M - TALL : done;
        lanes sum[TALL][WIDE];
        tile(sum, x + m * ldx, ldx, 1, W + o - skip, ldw, I, WIDE);
        for (long r = done - m; r < TALL; r++) {
          float *to_ = y + (m + r) * ldy + o - skip;
          const float *s = (const float *)sum[r];
          if (skip)
            for (long j = skip; j < ACROSS; j++) to_[j] = add ? to_[j] + s[j] : s[j];
          else
            for (int j = 0; j < WIDE; j++) {
              lanes *here = (lanes *)(to_ + j * LANES);
              *here = add ? *here + sum[r][j] : sum[r][j];
            }
        }
      }
    }
  }
}

/* Causal attention of many queries: query t of each row sees keys 0 to start + t. A unit is ACROSS queries of one head,
   side by side in the lanes. Keys are taken KEYS at a time. When a query meets a larger score, its sums so far are scaled
   down (Milakov & Gimelshein 2018; Dao et al. 2022). */
enum { KEYS = 64 };

typedef struct {
  const float *q, *k, *v;    /* [B, H, T, E], [B, KH, S, E] twice, S = start + T, S and E at least TALL */
  float *y;                  /* [B, T, H, E] */
  long q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t; /* strides; each E lies together */
  long B, H, KH, T, start, E;
  float scale;               /* of the scores */
} Attention;

static void scores(float *s, const float *K, long stride, const float *Q, long E, long from, long to, long n) {
  for (long r = from; r < to; r += TALL) {
    long first = r + TALL > to ? to - TALL : r; /* the last tile may begin before `from`: those scores are left alone */
    lanes sum[TALL][WIDE];
    any_tile(sum, K + first * stride, stride, 1, Q, ACROSS, E, n);
    for (long i = r - first; i < TALL; i++) memcpy(s + (first + i - from) * ACROSS, sum[i], n * sizeof(lanes));
  }
}

static void unit(const Attention *p, long b, long h, long t0, float *scratch) {
  const float *K = p->k + b * p->k_b + h / (p->H / p->KH) * p->k_h, *V = p->v + b * p->v_b + h / (p->H / p->KH) * p->v_h;
  long E = p->E, rows = p->T - t0 < ACROSS ? p->T - t0 : ACROSS, n = (rows + LANES - 1) / LANES, width = n * LANES;
  float *Q = scratch, *out = Q + E * ACROSS, *s = out + E * ACROSS;
  float most[ACROSS], sum[ACROSS];
  for (long r = 0; r < width; r++) {
    for (long e = 0; e < E; e++) Q[e * ACROSS + r] = r < rows ? p->scale * p->q[b * p->q_b + h * p->q_h + (t0 + r) * p->q_t + e] : 0;
    most[r] = -INFINITY, sum[r] = 0;
  }
  memset(out, 0, E * ACROSS * sizeof(float));
  for (long from = 0, end = p->start + t0 + rows; from < end; from += KEYS) {
    long keys = end - from < KEYS ? end - from : KEYS;
    scores(s, K, p->k_t, Q, E, from, from + keys, n);
    float larger[ACROSS], down[ACROSS];
    memcpy(larger, most, sizeof most);
    for (long i = 0; i < keys; i++) {
      long hidden = from + i - p->start - t0; /* queries before this one do not see the key */
      for (long r = 0; r < width && r < hidden; r++) s[i * ACROSS + r] = -INFINITY;
      for (long r = 0; r < width; r++) larger[r] = s[i * ACROSS + r] > larger[r] ? s[i * ACROSS + r] : larger[r];
    }
    int moved = 0;
    for (long r = 0; r < width; r++) moved |= larger[r] != most[r];
    if (moved) {
#pragma omp simd
      for (long r = 0; r < width; r++) down[r] = exponential(most[r] - larger[r]), sum[r] *= down[r];
      for (long e = 0; e < E; e++)
        for (long r = 0; r < width; r++) out[e * ACROSS + r] *= down[r];
      memcpy(most, larger, sizeof most);
    }
    for (long i = 0; i < keys; i++)
#pragma omp simd
      for (long r = 0; r < width; r++) {
        float w = exponential(s[i * ACROSS + r] - most[r]);
        s[i * ACROSS + r] = w, sum[r] += w;
      }
    for (long e = 0; e < E; e += TALL) {
      long first = e + TALL > E ? E - TALL : e;
      lanes more[TALL][WIDE];
      any_tile(more, V + from * p->v_t + first, 1, p->v_t, s, ACROSS, keys, n);
      for (long i = e - first; i < TALL; i++)
        for (long r = 0; r < width; r++) out[(first + i) * ACROSS + r] += ((float *)more[i])[r];
    }
  }
  for (long r = 0; r < rows; r++)
    for (long e = 0; e < E; e++) p->y[((b * p->T + t0 + r) * p->H + h) * E + e] = out[e * ACROSS + r] / sum[r];
}

/* scratch: threads ACROSS (2 E + KEYS) floats */
void attention(const Attention *p, float *scratch, int threads) {
  long blocks = (p->T + ACROSS - 1) / ACROSS, units = p->B * p->H * blocks;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (long u = 0; u < units; u++)
    unit(p, u / (p->H * blocks), u / blocks % p->H, u % blocks * ACROSS, scratch + omp_get_thread_num() * ACROSS * (2 * p->E + KEYS));
}
#endif
