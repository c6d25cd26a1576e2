/* A fold (fastweights/state/compress.py) of float32 slots, in place; every number but the slots is float64. On a CPU with
   AVX-512. Built by cpu.py. Shapes: S slots, R kept, O out, I in; N: S rounded up to whole tiles, filled with zeros. */
#include "cpu.h"
#include <float.h>
#include <stdlib.h>

#ifdef __AVX512F__
typedef double eight __attribute__((vector_size(64), aligned(8)));
enum { SIDE = 24, CHUNK = 96, PARTS = 8 }; /* columns of a tile; columns of a factor taken at a time; parts of a long sum */

typedef struct {
  float *U, *K, *bias; /* [S, O], [S, I], [S]: the first R are replaced by the best R terms */
  const double *w;     /* [S] */
  long S, O, I, R;
} Fold;

/* sum = A P, of TALL rows of A and n vectors of P */
INLINE void tile64(eight sum[TALL][WIDE], const double *A, long lda, long ka, const double *P, long ldp, long K,
                   const int n) {
  eight s[TALL][WIDE] = {0};
  for (long k = 0; k < K; k++) {
    eight x[WIDE];
    for (int j = 0; j < n; j++) x[j] = *(const eight *)(P + k * ldp + j * 8);
    for (int r = 0; r < TALL; r++)
      for (int j = 0; j < n; j++) s[r][j] += A[r * lda + k * ka] * x[j];
  }
  memcpy(sum, s, sizeof s);
}

/* G [TALL, SIDE], rows r and columns c of a symmetric matrix, += A P from its diagonal block on; P begins at column c */
INLINE void symmetric_tile(double *G, long r, long c, const double *A, long lda, long ka, const double *P, long N, long K) {
  eight sum[TALL][WIDE];
  int first = r > c ? (r - c) / 8 : 0;
  if (first == 0) tile64(sum, A, lda, ka, P, N, K, 3);
  else if (first == 1) tile64(sum, A, lda, ka, P + 8, N, K, 2);
  else tile64(sum, A, lda, ka, P + 16, N, K, 1);
  for (int i = 0; i < TALL; i++)
    for (int j = first; j < WIDE; j++) *(eight *)(G + i * N + j * 8) += sum[i][j - first];
}

/* Y [rows, N] = A P, P of K rows N apart; A [rows, K], its rows a and its columns k apart; `upper`: it is 0 below its
   diagonal */
static void multiply(double *Y, const double *A, long a, long k, const double *P, long rows, long K, long N, int upper,
                     int threads) {
#pragma omp parallel for collapse(2) schedule(dynamic, 4) num_threads(threads)
  for (long r = 0; r < rows; r += TALL)
    for (long c = 0; c < N; c += SIDE) {
      long from = upper ? r : 0;
      eight sum[TALL][WIDE];
      tile64(sum, A + r * a + from * k, a, k, P + from * N + c, N, K - from, WIDE);
      for (int i = 0; i < TALL; i++) memcpy(Y + (r + i) * N + c, sum[i], sizeof sum[i]);
    }
}

#ifdef __clang__
#define MIX(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef long where __attribute__((vector_size(64)));
#define MIX(a, b, ...) __builtin_shuffle(a, b, (where){__VA_ARGS__})
#endif

/* P [8, N] of eight columns of eight rows of X: the rows, D apart, become columns */
INLINE void turn(double *P, long N, const float *X, long D) {
  typedef float row __attribute__((vector_size(32), aligned(4)));
  eight x[8], y[8];
  for (int i = 0; i < 8; i++) x[i] = __builtin_convertvector(*(const row *)(X + i * D), eight);
  for (int i = 0; i < 8; i += 2) { /* pairs, then fours, then eights */
    y[i] = MIX(x[i], x[i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
    y[i + 1] = MIX(x[i], x[i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
  }
  for (int i = 0; i < 8; i++)
    x[i] = i & 2 ? MIX(y[i - 2], y[i], 2, 3, 10, 11, 6, 7, 14, 15) : MIX(y[i], y[i + 2], 0, 1, 8, 9, 4, 5, 12, 13);
  for (int i = 0; i < 8; i++)
    *(eight *)(P + i * N) =
        i & 4 ? MIX(x[i - 4], x[i], 4, 5, 6, 7, 12, 13, 14, 15) : MIX(x[i], x[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
}

/* the upper triangle of G [N, N], of X [S, D], from its columns `from` to `to` alone. panel: [CHUNK, N] */
static void gram(double *G, const float *X, long S, long D, long from, long to, long N, double *panel) {
  memset(G, 0, N * N * sizeof *G);
  for (long k0 = from; k0 < to; k0 += CHUNK) {
    long K = to - k0 < CHUNK ? to - k0 : CHUNK;
    for (long s = 0; s < N; s += 8)
      for (long k = 0; k < K; k += 8)
        if (s + 8 <= S && k + 8 <= K) turn(panel + k * N + s, N, X + s * D + k0 + k, D);
        else
          for (long i = k; i < k + 8 && i < K; i++)
            for (long r = s; r < s + 8; r++) panel[i * N + r] = r < S ? X[r * D + k0 + i] : 0;
    for (long c = 0; c < N; c += SIDE)
      for (long r = 0; r < c + SIDE; r += TALL) symmetric_tile(G + r * N + c, r, c, panel + r, 1, N, panel + c, N, K);
  }
}

/* Householder: A [N, N] symmetric, of n rows and 0 beyond → its diagonal d and off-diagonal e, and the reflections
   1 − v vᵀ in the rows of A, from column k + 1 on. w, p: scratch [N] */
static void tridiagonal(double *A, long n, long N, double *d, double *e, double *w, double *p) {
  const double *old = NULL; /* v of the column before, whose change of A is still to be made */
  for (long i = 0; i < N; i++) w[i] = 0; /* the first column reads it, times 0: what memory held may be NaN */
  for (long k = 0; k < n; k++) {
    double *v = A + k * N, square = 0, vp = 0;
    if (old)
      for (long i = k; i < n; i++) v[i] -= old[k] * w[i] + w[k] * old[i];
    d[k] = v[k], e[k] = k + 1 < n ? v[k + 1] : 0;
    for (long i = k + 2; i < n; i++) square += v[i] * v[i];
    double norm = sqrt(square + e[k] * e[k]), first = e[k];
    long start = (k + 1) / 8 * 8;
    if (square > 0) {
      e[k] = first > 0 ? -norm : norm;
      double scale = 1 / sqrt(norm * (norm + fabs(first))); /* makes ‖v‖² = 2 */
      v[k + 1] -= e[k];
      for (long i = k + 1; i < n; i++) v[i] *= scale;
    } else if (k + 1 < n)
      v[k + 1] = 0; /* nothing to reflect */
    for (long i = start; i <= k; i++) v[i] = 0;
    for (long i = start; i < N; i++) p[i] = 0;
    for (long r = k + 1; r < n; r++) { /* both in one pass: the change before, and A v */
      double *row = A + r * N, a = old ? old[r] : 0, b = old ? w[r] : 0, c = v[r];
      const double *u = old ? old : v;
      for (long i = start; i < N; i += 8) {
        eight x = *(eight *)(row + i) - (a * *(const eight *)(w + i) + b * *(const eight *)(u + i));
        *(eight *)(row + i) = x;
        *(eight *)(p + i) += c * x;
      }
    }
    for (long i = k + 1; i < n; i++) vp += v[i] * p[i];
    for (long i = start; i < N; i++) w[i] = p[i] - vp / 2 * v[i];
    for (long i = start; i <= k; i++) w[i] = 0;
    old = v;
  }
}

/* QL with implicit shifts (Dubrulle, Martin and Wilkinson 1968): d becomes the eigenvalues, and the rows of Z [n, N], which
   are the unit matrix before, the eigenvectors; of these columns `from` to `to`. 1 if it did not converge. */
static int eigenvectors(double *d, double *e, double *Z, long n, long N, long from, long to) {
  double largest = 0;
  for (long i = 0; i < n; i++) largest = fmax(largest, fmax(fabs(d[i]), fabs(e[i])));
  for (long l = 0; l < n; l++)
    for (int sweeps = 0;; sweeps++) {
      long m = l;
      while (m + 1 < n && fabs(e[m]) > DBL_EPSILON * fmax(fabs(d[m]) + fabs(d[m + 1]), largest / 16)) m++;
      if (m == l) break;
      if (sweeps == 60) return 1;
      double g = (d[l + 1] - d[l]) / (2 * e[l]);
      g = d[m] - d[l] + e[l] / (g + copysign(sqrt(g * g + 1), g));
      double s = 1, c = 1, p = 0;
      long i = m - 1;
      for (; i >= l; i--) {
        double f = s * e[i], b = c * e[i], r = sqrt(f * f + g * g);
        e[i + 1] = r;
        if (r == 0) {
          d[i + 1] -= p, e[m] = 0;
          break;
        }
        s = f / r, c = g / r, g = d[i + 1] - p;
        r = (d[i] - g) * s + 2 * c * b, p = s * r;
        d[i + 1] = g + p, g = c * r - b;
        double *x = Z + i * N, *y = x + N;
        for (long j = from; j < to; j += 8) {
          eight a = *(eight *)(x + j), z = *(eight *)(y + j);
          *(eight *)(y + j) = s * a + c * z;
          *(eight *)(x + j) = c * a - s * z;
        }
      }
      if (i >= l) continue;
      d[l] -= p, e[l] = g, e[m] = 0;
    }
  return 0;
}

/* the first R columns of Z [n, N], eigenvectors of the tridiagonal form, → those of the matrix itself */
static void back(double *Z, const double *A, long n, long R, long N, int threads) {
#pragma omp parallel for num_threads(threads)
  for (long c = 0; c < R; c += SIDE)
    for (long k = n - 3; k >= 0; k--) {
      const double *v = A + k * N;
      eight dot[WIDE] = {0};
      for (long i = k + 1; i < n; i++)
        for (int j = 0; j < WIDE; j++) dot[j] += v[i] * *(eight *)(Z + i * N + c + j * 8);
      for (long i = k + 1; i < n; i++)
        for (int j = 0; j < WIDE; j++) *(eight *)(Z + i * N + c + j * 8) -= v[i] * dot[j];
    }
}

/* Lᵀ [N, N] of G + δ = L Lᵀ, G [N, N] with 1 on its diagonal; 0 if δ is too small */
static int cholesky(double *Lt, const double *G, long S, long N, double delta) {
  memcpy(Lt, G, N * N * sizeof *G);
  for (long j = 0; j < S; j++) Lt[j * N + j] = 1 + delta;
  for (long j = 0; j < S; j++) {
    double *row = Lt + j * N, pivot = row[j];
    if (!(pivot > 0)) return 0;
    for (long i = 0; i < j; i++) row[i] = 0;
    double scale = 1 / sqrt(pivot);
    for (long i = j; i < S; i++) row[i] *= scale;
    for (long k = j + 1; k < S; k++)
      for (long i = k; i < S; i++) Lt[k * N + i] -= row[k] * row[i];
  }
  return 1;
}

/* the first R of X [S, D] become C X, C [R, S] in rows N apart. panels: [S, SIDE] of every thread, `apart` from each other */
static void recombine(float *X, const double *C, long S, long R, long D, long N, double *panels, long apart, int threads) {
#pragma omp parallel for num_threads(threads)
  for (long c = 0; c < D; c += SIDE) {
    double *P = panels + omp_get_thread_num() * apart;
    long n = D - c < SIDE ? D - c : SIDE;
    for (long s = 0; s < S; s++)
      for (long i = 0; i < SIDE; i++) P[s * SIDE + i] = i < n ? X[s * D + c + i] : 0;
    for (long r = 0; r < R; r += TALL) {
      eight sum[TALL][WIDE];
      tile64(sum, C + r * N, N, 1, P, SIDE, S, WIDE);
      for (long i = 0; i < TALL && r + i < R; i++) {
        const double *from = (const double *)sum[i];
        float *to = X + (r + i) * D + c;
        for (long j = 0; j < n; j++) to[j] = from[j];
      }
    }
  }
}

static long parts(long D) { return D < PARTS * CHUNK ? (D + CHUNK - 1) / CHUNK : PARTS; }

static double norm_of(const double *x, long n) {
  double sum = 0;
  for (long i = 0; i < n; i++) sum += x[i] * x[i];
  return sqrt(sum);
}

static int descending(const void *a, const void *b) {
  double x = **(const double *const *)a, y = **(const double *const *)b;
  return (x < y) - (x > y);
}

/* The twin of compress.fold, step by step, under the same names. errors: error_2 and error_F. 1, and nothing is changed, if
   a kept factor may not fit float32, or the eigenvalues did not converge. scratch: see `fold_scratch` */
int fold(const Fold *p, double *errors, double *scratch, int threads) {
  const long S = p->S, O = p->O, I = p->I, R = p->R, N = (S + SIDE - 1) / SIDE * SIDE;
  const long parts_u = parts(O), every = parts_u + parts(I), apart = CHUNK * N;
  double *G = scratch, *panels = G + every * N * N, *at = panels + threads * apart;
  double *H = at, *DL = H + N * N, *T = DL + N * N, *B = T + N * N, *Z = B + N * N, *C_u = Z + N * N, *C_k = C_u + N * N;
  double *scale_u = C_k + N * N, *scale_k = scale_u + N, *D = scale_k + N, *squares = D + N, *e = squares + N, *bias = e + N;
  double *sigma = bias + N, *inverse = sigma + N, *lost = inverse + N, *d_u = lost + N, *d_k = d_u + N;
  double *G_u = G, *G_k = G + parts_u * N * N;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (long n = 0; n < every; n++) { /* parts that do not depend on the number of threads: nor do their sums */
    int u = n < parts_u;
    long D = u ? O : I, m = u ? n : n - parts_u, of = u ? parts_u : every - parts_u;
    gram(G + n * N * N, u ? p->U : p->K, S, D, D * m / of, D * (m + 1) / of, N, panels + omp_get_thread_num() * apart);
  }
#pragma omp parallel for num_threads(threads)
  for (long r = 0; r < N; r++)
    for (long n = 1; n < every; n++)
      if (n != parts_u)
        for (long i = r * N + r; i < r * N + N; i++) (n < parts_u ? G_u : G_k)[i] += G[n * N * N + i];
  for (long r = 0; r < S; r++)
    for (long s = r; s < S; s++) G_k[r * N + s] += (double)p->bias[r] * p->bias[s];
  double unit = 0;
  for (long s = 0; s < N; s++) {
    double norm_u = s < S ? sqrt(G_u[s * N + s]) : 0, norm_k = s < S ? sqrt(G_k[s * N + s]) : 0;
    scale_u[s] = norm_u > 0 ? 1 / norm_u : 0, scale_k[s] = norm_k > 0 ? 1 / norm_k : 0;
    D[s] = s < S ? p->w[s] * norm_u * norm_k : 0;
    unit = fmax(unit, fabs(D[s]));
  }
  if (!(unit > 0)) unit = 1;
  for (long s = 0; s < N; s++) D[s] /= unit;
  for (long r = 0; r < N; r++)
    for (long s = r; s < N; s++) {
      G_u[r * N + s] *= scale_u[r] * scale_u[s];
      G_k[r * N + s] *= scale_k[r] * scale_k[s];
      G_k[s * N + r] = G_k[r * N + s];
    }
  double delta = S * DBL_EPSILON / 16;
  do delta *= 16;
  while (!cholesky(H, G_u, S, N, delta) && delta < 1);
  double rounding = 0;
  for (long j = 0; j < N; j++)
    for (long s = 0; s < N; s++) {
      double x = j < S && s < S && s >= j ? H[j * N + s] * D[s] : 0;
      H[j * N + s] = DL[s * N + j] = x;
      rounding += x * x;
    }
  rounding *= DBL_EPSILON * norm_of(G_k, N * N);
  multiply(T, H, N, 1, G_k, N, N, N, 1, threads);
  memset(B, 0, N * N * sizeof *B);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (long c = N - SIDE; c >= 0; c -= SIDE) /* DL is 0 above column c's own row */
    for (long r = 0; r < c + SIDE; r += TALL)
      symmetric_tile(B + r * N + c, r, c, T + r * N + c, N, 1, DL + c * N + c, N, N - c);
  for (long r = 0; r < N; r++)
    for (long s = 0; s < r; s++) B[r * N + s] = B[s * N + r];
  memset(Z, 0, N * N * sizeof *Z);
  for (long s = 0; s < S; s++) Z[s * N + s] = 1;
  tridiagonal(B, S, N, squares, e, d_u, d_k);
  int failed = 0;
#pragma omp parallel num_threads(threads < 4 ? threads : 4) reduction(| : failed)
  { /* every thread finds all rotations, and applies them to its share of the columns */
    double d_own[N], e_own[N];
    long from, to;
    memcpy(d_own, squares, sizeof d_own), memcpy(e_own, e, sizeof e_own);
    share(N / 8, &from, &to);
#pragma omp barrier
    failed |= eigenvectors(d_own, e_own, Z, S, N, 8 * from, 8 * to);
    if (omp_get_thread_num() == 0) memcpy(squares, d_own, sizeof d_own);
  }
  if (failed) return 1;
  const double *order[S];
  for (long s = 0; s < S; s++) order[s] = squares + s;
  qsort(order, S, sizeof *order, descending);
  double terms = O + I + 1 + S, squared = (16 + terms / 8) * rounding;
  for (long r = 0; r < S; r++) {
    double square = *order[r];
    int live = r < R && square > 16 * rounding;
    lost[r] = live || square < 0 ? 0 : sqrt(square);
    if (r >= R) continue;
    sigma[r] = live ? sqrt(square) : 0, inverse[r] = live ? 1 / sigma[r] : 0;
  }
  if (!(32 * sqrt(unit * sigma[0]) < FLT_MAX)) return 1;
  double *Y = DL; /* is not needed any more */
  for (long r = 0; r < N; r++)
    for (long s = 0; s < N; s++) Y[s * N + r] = r < R ? Z[(order[r] - squares) * N + s] : 0;
  back(Y, B, S, R, N, threads);
  long rows = (R + TALL - 1) / TALL * TALL;
  multiply(C_k, Y, 1, N, H, rows, S, N, 0, threads);
  multiply(C_u, Y, 1, N, T, rows, S, N, 0, threads);
  double eta = FLT_EPSILON / 2, t = (double)FLT_MIN * FLT_EPSILON / 2, most = 0, slack = unit * sqrt(squared);
  for (long r = 0; r < R; r++) {
    double root = sqrt(unit * inverse[r]);
    for (long s = 0; s < N; s++) {
      C_k[r * N + s] *= root * scale_k[s];
      C_u[r * N + s] *= root * inverse[r] * D[s] * scale_u[s];
    }
    bias[r] = 0;
    for (long s = 0; s < S; s++) bias[r] += C_k[r * N + s] * p->bias[s];
  }
  for (long r = 0; r < R; r++) {
    double root = sqrt(unit * sigma[r]);
    p->bias[r] = bias[r];
    d_u[r] = root > 0 ? eta * root + t * sqrt(O) : 0, d_k[r] = root > 0 ? eta * root + t * sqrt(I + 1) : 0;
    scale_u[r] = root * d_u[r], scale_k[r] = root * d_k[r];
  }
  recombine(p->U, C_u, S, R, O, N, panels, apart, threads);
  recombine(p->K, C_k, S, R, I, N, panels, apart, threads);
  double rounded = norm_of(scale_u, R) + norm_of(scale_k, R) + norm_of(d_u, R) * norm_of(d_k, R);
  rounded += unit * squared * norm_of(inverse, R);
  for (long s = 0; s < S; s++) most = fmax(most, unit * lost[s]);
  errors[0] = hypot(most, slack) + rounded;
  errors[1] = fmax(errors[0], hypot(unit * norm_of(lost, S), slack) + rounded);
  return 0;
}

/* numbers of its scratch */
long fold_scratch(long S, long O, long I, int threads) {
  long N = (S + SIDE - 1) / SIDE * SIDE;
  return (parts(O) + parts(I) + 7) * N * N + threads * CHUNK * N + 11 * N;
}
#endif
