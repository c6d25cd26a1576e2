/* What cpu.c, tiles.c and scan.c share. */
#include <math.h>
#include <omp.h>
#include <string.h>

typedef float lanes __attribute__((vector_size(64), aligned(4)));

#define INLINE static inline __attribute__((always_inline))

/* e^x with a relative error of (2 + |x|) 2^-24, 0 below 2^-126; the library's expf is not vectorised without
   giving up NaN */
static inline float exponential(float x) {
  x = x > 89 ? 89 : x < -88 ? -88 : x; /* NaN stays */
  float n = rintf(x * 1.44269504f), r = x - n * 0.693147181f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1;
  int bits = ((int)n + 127) << 23;
  float power;
  memcpy(&power, &bits, sizeof power);
  return p * power;
}

/* φ of a linear and its derivative, by φ's number: that of IN_C in values.py. A loop is vectorised where id is constant. */
enum { IDENTITY, SILU, GELU, GELU_TANH };

/* The share of a normal distribution below a, given e = e^(-a²/2). The smaller of the two tails is e times a polynomial
   in t, with a relative error of 1.4e-8: so a negative a has the precision of the tail, not that of 1. */
INLINE float below(float a, float e) {
  float t = 1 / (1 + 0.3f * fabsf(a));
  float p = -2.058465406e-2f;
  p = p * t + 1.122171134e-1f;
  p = p * t - 2.276795506e-1f;
  p = p * t + 1.910420656e-1f;
  p = p * t - 7.877775282e-2f;
  p = p * t + 9.579327703e-2f;
  p = p * t + 7.852186263e-2f;
  p = p * t + 1.102055460e-1f;
  p = p * t + 1.195756122e-1f;
  p = p * t + 1.196864843e-1f;
  p = p * t * e;
  return a < 0 ? p : 1 - p;
}

INLINE float phi(const int id, float a) {
  switch (id) {
    case SILU: return a / (1 + exponential(-a));
    case GELU: return a * below(a, exponential(-0.5f * a * a));
    case GELU_TANH: /* (1 + tanh w) / 2 = 1 / (1 + e^-2w) */
      return a / (1 + exponential(-a * (1.595769122f + 0.0713548163f * a * a)));
    default: return a;
  }
}

INLINE float phi_prime(const int id, float a) {
  float e, s;
  switch (id) {
    case SILU:
      s = 1 / (1 + exponential(-a));
      return s * (1 + a * (1 - s));
    case GELU:
      e = exponential(-0.5f * a * a);
      return below(a, e) + 0.3989422804f * a * e;
    case GELU_TANH:
      a = a > 9 ? 9 : a < -9 ? -9 : a; /* the slope is 1 or 0 there, and products of a, e and s stay finite */
      e = exponential(-a * (1.595769122f + 0.0713548163f * a * a)), s = 1 / (1 + e);
      return s + a * s * (e * s) * (1.595769122f + 0.214064449f * a * a);
    default: return 1;
  }
}

/* this thread's share of n */
static inline void share(long n, long *from, long *to) {
  long t = omp_get_thread_num(), T = omp_get_num_threads();
  *from = n * t / T, *to = n * (t + 1) / T;
}

/* A tile is TALL rows of one factor, broadcast, by up to WIDE vectors of the other: its sums stay in registers, and every
   BLOCK terms they are added up apart, so that rounding does not grow with the length. */
#ifdef __AVX512F__
enum { TALL = 8, WIDE = 3, LANES = 16, ACROSS = WIDE * LANES, BLOCK = 128 };

INLINE void tile(lanes sum[TALL][WIDE], const float *A, long lda, long ka, const float *P, long ldp, long K, const int n) {
  for (int r = 0; r < TALL; r++)
    for (int j = 0; j < n; j++) sum[r][j] = (lanes){0};
  for (long k = 0; k < K;) {
    lanes s[TALL][WIDE] = {0};
    for (long end = k + BLOCK < K ? k + BLOCK : K; k < end; k++) {
      lanes x[WIDE];
      for (int j = 0; j < n; j++) x[j] = *(const lanes *)(P + k * ldp + j * LANES);
      for (int r = 0; r < TALL; r++)
        for (int j = 0; j < n; j++) s[r][j] += A[r * lda + k * ka] * x[j];
    }
    for (int r = 0; r < TALL; r++)
      for (int j = 0; j < n; j++) sum[r][j] += s[r][j];
  }
}

INLINE void any_tile(lanes sum[TALL][WIDE], const float *A, long lda, long ka, const float *P, long ldp, long K, long n) {
  if (n == 3) tile(sum, A, lda, ka, P, ldp, K, 3);
  else if (n == 2) tile(sum, A, lda, ka, P, ldp, K, 2);
  else tile(sum, A, lda, ka, P, ldp, K, 1);
}
#endif
