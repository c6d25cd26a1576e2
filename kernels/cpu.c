/* On a CPU: products of a few rows, and a whole decode step, that stream every weight once. float32, or bfloat16 bits.
   Built by cpu.py. Shapes: M rows, D model width, F MLP width, H heads, KH key/value heads, E head width,
   S cache slots, V vocabulary, O out, I in, R slots of a log, n slots in use. All row-major. */
#include "cpu.h"

/* ΔW of one linear: y += Σ_j w_j (k_j·h + bias_j) u_j. Also what its rule needs of this token, and the event it makes. */
typedef struct {
  float *U, *K, *bias, *w;  /* [M, R, O], [M, R, I], [M, R] or NULL, [M, n] or NULL: all 1 */
  long *birth;              /* [M, R] */
  float *h, *square;        /* out: [M, I], [M] ‖h‖² */
  float *frozen, *a;        /* out: [M, O] W h + b, and with ΔW */
  float *c;                 /* scratch [M, n] */
  const float *u, *scale;   /* the event: [M, O], and [M], with which k = scale h; the bias key is scale, too */
  long O, I, R, n;          /* n: slots in use */
  long slot, event;         /* where the event belongs, and its number from 0 */
} Fast;

static inline float from_bfloat16(unsigned short bits) {
  unsigned int wide = (unsigned int)bits << 16;
  float x;
  memcpy(&x, &wide, sizeof x);
  return x;
}

static inline unsigned short to_bfloat16(float x) {
  unsigned int bits;
  memcpy(&bits, &x, sizeof bits);
  if (x != x) return 0x7fc0;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16; /* to nearest, ties to even */
}

INLINE float total(lanes s) {
  typedef float half __attribute__((vector_size(32)));
  typedef float quarter __attribute__((vector_size(16)));
  half h[2];
  memcpy(h, &s, sizeof s);
  h[0] += h[1];
  quarter q[2];
  memcpy(q, h, sizeof q);
  q[0] += q[1];
  return (q[0][0] + q[0][1]) + (q[0][2] + q[0][3]);
}

/* How a fetch ahead treats the caches, measured: AMD's processors stream fastest past them; Intel's reach half of their
   stream that way (a Xeon with AMX: 11 GB/s of 24, and 25 through the caches). */
#if defined(__znver1__) || defined(__znver2__) || defined(__znver3__) || defined(__znver4__) || defined(__znver5__)
enum { CACHES = 0 };
#else
enum { CACHES = 3 };
#endif

INLINE float dot(const float *w, const float *x, long I, const int ahead) {
  lanes s0 = {0}, s1 = {0}, s2 = {0}, s3 = {0};
  long i = 0;
  for (; i + 64 <= I; i += 64) {
    if (ahead)
      for (int line = 0; line < 64; line += 16) __builtin_prefetch(w + i + ahead + line, 0, CACHES);
    s0 += *(const lanes *)(w + i) * *(const lanes *)(x + i);
    s1 += *(const lanes *)(w + i + 16) * *(const lanes *)(x + i + 16);
    s2 += *(const lanes *)(w + i + 32) * *(const lanes *)(x + i + 32);
    s3 += *(const lanes *)(w + i + 48) * *(const lanes *)(x + i + 48);
  }
  float sum = total((s0 + s1) + (s2 + s3));
  for (; i < I; i++) sum += w[i] * x[i];
  return sum;
}

/* Of w that is read from memory, once: 4 KB ahead of it, past the end of a page where the processor's own prefetch stops. */
enum { AHEAD = 1024 };

typedef unsigned short half16 __attribute__((vector_size(32), aligned(2)));
typedef unsigned int bits16 __attribute__((vector_size(64), aligned(4)));

static inline lanes widen(const unsigned short *w) {
  return (lanes)(__builtin_convertvector(*(const half16 *)w, bits16) << 16);
}

INLINE float dot_bfloat16(const unsigned short *w, const float *x, long I, const int ahead) {
  lanes s0 = {0}, s1 = {0};
  long i = 0;
  for (; i + 32 <= I; i += 32) {
    if (ahead) __builtin_prefetch(w + i + 2 * ahead, 0, CACHES);
    s0 += widen(w + i) * *(const lanes *)(x + i);
    s1 += widen(w + i + 16) * *(const lanes *)(x + i + 16);
  }
  float sum = total(s0 + s1);
  for (; i < I; i++) sum += from_bfloat16(w[i]) * x[i];
  return sum;
}

/* c of this thread's share of the slots; a slot of weight 0 may hold anything and is not looked at */
static void coefficients(const Fast *f, const float *h, long M, long I) {
  long from, to;
  share(M * f->n, &from, &to);
  for (long j = from; j < to; j++) {
    long m = j / f->n, slot = m * f->R + j % f->n;
    float w = f->w ? f->w[j] : 1;
    f->c[j] = w == 0 ? 0 : w * (dot(f->K + slot * I, h + m * I, I, AHEAD) + (f->bias ? f->bias[slot] : 0));
  }
}

static void remember(const Fast *f, const float *h, long M) {
  if (f && omp_get_thread_num() == 0) {
    memcpy(f->h, h, M * f->I * sizeof(float));
    for (long m = 0; m < M; m++) f->square[m] = dot(h + m * f->I, h + m * f->I, f->I, 0);
  }
}

/* The threads of attention each take a range of positions, so that every key and value is read once, in order. A part is
   what one thread finds of one head: E sums of s v, the largest score, and the sum of s. */
static long parts(long keys) {
  long most = 1 + (keys - 1) / 32, T = omp_get_num_threads();
  return most < T ? most : T;
}

/* the first position that a token at this one sees; window: how many it sees, with its own, or 0: all before it */
static long first_seen(long position, long window) { return window && window <= position ? position + 1 - window : 0; }

/* How a norm rounds, and what it is: x / rms(x), rounded, times w; x / rms(x) times w or 1 + w, rounded once; or
   (x − mean) / deviation times w, plus b. */
enum { RMS, RMS1, RMS_ONCE, LAYER };

/* cap tanh(x / cap); tanhf is not vectorised. Relative error 3e-7. */
INLINE float capped(float x, float cap) {
  float t = x / cap, tt = t * t, e = exponential(-2 * fabsf(t));
  float near = t * (1 + tt * (-0.333333333f + tt * (0.133333333f + tt * (-0.0539682540f + tt * 0.0218694885f))));
  return cap * (tt < 0.09f ? near : copysignf((1 - e) / (1 + e), t));
}

#define KIND float32
#define WEIGHT float
#define VALUE(x) (x)
#define STORED(x) (x)
#define ROUNDED(x) (x)
#define VECTOR(p) (*(const lanes *)(p))
#define DOT dot
#include "decode_body.inc"

#define KIND bfloat16
#define WEIGHT unsigned short
#define VALUE from_bfloat16
#define STORED to_bfloat16
#define ROUNDED(x) from_bfloat16(to_bfloat16(x))
#define VECTOR widen
#define DOT dot_bfloat16
#include "decode_body.inc"

void gemv(const float *W, const float *x, const float *b, float *y, long O, long I, long M, int threads) {
#pragma omp parallel num_threads(threads)
  {
    long from, to;
    share(O, &from, &to);
    outputs_float32(y, W, b, x, M, O, I, from, to);
  }
}

/* the same, all in bfloat16, summed in float32 and rounded once */
void gemv_bfloat16(const unsigned short *W, const unsigned short *x, const unsigned short *b, unsigned short *y, long O,
                   long I, long M, int threads) {
#pragma omp parallel num_threads(threads)
  {
    float h[M * I];
    for (long i = 0; i < M * I; i++) h[i] = from_bfloat16(x[i]);
    long from, to;
    share(O, &from, &to);
    outputs_bfloat16(y, W, b, h, M, O, I, from, to);
  }
}

/* writes the event of every record into its slot; or none of them and 1, if a u or ‖h‖² is not finite */
int put(const Fast *f, long N, long M) {
  int bad = 0;
  for (const Fast *p = f; p < f + N; p++) {
    for (long i = 0; i < M * p->O; i++) bad |= !(p->u[i] - p->u[i] == 0);
    for (long m = 0; m < M; m++) bad |= !(p->square[m] - p->square[m] == 0);
  }
  if (bad) return 1;
  for (const Fast *p = f; p < f + N; p++)
    for (long m = 0; m < M; m++) {
      long slot = m * p->R + p->slot;
      memcpy(p->U + slot * p->O, p->u + m * p->O, p->O * sizeof(float));
      for (long i = 0; i < p->I; i++) p->K[slot * p->I + i] = p->scale[m] * p->h[m * p->I + i];
      if (p->bias) p->bias[slot] = p->scale[m];
      p->birth[slot] = p->event;
    }
  return 0;
}
