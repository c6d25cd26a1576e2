/* y[m] = W x[m] + b for a few rows m: streams W once. float32, row-major. Built by linear.py. */
void gemv(const float *W, const float *x, const float *b, float *y, long O, long I, long M) {
#pragma omp parallel for schedule(static)
  for (long o = 0; o < O; o++) {
    const float *w = W + o * I;
    for (long m = 0; m < M; m++) {
      const float *v = x + m * I;
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (long i = 0; i < I; i++) sum += w[i] * v[i];
      y[m * O + o] = sum + (b ? b[o] : 0);
    }
  }
}
