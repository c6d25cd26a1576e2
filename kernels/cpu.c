/* On a CPU: products of a few rows, and a whole decode step, that stream every weight once. float32, or bfloat16 bits.
   Built by cpu.py. Shapes: M rows, D model width, F MLP width, H heads, KH key/value heads, E head width,
   S cache slots, V vocabulary, O out, I in, R slots of a log, n slots in use. All row-major. */
#include "cpu.h"

/* ΔW of one linear: y += Σ_j w_j (k_j·h + bias_j) u_j; what its rule needs of this token; and the event it makes */
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

typedef struct {
  const float *norm1, *q, *k, *v, *o, *norm2, *gate, *up, *down;
  const float *qb, *kb, *vb, *ob, *gateb, *upb, *downb; /* or NULL */
  float *K, *V;                                         /* [M, KH, S, E] */
} Layer;

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

INLINE float dot(const float *w, const float *x, long I, const int ahead) {
  lanes s0 = {0}, s1 = {0}, s2 = {0}, s3 = {0};
  long i = 0;
  for (; i + 64 <= I; i += 64) {
    if (ahead)
      for (int line = 0; line < 64; line += 16) __builtin_prefetch(w + i + ahead + line, 0, 0);
    s0 += *(const lanes *)(w + i) * *(const lanes *)(x + i);
    s1 += *(const lanes *)(w + i + 16) * *(const lanes *)(x + i + 16);
    s2 += *(const lanes *)(w + i + 32) * *(const lanes *)(x + i + 32);
    s3 += *(const lanes *)(w + i + 48) * *(const lanes *)(x + i + 48);
  }
  float sum = total((s0 + s1) + (s2 + s3));
  for (; i < I; i++) sum += w[i] * x[i];
  return sum;
}

/* Of w that is read from memory, once: 4 KB ahead of it, past the end of a page where the processor's own prefetch stops,
   and without pushing anything else out of the caches. */
enum { AHEAD = 1024 };

typedef unsigned short half16 __attribute__((vector_size(32), aligned(2)));
typedef unsigned int bits16 __attribute__((vector_size(64), aligned(4)));

static inline lanes widen(const unsigned short *w) {
  return (lanes)(__builtin_convertvector(*(const half16 *)w, bits16) << 16);
}

INLINE float dot_bfloat16(const unsigned short *w, const float *x, long I) {
  lanes s0 = {0}, s1 = {0};
  long i = 0;
  for (; i + 32 <= I; i += 32) {
    __builtin_prefetch(w + i + 2 * AHEAD, 0, 0);
    s0 += widen(w + i) * *(const lanes *)(x + i);
    s1 += widen(w + i + 16) * *(const lanes *)(x + i + 16);
  }
  float sum = total(s0 + s1);
  for (; i < I; i++) sum += from_bfloat16(w[i]) * x[i];
  return sum;
}

/* y[m, o] (+)= W[o]·x[m] + b[o] for neurons from:to */
static void product(float *y, const float *W, const float *b, const float *x, long M, long O, long I, long from,
                    long to, int add) {
  if (M == 1) { /* the usual case, without the inner loop */
    for (long o = from; o < to; o++) {
      float a = dot(W + o * I, x, I, AHEAD) + (b ? b[o] : 0);
      y[o] = add ? y[o] + a : a;
    }
    return;
  }
  for (long o = from; o < to; o++)
    for (long m = 0; m < M; m++) {
      float a = dot(W + o * I, x + m * I, I, AHEAD) + (b ? b[o] : 0);
      y[m * O + o] = add ? y[m * O + o] + a : a;
    }
}

void gemv(const float *W, const float *x, const float *b, float *y, long O, long I, long M, int threads) {
#pragma omp parallel num_threads(threads)
  {
    long from, to;
    share(O, &from, &to);
    product(y, W, b, x, M, O, I, from, to, 0);
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
    for (long o = from; o < to; o++)
      for (long m = 0; m < M; m++)
        y[m * O + o] = to_bfloat16(dot_bfloat16(W + o * I, h + m * I, I) + (b ? from_bfloat16(b[o]) : 0));
  }
}

static void rms_norm(float *y, const float *x, const float *w, long M, long D, float eps) {
  for (long m = 0; m < M; m++, x += D, y += D) {
    float s = dot(x, x, D, 0);
    s = 1 / sqrtf(s / D + eps);
    for (long i = 0; i < D; i++) y[i] = x[i] * s * w[i];
  }
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

/* keeps W h + b of neurons from:to and adds ΔW h to it in place */
static void add_fast(const Fast *f, float *y, long M, long O, long from, long to) {
  for (long m = 0; m < M; m++, y += O) {
    for (long o = from; o < to; o++) f->frozen[m * O + o] = y[o];
    const float *c = f->c + m * f->n, *w = f->w ? f->w + m * f->n : 0;
    const float *live[4];
    float by[4];
    for (long j = 0, k = 0; j < f->n || k; j++) {
      if (j < f->n) {
        if (w && w[j] == 0) continue;
        live[k] = f->U + (m * f->R + j) * O, by[k++] = c[j];
        if (k < 4 && j + 1 < f->n) continue;
      }
      for (; k < 4; k++) live[k] = live[0], by[k] = 0; /* the last few slots */
      for (long o = from; o < to; o++)
        y[o] += by[0] * live[0][o] + by[1] * live[1][o] + by[2] * live[2][o] + by[3] * live[3][o];
      k = 0;
    }
    for (long o = from; o < to; o++) f->a[m * O + o] = y[o];
  }
}

static void remember(const Fast *f, const float *h, long M) {
  if (f && omp_get_thread_num() == 0) {
    memcpy(f->h, h, M * f->I * sizeof(float));
    for (long m = 0; m < M; m++) f->square[m] = dot(h + m * f->I, h + m * f->I, f->I, 0);
  }
}

/* rows of q, k and v of this thread's share, in units of one row; rope turns rows j and j + E/2 of a head together */
static void project(const Layer *p, float *q, const float *h, const float *cosine, const float *sine, const long *slot,
                    long M, long D, long H, long KH, long E, long S) {
  long from, to, half = E / 2, turned = (H + KH) * E;
  share(turned + KH * E, &from, &to);
  for (long u = from; u < to; u++) {
    if (u >= turned) {
      long r = u - turned;
      for (long m = 0; m < M; m++)
        p->V[((m * KH + r / E) * S + slot[m]) * E + r % E] = dot(p->v + r * D, h + m * D, D, AHEAD) + (p->vb ? p->vb[r] : 0);
    } else if (u % 2 == 0) {
      long head = u / E, j = u % E / 2, is_q = head < H, row = (is_q ? head : head - H) * E + j;
      const float *W = (is_q ? p->q : p->k) + row * D, *b = is_q ? p->qb : p->kb;
      for (long m = 0; m < M; m++) {
        float *to_ = is_q ? q + (m * H + head) * E : p->K + ((m * KH + head - H) * S + slot[m]) * E;
        float left = dot(W, h + m * D, D, AHEAD) + (b ? b[row] : 0);
        float right = dot(W + half * D, h + m * D, D, AHEAD) + (b ? b[row + half] : 0);
        to_[j] = left * cosine[m * half + j] - right * sine[m * half + j];
        to_[j + half] = right * cosine[m * half + j] + left * sine[m * half + j];
      }
    }
  }
}

/* Attention is shared out by positions, so that every key and value is read once, in order. A part is what one thread
   finds of one head: E sums of s v, the largest score, and the sum of s. */
static long parts(long position) {
  long most = 1 + position / 32, T = omp_get_num_threads();
  return most < T ? most : T;
}

/* parts of n heads that share K and V, over positions from:to; rows of q lie E apart, of s S, of part E + 2 */
INLINE void heads(float *part, float *s, const float *q, const float *K, const float *V, long from, long to, long E, long S,
                  const int n) {
  float root = 1 / sqrtf(E);
  for (int j = 0; j < n; j++) part[j * (E + 2) + E] = -INFINITY;
  for (long t = from; t < to; t++) {
    for (long e = 0; e < E; e += 16) __builtin_prefetch(K + (t + 16) * E + e), __builtin_prefetch(V + t * E + e);
    for (int j = 0; j < n; j++) {
      float a = s[j * S + t] = root * dot(K + t * E, q + j * E, E, 0), *most = part + j * (E + 2) + E;
      *most = a > *most ? a : *most;
    }
  }
  for (int j = 0; j < n; j++) {
    float most = part[j * (E + 2) + E], sum = 0;
#pragma omp simd
    for (long t = from; t < to; t++) s[j * S + t] = exponential(s[j * S + t] - most);
    for (long t = from; t < to; t++) sum += s[j * S + t];
    part[j * (E + 2) + E + 1] = sum;
  }
  long e = 0;
  for (; e + 64 <= E; e += 64) {
    lanes out[n][4];
    for (int j = 0; j < n; j++)
      for (int c = 0; c < 4; c++) out[j][c] = (lanes){0};
    for (long t = from; t < to; t++)
      for (int c = 0; c < 4; c++) {
        lanes v = *(const lanes *)(V + t * E + e + 16 * c);
        for (int j = 0; j < n; j++) out[j][c] += s[j * S + t] * v;
      }
    for (int j = 0; j < n; j++) memcpy(part + j * (E + 2) + e, out[j], sizeof out[j]);
  }
  for (; e < E; e++)
    for (int j = 0; j < n; j++) {
      float *out = part + j * (E + 2) + e;
      *out = 0;
      for (long t = from; t < to; t++) *out += s[j * S + t] * V[t * E + e];
    }
}

static void attend(const Layer *p, float *part, const float *q, float *scores, const long *position, long M, long H, long KH,
                   long E, long S) {
  for (long m = 0; m < M; m++) {
    long n = parts(position[m]), k = omp_get_thread_num();
    if (k >= n) continue;
    long from = (position[m] + 1) * k / n, to = (position[m] + 1) * (k + 1) / n, group = H / KH;
    for (long j = 0; j < H;) {
      long i = m * H + j, kv = (m * KH + j / group) * S * E, left = group - j % group;
      float *own = part + (k * M * H + i) * (E + 2), *s = scores + i * S;
      const float *query = q + i * E, *K = p->K + kv, *V = p->V + kv;
      if (left >= 4) heads(own, s, query, K, V, from, to, E, S, 4), j += 4;
      else if (left == 3) heads(own, s, query, K, V, from, to, E, S, 3), j += 3;
      else if (left == 2) heads(own, s, query, K, V, from, to, E, S, 2), j += 2;
      else heads(own, s, query, K, V, from, to, E, S, 1), j += 1;
    }
  }
}

/* z of all heads from its parts */
static void combine(float *z, const float *part, const long *position, long M, long H, long E) {
  for (long i = 0; i < M * H; i++, z += E) {
    long n = parts(position[i / H]), stride = M * H * (E + 2);
    const float *own = part + i * (E + 2);
    float most = -INFINITY, sum = 0;
    for (long k = 0; k < n; k++) most = own[k * stride + E] > most ? own[k * stride + E] : most;
    for (long k = 0; k < n; k++) sum += expf(own[k * stride + E] - most) * own[k * stride + E + 1];
    for (long e = 0; e < E; e++) z[e] = 0;
    for (long k = 0; k < n; k++) {
      float by = expf(own[k * stride + E] - most) / sum;
      for (long e = 0; e < E; e++) z[e] += by * own[k * stride + e];
    }
  }
}

/* x [M, D] embeddings → y [M, V] logits. position [M]; slot [M]: where a row's token is stored. frequency [E/2]: rope's
   angle per position. fast: records, of which which[3 l], [3 l + 1], [3 l + 2] are layer l's gate, up and down; -1:
   frozen. scratch: M (H E + 2 F + D + H S + threads H (E + 2)) floats. */
void decode(const Layer *layers, long L, const Fast *fast, const long *which, const float *norm, const float *head,
            float *x, float *y, const float *frequency, const long *position, const long *slot, float *scratch, long M,
            long D, long F, long H, long KH, long E, long S, long V, float eps, int threads) {
  float *q = scratch, *gate = q + M * H * E, *up = gate + M * F, *down = up + M * F, *scores = down + M * D,
        *part = scores + M * H * S;
#pragma omp parallel num_threads(threads)
  {
    float h[M * D], z[M * H * E], cosine[M * E / 2], sine[M * E / 2];
    long from, to;
    for (long m = 0, i = 0; m < M; m++)
      for (long j = 0; j < E / 2; j++, i++) {
        float angle = position[m] * frequency[j];
        cosine[i] = cosf(angle), sine[i] = sinf(angle);
      }
    for (const Layer *p = layers; p < layers + L; p++) {
      const long *n = which + 3 * (p - layers);
      const Fast *fast_gate = n[0] < 0 ? 0 : fast + n[0], *fast_up = n[1] < 0 ? 0 : fast + n[1],
                 *fast_down = n[2] < 0 ? 0 : fast + n[2];
      rms_norm(h, x, p->norm1, M, D, eps);
      project(p, q, h, cosine, sine, slot, M, D, H, KH, E, S);
#pragma omp barrier
      attend(p, part, q, scores, position, M, H, KH, E, S);
#pragma omp barrier
      combine(z, part, position, M, H, E);
      share(D, &from, &to);
      product(x, p->o, p->ob, z, M, D, H * E, from, to, 1);
#pragma omp barrier
      rms_norm(h, x, p->norm2, M, D, eps);
      share(F, &from, &to);
      if (fast_gate) coefficients(fast_gate, h, M, D);
      if (fast_up) coefficients(fast_up, h, M, D);
      product(gate, p->gate, p->gateb, h, M, F, D, from, to, 0);
      product(up, p->up, p->upb, h, M, F, D, from, to, 0);
      remember(fast_gate, h, M);
      remember(fast_up, h, M);
      if (fast_gate || fast_up) {
#pragma omp barrier
        if (fast_gate) add_fast(fast_gate, gate, M, F, from, to);
        if (fast_up) add_fast(fast_up, up, M, F, from, to);
      }
      for (long m = 0; m < M; m++)
#pragma omp simd
        for (long i = m * F + from; i < m * F + to; i++) gate[i] *= up[i] / (1 + exponential(-gate[i]));
#pragma omp barrier
      share(D, &from, &to);
      if (fast_down) {
        coefficients(fast_down, gate, M, F);
        product(down, p->down, p->downb, gate, M, D, F, from, to, 0);
        remember(fast_down, gate, M);
#pragma omp barrier
        add_fast(fast_down, down, M, D, from, to);
        for (long m = 0; m < M; m++)
          for (long i = m * D + from; i < m * D + to; i++) x[i] += down[i];
      } else {
        product(x, p->down, p->downb, gate, M, D, F, from, to, 1);
      }
#pragma omp barrier
    }
    rms_norm(h, x, norm, M, D, eps);
    share(V, &from, &to);
    product(y, head, 0, h, M, V, D, from, to, 0);
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
