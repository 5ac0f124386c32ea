/* The functions of the CUDA driver that these programs call, without the CUDA toolkit: opened as the library opens them, from
 * libcuda.so.1 or from what the environment variable PYFMHA_LIBCUDA names. A program with cuda.h includes that instead. */
#ifndef DRIVER_H
#define DRIVER_H

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>

#include "pyfmha_runtime.h" /* CUresult, CUdeviceptr, CUstream */

typedef int (*driver_init)(unsigned flags);
typedef int (*driver_retain)(void **context, int device);
typedef int (*driver_release)(int device);
typedef int (*driver_make_current)(void *context);
typedef int (*driver_alloc)(CUdeviceptr *pointer, size_t bytes);
typedef int (*driver_free)(CUdeviceptr pointer);
typedef int (*driver_to_device)(CUdeviceptr pointer, const void *host, size_t bytes);
typedef int (*driver_to_host)(void *host, CUdeviceptr pointer, size_t bytes);
typedef int (*driver_wait)(void);

typedef struct {
  driver_retain retain;
  driver_release release;
  driver_make_current make_current;
  driver_alloc alloc;
  driver_free free;
  driver_to_device to_device;
  driver_to_host to_host;
  driver_wait wait;
} driver;

static void *driver_function(void *library, const char *name) {
  void *found = dlsym(library, name);
  if (found == NULL) {
    fprintf(stderr, "error: the CUDA driver has no %s\n", name);
    exit(2);
  }
  return found;
}

/* Ends the program where a call failed: what it did, and the driver's number. */
static void driver_check(int status, const char *what) {
  if (status != 0) {
    fprintf(stderr, "error: %s: CUDA error %d\n", what, status);
    exit(2);
  }
}

/* Opens the driver and makes the primary context of device 0 current, as torch, TensorRT and the CUDA runtime do. */
static driver driver_open(void) {
  const char *named = getenv("PYFMHA_LIBCUDA");
  void *library = dlopen(named ? named : "libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
  if (library == NULL) {
    fprintf(stderr, "error: no CUDA driver: %s\n", dlerror());
    exit(2);
  }
  driver cuda;
  cuda.retain = (driver_retain)driver_function(library, "cuDevicePrimaryCtxRetain");
  cuda.release = (driver_release)driver_function(library, "cuDevicePrimaryCtxRelease_v2");
  cuda.make_current = (driver_make_current)driver_function(library, "cuCtxSetCurrent");
  cuda.alloc = (driver_alloc)driver_function(library, "cuMemAlloc_v2");
  cuda.free = (driver_free)driver_function(library, "cuMemFree_v2");
  cuda.to_device = (driver_to_device)driver_function(library, "cuMemcpyHtoD_v2");
  cuda.to_host = (driver_to_host)driver_function(library, "cuMemcpyDtoH_v2");
  cuda.wait = (driver_wait)driver_function(library, "cuCtxSynchronize");
  driver_check(((driver_init)driver_function(library, "cuInit"))(0), "cuInit");
  void *context = NULL;
  driver_check(cuda.retain(&context, 0), "the context of device 0");
  driver_check(cuda.make_current(context), "cuCtxSetCurrent");
  return cuda;
}

#endif
