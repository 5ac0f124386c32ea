/* A CUDA driver of make-believe, for tests: it runs no kernel, but it refuses what a driver refuses, and remembers the rest.
 *
 * It reads the real machine code it is given (architecture, kernels, the size of each parameter), so a launch is recorded
 * with the very bytes that a GPU's kernel would have seen. The fake_ functions are for tests to set the scene and to look.
 */
#ifndef FAKE_CUDA_H
#define FAKE_CUDA_H

#include <stddef.h>
#include <stdint.h>

typedef int CUresult;
typedef int CUdevice;
typedef struct CUctx_st *CUcontext;
typedef struct CUmod_st *CUmodule;
typedef struct CUfunc_st *CUfunction;
typedef struct CUstream_st *CUstream;
typedef struct CUevent_st *CUevent;

enum { FAKE_MAX_PARAMS = 128, FAKE_PARAM_BYTES = 4096 };

/* One launch, as the driver saw it. */
typedef struct {
  const char *kernel;
  const void *image; /* the machine code: its address and size */
  size_t image_size;
  unsigned grid[3];
  unsigned block[3];
  unsigned shared;
  CUstream stream;
  CUdevice device;
  int dependent; /* whether it may start before the kernel before it has ended */
  unsigned cluster[3]; /* blocks of a cluster along x, y, z; zeros: launched without that attribute */
  unsigned param_count;
  unsigned short param_sizes[FAKE_MAX_PARAMS];
  unsigned char params[FAKE_PARAM_BYTES]; /* one after the other */
} fake_launch;

/* A stream that was made to wait for what another had queued, and how many launches there were by then. */
typedef struct {
  CUstream stream, earlier;
  unsigned long launches;
} fake_wait;

/* What cuLaunchKernelEx takes, laid out as cuda.h's CUlaunchConfig and CUlaunchAttribute. */
typedef struct {
  int id;
  char unused[4];
  union {
    int serialization;
    unsigned cluster[3];
    char all[64];
  } value;
} fake_launch_attribute;
typedef struct {
  unsigned grid[3], block[3], shared;
  CUstream stream;
  const fake_launch_attribute *attributes;
  unsigned attribute_count;
} fake_launch_config;

/* What cuTensorMapEncodeTiled makes: not a GPU's map, but all that it was told. Arrays innermost first, 0 beyond the rank. */
typedef struct {
  uint64_t address;
  uint64_t flags; /* all ones; launchers correct bit 21 for some drivers */
  uint64_t strides[4];
  uint32_t sizes[5];
  uint16_t box[5];
  uint8_t element_strides[5];
  uint8_t rank, data_type, interleave, swizzle, l2_promotion, fill;
} fake_map;

/* Two sm_90 devices with nothing loaded, no current context, no faults, empty records. */
void fake_reset(void);
void fake_set_device_count(int count);
void fake_set_device(CUdevice device, int capability, int shared_optin);
void fake_set_bandwidth(CUdevice device, int clock, int bus);
void fake_set_driver_version(int version);

/* Memory of a device, for cuPointerGetAttribute, which kernels find at another address, maybe (some of the host's); of size
 * 0: gone again. Addresses that nobody set are unknown to it. */
void fake_set_memory(uint64_t begin, uint64_t size, CUdevice device, uint64_t on_device);
/* The context that a stream goes with, in which alone it takes launches; NULL: gone again. Others go with any. */
void fake_set_stream(CUstream stream, CUcontext context);
/* The first device may access the other's memory. */
void fake_set_peer(CUdevice device, CUdevice other);

CUcontext fake_create_context(CUdevice device);
void fake_destroy_context(CUcontext context);
/* Another context takes the address of this one: the same pointer, a new id, nothing loaded. */
void fake_recreate_context(CUcontext context);
/* For the calling thread; NULL for none. */
void fake_make_current(CUcontext context);

/* The function returns status at `times` calls (-1: at all), after it has worked `after` times more; calls in a context of
 * that device (-1: any) are meant. */
int fake_inject(const char *function, CUresult status, int after, int times, CUdevice device);
unsigned long fake_calls(const char *function);

/* From now on, the calling thread may do nothing that a stream capture forbids; each attempt fails and is counted. */
void fake_begin_capture(void);
void fake_end_capture(void);
unsigned fake_violations(void);
const char *fake_last_violation(void);

unsigned long fake_launch_count(void);
int fake_get_launch(unsigned long index, fake_launch *launch);
unsigned fake_modules_loaded(void);
unsigned long fake_wait_count(void);
int fake_get_wait(unsigned long index, fake_wait *wait);
unsigned fake_events_alive(void);

#endif
