/* Causal attention from C, without Python: load, launch, compare with a reference in double precision.
 *
 *     pyfmha build --kernels basic --dtype fp32 --head-size 64
 *     gcc -O2 -Iaot_out/c examples/c/attention.c -Laot_out -lpyfmha -Wl,-rpath,$PWD/aot_out -lm -ldl -o attention
 *     ./attention
 *
 * Exit code 0: right; 1: wrong; 2: an error, said on stderr. It is C++ as well (g++ -x c++). ATTENTION and HEAD_SIZE choose
 * another function: -DATTENTION=fmha_d128_fp32 -DHEAD_SIZE=128.
 */
#include <math.h>
#include <string.h>

#include "libpyfmha.h"
#include "driver.h"

#ifndef ATTENTION
#define ATTENTION fmha_d64_fp32
#define HEAD_SIZE 64
#endif
#define JOINED(a, b) a##b
#define JOIN(a, b) JOINED(a, b)

enum { BATCH = 2, HEADS = 3, SEQ = 100, COUNT = BATCH * HEADS * SEQ * HEAD_SIZE };
static const float SCALE = 0.125f;
static const double LIMIT = 1e-5; /* of the relative error; three tf32 products keep float32's accuracy */

/* The library's functions return the driver's status; the text is the library's own. */
static void check(CUresult status) {
  if (status != PYFMHA_SUCCESS) {
    fprintf(stderr, "error: %s\n", pyfmha_last_error());
    exit(2);
  }
}

/* Numbers from -1 to 1 that look random. */
static void fill(float *values, unsigned seed) {
  for (int i = 0; i < COUNT; i++) {
    seed = seed * 1664525u + 1013904223u;
    values[i] = (float)(seed >> 8) / (1 << 23) - 1.0f;
  }
}

/* One head: out[i] is the mean of v[0..i], weighted with exp(SCALE * q[i] . k[j]). */
static void reference(const float *q, const float *k, const float *v, double *out) {
  for (int i = 0; i < SEQ; i++) {
    double sum = 0, row[HEAD_SIZE] = {0};
    for (int j = 0; j <= i; j++) {
      double score = 0;
      for (int d = 0; d < HEAD_SIZE; d++) score += (double)q[i * HEAD_SIZE + d] * k[j * HEAD_SIZE + d];
      const double weight = exp(SCALE * score);
      sum += weight;
      for (int d = 0; d < HEAD_SIZE; d++) row[d] += weight * v[j * HEAD_SIZE + d];
    }
    for (int d = 0; d < HEAD_SIZE; d++) out[i * HEAD_SIZE + d] = row[d] / sum;
  }
}

int main(void) {
  static float q[COUNT], k[COUNT], v[COUNT], out[COUNT];
  static double expected[COUNT];
  fill(q, 1);
  fill(k, 2);
  fill(v, 3);
  const driver cuda = driver_open();
  /* Out, L, M, Q, K, V: tensors [batch, heads, seq, head size]; L and M are float32 [batch * heads, seq]. */
  const size_t tensor = sizeof q, rows = sizeof(float) * BATCH * HEADS * SEQ;
  const size_t bytes[6] = {tensor, rows, rows, tensor, tensor, tensor};
  CUdeviceptr at[6];
  for (int i = 0; i < 6; i++) driver_check(cuda.alloc(&at[i], bytes[i]), "cuMemAlloc");
  driver_check(cuda.to_device(at[3], q, tensor), "cuMemcpyHtoD");
  driver_check(cuda.to_device(at[4], k, tensor), "cuMemcpyHtoD");
  driver_check(cuda.to_device(at[5], v, tensor), "cuMemcpyHtoD");

  check(JOIN(load_, ATTENTION)()); /* once a context */
  check(ATTENTION(NULL, at[0], at[1], at[2], at[3], at[4], at[5], SCALE, BATCH, HEADS, SEQ, 0)); /* queued on a stream */
  driver_check(cuda.wait(), "the launch");
  driver_check(cuda.to_host(out, at[0], tensor), "cuMemcpyDtoH");
  check(JOIN(unload_, ATTENTION)());
  for (int i = 0; i < 6; i++) driver_check(cuda.free(at[i]), "cuMemFree");
  driver_check(cuda.release(0), "cuDevicePrimaryCtxRelease");

  double wrong = 0, whole = 0;
  for (int head = 0; head < BATCH * HEADS; head++) {
    const size_t start = (size_t)head * SEQ * HEAD_SIZE;
    reference(q + start, k + start, v + start, expected + start);
  }
  for (int i = 0; i < COUNT; i++) {
    wrong += (out[i] - expected[i]) * (out[i] - expected[i]);
    whole += expected[i] * expected[i];
  }
  const double error = sqrt(wrong / whole);
  printf("relative error %.1e, limit %.0e\n", error, LIMIT);
  return error <= LIMIT ? 0 : 1; /* a NaN is not */
}
