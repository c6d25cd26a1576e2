/* A decode step of a model whose weights, and keys and values, are stored in one type. cpu.c includes this once for each,
   and defines
     KIND        its name                         WEIGHT      the type that stores a number
     VALUE(x)    a stored number as a float       STORED(x)   a float as it is stored
     ROUNDED(x)  a float as it would be stored    VECTOR(p)   16 stored numbers as floats
     DOT(w, x, I, ahead)                          of stored numbers and floats
   What a module would give is rounded where it would be; ΔW is read and added in float32. Shapes as in cpu.c. */
#define NAME__(name, kind) name##_##kind
#define NAME_(name, kind) NAME__(name, kind)
#define NAME(name) NAME_(name, KIND)

typedef struct {
  const WEIGHT *norm1, *q, *k, *v, *o, *norm2, *gate, *up, *down;
  const WEIGHT *qb, *kb, *vb, *ob, *gateb, *upb, *downb; /* or NULL */
  WEIGHT *K, *V;                                         /* [M, KH, S, E] */
} NAME(Layer);

/* W[o]·x + b[o] */
INLINE float NAME(neuron)(const WEIGHT *W, const WEIGHT *b, const float *x, long o, long I) {
  return ROUNDED(DOT(W + o * I, x, I, AHEAD) + (b ? VALUE(b[o]) : 0));
}

/* y[m, o] (+)= W[o]·x[m] + b[o] for neurons from:to */
static void NAME(product)(float *y, const WEIGHT *W, const WEIGHT *b, const float *x, long M, long O, long I, long from,
                          long to, int add) {
  if (M == 1) { /* the usual case, without the inner loop */
    for (long o = from; o < to; o++) {
      float a = NAME(neuron)(W, b, x, o, I);
      y[o] = add ? ROUNDED(y[o] + a) : a;
    }
    return;
  }
  for (long o = from; o < to; o++)
    for (long m = 0; m < M; m++) {
      float a = NAME(neuron)(W, b, x + m * I, o, I);
      y[m * O + o] = add ? ROUNDED(y[m * O + o] + a) : a;
    }
}

/* the same, stored */
static void NAME(outputs)(WEIGHT *y, const WEIGHT *W, const WEIGHT *b, const float *x, long M, long O, long I, long from,
                          long to) {
  for (long o = from; o < to; o++)
    for (long m = 0; m < M; m++) y[m * O + o] = STORED(NAME(neuron)(W, b, x + m * I, o, I));
}

static void NAME(rms_norm)(float *y, const float *x, const WEIGHT *w, long M, long D, float eps) {
  for (long m = 0; m < M; m++, x += D, y += D) {
    float s = dot(x, x, D, 0);
    s = 1 / sqrtf(s / D + eps);
    for (long i = 0; i < D; i++) y[i] = ROUNDED(ROUNDED(x[i] * s) * VALUE(w[i]));
  }
}

/* keeps W h + b of neurons from:to and adds ΔW h to it in place */
static void NAME(add_fast)(const Fast *f, float *y, long M, long O, long from, long to) {
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
    for (long o = from; o < to; o++) f->a[m * O + o] = y[o], y[o] = ROUNDED(y[o]);
  }
}

/* rows of q, k and v of this thread's share, in units of one row; rope turns rows j and j + E/2 of a head together */
static void NAME(project)(const NAME(Layer) *p, float *q, const float *h, const float *cosine, const float *sine,
                          const long *slot, long M, long D, long H, long KH, long E, long S) {
  long from, to, half = E / 2, turned = (H + KH) * E;
  share(turned + KH * E, &from, &to);
  for (long u = from; u < to; u++) {
    if (u >= turned) {
      long r = u - turned;
      for (long m = 0; m < M; m++)
        p->V[((m * KH + r / E) * S + slot[m]) * E + r % E] = STORED(NAME(neuron)(p->v, p->vb, h + m * D, r, D));
    } else if (u % 2 == 0) {
      long head = u / E, j = u % E / 2, is_q = head < H, row = (is_q ? head : head - H) * E + j;
      const WEIGHT *W = is_q ? p->q : p->k, *b = is_q ? p->qb : p->kb;
      for (long m = 0; m < M; m++) {
        float left = NAME(neuron)(W, b, h + m * D, row, D), right = NAME(neuron)(W, b, h + m * D, row + half, D);
        float c = cosine[m * half + j], s = sine[m * half + j];
        float low = ROUNDED(left * c) - right * s, high = ROUNDED(right * c) + left * s;
        if (is_q) {
          float *to_ = q + (m * H + head) * E;
          to_[j] = ROUNDED(low), to_[j + half] = ROUNDED(high);
        } else {
          WEIGHT *to_ = p->K + ((m * KH + head - H) * S + slot[m]) * E;
          to_[j] = STORED(low), to_[j + half] = STORED(high);
        }
      }
    }
  }
}

/* parts of n heads that share K and V, over positions from:to; rows of q lie E apart, of s S, of part E + 2 */
INLINE void NAME(heads)(float *part, float *s, const float *q, const WEIGHT *K, const WEIGHT *V, long from, long to,
                        long E, long S, const int n) {
  float root = 1 / sqrtf(E);
  for (int j = 0; j < n; j++) part[j * (E + 2) + E] = -INFINITY;
  for (long t = from; t < to; t++) {
    for (long e = 0; e < E; e += 16) __builtin_prefetch(K + (t + 16) * E + e), __builtin_prefetch(V + t * E + e);
    for (int j = 0; j < n; j++) {
      float a = s[j * S + t] = root * DOT(K + t * E, q + j * E, E, 0), *most = part + j * (E + 2) + E;
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
        lanes v = VECTOR(V + t * E + e + 16 * c);
        for (int j = 0; j < n; j++) out[j][c] += s[j * S + t] * v;
      }
    for (int j = 0; j < n; j++) memcpy(part + j * (E + 2) + e, out[j], sizeof out[j]);
  }
  for (; e < E; e++)
    for (int j = 0; j < n; j++) {
      float *out = part + j * (E + 2) + e;
      *out = 0;
      for (long t = from; t < to; t++) *out += s[j * S + t] * VALUE(V[t * E + e]);
    }
}

static void NAME(attend)(const NAME(Layer) *p, float *part, const float *q, float *scores, const long *position, long M,
                         long H, long KH, long E, long S) {
  for (long m = 0; m < M; m++) {
    long n = parts(position[m]), k = omp_get_thread_num();
    if (k >= n) continue;
    long from = (position[m] + 1) * k / n, to = (position[m] + 1) * (k + 1) / n, group = H / KH;
    for (long j = 0; j < H;) {
      long i = m * H + j, kv = (m * KH + j / group) * S * E, left = group - j % group;
      float *own = part + (k * M * H + i) * (E + 2), *s = scores + i * S;
      const float *query = q + i * E;
      const WEIGHT *K = p->K + kv, *V = p->V + kv;
      if (left >= 4) NAME(heads)(own, s, query, K, V, from, to, E, S, 4), j += 4;
      else if (left == 3) NAME(heads)(own, s, query, K, V, from, to, E, S, 3), j += 3;
      else if (left == 2) NAME(heads)(own, s, query, K, V, from, to, E, S, 2), j += 2;
      else NAME(heads)(own, s, query, K, V, from, to, E, S, 1), j += 1;
    }
  }
}

/* z of all heads from its parts */
static void NAME(combine)(float *z, const float *part, const long *position, long M, long H, long E) {
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
    for (long e = 0; e < E; e++) z[e] = ROUNDED(z[e]);
  }
}

/* x [M, D] embeddings → y [M, V] logits. position [M]; slot [M]: where a row's token is stored. frequency [E/2]: rope's
   angle per position. fast: records, of which which[3 l], [3 l + 1], [3 l + 2] are layer l's gate, up and down; -1:
   frozen. scratch: M (H E + 2 F + D + H S + threads H (E + 2)) floats. */
void NAME(decode)(const NAME(Layer) *layers, long L, const Fast *fast, const long *which, const WEIGHT *norm,
                  const WEIGHT *head, float *x, WEIGHT *y, const float *frequency, const long *position, const long *slot,
                  float *scratch, long M, long D, long F, long H, long KH, long E, long S, long V, float eps,
                  int threads) {
  float *q = scratch, *gate = q + M * H * E, *up = gate + M * F, *down = up + M * F, *scores = down + M * D,
        *part = scores + M * H * S;
#pragma omp parallel num_threads(threads)
  {
    float h[M * D], z[M * H * E], cosine[M * E / 2], sine[M * E / 2];
    long from, to;
    for (long m = 0, i = 0; m < M; m++)
      for (long j = 0; j < E / 2; j++, i++) {
        float angle = position[m] * frequency[j];
        cosine[i] = ROUNDED(cosf(angle)), sine[i] = ROUNDED(sinf(angle));
      }
    for (const NAME(Layer) *p = layers; p < layers + L; p++) {
      const long *n = which + 3 * (p - layers);
      const Fast *fast_gate = n[0] < 0 ? 0 : fast + n[0], *fast_up = n[1] < 0 ? 0 : fast + n[1],
                 *fast_down = n[2] < 0 ? 0 : fast + n[2];
      NAME(rms_norm)(h, x, p->norm1, M, D, eps);
      NAME(project)(p, q, h, cosine, sine, slot, M, D, H, KH, E, S);
#pragma omp barrier
      NAME(attend)(p, part, q, scores, position, M, H, KH, E, S);
#pragma omp barrier
      NAME(combine)(z, part, position, M, H, E);
      share(D, &from, &to);
      NAME(product)(x, p->o, p->ob, z, M, D, H * E, from, to, 1);
#pragma omp barrier
      NAME(rms_norm)(h, x, p->norm2, M, D, eps);
      share(F, &from, &to);
      if (fast_gate) coefficients(fast_gate, h, M, D);
      if (fast_up) coefficients(fast_up, h, M, D);
      NAME(product)(gate, p->gate, p->gateb, h, M, F, D, from, to, 0);
      NAME(product)(up, p->up, p->upb, h, M, F, D, from, to, 0);
      remember(fast_gate, h, M);
      remember(fast_up, h, M);
      if (fast_gate || fast_up) {
#pragma omp barrier
        if (fast_gate) NAME(add_fast)(fast_gate, gate, M, F, from, to);
        if (fast_up) NAME(add_fast)(fast_up, up, M, F, from, to);
      }
      for (long m = 0; m < M; m++)
#pragma omp simd
        for (long i = m * F + from; i < m * F + to; i++) gate[i] = ROUNDED(ROUNDED(gate[i] / (1 + exponential(-gate[i]))) * up[i]);
#pragma omp barrier
      share(D, &from, &to);
      if (fast_down) {
        coefficients(fast_down, gate, M, F);
        NAME(product)(down, p->down, p->downb, gate, M, D, F, from, to, 0);
        remember(fast_down, gate, M);
#pragma omp barrier
        NAME(add_fast)(fast_down, down, M, D, from, to);
        for (long m = 0; m < M; m++)
          for (long i = m * D + from; i < m * D + to; i++) x[i] = ROUNDED(x[i] + down[i]);
      } else {
        NAME(product)(x, p->down, p->downb, gate, M, D, F, from, to, 1);
      }
#pragma omp barrier
    }
    NAME(rms_norm)(h, x, norm, M, D, eps);
    share(V, &from, &to);
    NAME(outputs)(y, head, 0, h, M, V, D, from, to);
  }
}

#undef NAME
#undef NAME_
#undef NAME__
#undef KIND
#undef WEIGHT
#undef VALUE
#undef STORED
#undef ROUNDED
#undef VECTOR
#undef DOT
