/* What makes the fake driver one that programs of examples/c/ can be run with: memory, which is the host's, and causal float32
 * attention in the place of each launch, computed while the program waits. Linked together with fake_cuda.c.
 *
 * With FAKE_KERNEL=none in the environment, launches compute nothing. HEAD_SIZE is the attention's.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "fake_cuda.h"

#define EXPORT __attribute__((visibility("default")))
typedef unsigned long long CUdeviceptr;

CUresult cuMemAlloc_v2(CUdeviceptr *pointer, size_t bytes);
CUresult cuMemFree_v2(CUdeviceptr pointer);
CUresult cuMemcpyHtoD_v2(CUdeviceptr pointer, const void *host, size_t bytes);
CUresult cuMemcpyDtoH_v2(void *host, CUdeviceptr pointer, size_t bytes);
CUresult cuCtxSynchronize(void);

/* Two sm_90 devices: no test sets the scene in the program's process. */
__attribute__((constructor)) static void begin(void) { fake_reset(); }

EXPORT CUresult cuMemAlloc_v2(CUdeviceptr *pointer, size_t bytes) {
  *pointer = (CUdeviceptr)(uintptr_t)aligned_alloc(256, (bytes + 255) / 256 * 256);
  memset((void *)(uintptr_t)*pointer, 0, bytes);
  return 0;
}

EXPORT CUresult cuMemFree_v2(CUdeviceptr pointer) {
  free((void *)(uintptr_t)pointer);
  return 0;
}

EXPORT CUresult cuMemcpyHtoD_v2(CUdeviceptr pointer, const void *host, size_t bytes) {
  memcpy((void *)(uintptr_t)pointer, host, bytes);
  return 0;
}

EXPORT CUresult cuMemcpyDtoH_v2(void *host, CUdeviceptr pointer, size_t bytes) {
  memcpy(host, (const void *)(uintptr_t)pointer, bytes);
  return 0;
}

/* A running sum over the keys, unlike the reference in the program. */
static void attend(const float *q, const float *k, const float *v, float *out, float scale, int row) {
  double most = -INFINITY, sum = 0, mean[HEAD_SIZE] = {0};
  for (int j = 0; j <= row; j++) {
    double score = 0;
    for (int d = 0; d < HEAD_SIZE; d++) score += (double)q[row * HEAD_SIZE + d] * (double)k[j * HEAD_SIZE + d];
    score *= (double)scale;
    const double old = most;
    most = fmax(most, score);
    const double shrink = exp(old - most), weight = exp(score - most);
    sum = sum * shrink + weight;
    for (int d = 0; d < HEAD_SIZE; d++) mean[d] = mean[d] * shrink + weight * (double)v[j * HEAD_SIZE + d];
  }
  for (int d = 0; d < HEAD_SIZE; d++) out[row * HEAD_SIZE + d] = (float)(mean[d] / sum);
}

EXPORT CUresult cuCtxSynchronize(void) {
  static unsigned long done;
  const char *kernel = getenv("FAKE_KERNEL");
  for (fake_launch launch; done < fake_launch_count(); done++) {
    if (!fake_get_launch(done, &launch)) return 1;
    float *tensors[6];
    float scale;
    int32_t sizes[3];
    memcpy(tensors, launch.params, sizeof tensors);
    memcpy(&scale, launch.params + sizeof tensors, sizeof scale);
    memcpy(sizes, launch.params + sizeof tensors + sizeof scale, sizeof sizes);
    const int seq = sizes[2];
    for (int head = 0; head < sizes[0] * sizes[1]; head++) {
      const size_t at = (size_t)head * (size_t)seq * HEAD_SIZE;
      for (int row = 0; row < seq && !(kernel && strcmp(kernel, "none") == 0); row++)
        attend(tensors[3] + at, tensors[4] + at, tensors[5] + at, tensors[0] + at, scale, row);
    }
  }
  return 0;
}
