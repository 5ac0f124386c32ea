/* See fake_cuda.h. Where a rule comes from the driver's documentation, the function's comment there is followed. */
#define _GNU_SOURCE
#include "fake_cuda.h"

#include <elf.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { /* CUresult */
  SUCCESS = 0,
  INVALID_VALUE = 1,
  NOT_INITIALIZED = 3,
  NO_DEVICE = 100,
  INVALID_DEVICE = 101,
  INVALID_IMAGE = 200,
  INVALID_CONTEXT = 201,
  NO_BINARY_FOR_GPU = 209,
  INVALID_HANDLE = 400,
  NOT_FOUND = 500,
  CONTEXT_IS_DESTROYED = 709,
  NOT_SUPPORTED = 801,
  STREAM_CAPTURE_UNSUPPORTED = 900,
  INVALID_CLUSTER_SIZE = 912
};
enum { /* CUdevice_attribute, CUfunction_attribute */
  MAX_THREADS_PER_BLOCK = 1,
  MULTIPROCESSOR_COUNT = 16,
  MEMORY_CLOCK = 36,
  MEMORY_BUS = 37,
  CAPABILITY_MAJOR = 75,
  CAPABILITY_MINOR = 76,
  PAGEABLE_ACCESS = 88,
  SHARED_OPTIN = 97,
  MAX_DYNAMIC_SHARED = 8,
  SHARED_CARVEOUT = 9
};
enum { MACHINE_CUDA = 190, ABI_NEW_FLAGS = 8, SHARED_DEFAULT = 48 * 1024 };
enum { MAX_DEVICES = 16, MAX_CONTEXTS = 256, MAX_MODULES = 1 << 15, MAX_LAUNCHES = 1 << 14, MAX_FUNCTIONS = 64, MAX_BLOCKS = 4096, MAX_EVENTS = 4096 };

typedef struct {
  int capability;
  int shared_optin;
  int memory_clock; /* kHz */
  int memory_bus;   /* bits */
} device;

struct CUctx_st {
  CUdevice device;
  unsigned long long id; /* never given twice, resets included */
  bool alive;
  unsigned retained;
};

struct CUfunc_st {
  CUmodule module;
  char name[128];
  unsigned shared_allowed;
  unsigned threads_required; /* 0: any */
  unsigned param_count;
  unsigned param_sizes[FAKE_MAX_PARAMS];
};

struct CUmod_st {
  CUcontext context;
  unsigned long long context_id;
  const unsigned char *image;
  size_t image_size;
  bool alive;
  struct CUfunc_st function; /* Triton's modules hold one kernel each */
};

typedef struct {
  char name[48];
  unsigned long calls;
  CUresult status;
  int after;
  int times;
  int device; /* of the current context, for it to fail; -1: any */
} call_record;

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static device devices[MAX_DEVICES];
static int device_count;
static bool initialized;
static struct CUctx_st contexts[MAX_CONTEXTS];
static struct CUctx_st primary[MAX_DEVICES];
static unsigned context_count;
static unsigned long long last_context_id;
static struct CUmod_st *modules; /* slots are never used twice, so that a stale handle is known as such */
static unsigned module_count;
static fake_launch *launches;
static unsigned long launch_count;
static call_record calls[MAX_FUNCTIONS];
static struct fake_block {
  uint64_t begin, end; /* device memory; equal: none */
  uint64_t on_device;  /* where kernels find it */
  CUdevice device;
} blocks[MAX_BLOCKS];
static struct {
  CUstream stream; /* NULL: none */
  CUcontext context;
} streams[MAX_BLOCKS];
static int stream_count; /* places that were ever taken */
static struct CUevent_st {
  bool alive, recorded;
  CUstream stream;
} events[MAX_EVENTS];
static unsigned event_count;
static fake_wait waits[MAX_EVENTS];
static unsigned long wait_count;
static bool peers[MAX_DEVICES][MAX_DEVICES]; /* whether the first may access the second's memory */
static unsigned violations;
static char last_violation[48];
static int driver_version = 13000;
static unsigned long generation; /* of fake_reset: a thread's current context does not survive one */

static _Thread_local CUcontext current;
static _Thread_local unsigned long current_generation;
static _Thread_local bool capturing;

#define EXPORT __attribute__((visibility("default")))

/* ------------------------------------------------------------------ calls */

static call_record *record_of(const char *name) {
  for (int i = 0; i < MAX_FUNCTIONS; i++) {
    if (calls[i].name[0] == '\0') snprintf(calls[i].name, sizeof calls[i].name, "%s", name);
    if (strcmp(calls[i].name, name) == 0) return &calls[i];
  }
  abort(); /* MAX_FUNCTIONS is too small */
}

static CUcontext current_context(void) { return current_generation == generation ? current : NULL; }

static bool fails_here(const call_record *record) {
  const CUcontext context = current_context();
  return record->device < 0 || (context != NULL && context->device == record->device);
}

/* Begins a driver call under the mutex: counts it, and tells whether it is to fail. The record is looked up once: a launch
 * is timed with this driver, so it must cost as little as a real one's bookkeeping. */
static CUresult enter_call(call_record **cached, const char *name, bool needs_init, bool capturable) {
  pthread_mutex_lock(&mutex);
  if (*cached == NULL) *cached = record_of(name);
  call_record *record = *cached;
  record->calls++;
  if (capturing && !capturable) {
    violations++;
    snprintf(last_violation, sizeof last_violation, "%s", name);
    return STREAM_CAPTURE_UNSUPPORTED;
  }
  if (record->times != 0 && fails_here(record) && record->after-- <= 0) {
    if (record->times > 0) record->times--;
    record->after = 0;
    return record->status;
  }
  return needs_init && !initialized ? NOT_INITIALIZED : SUCCESS;
}

#define ENTER(status, name, needs_init, capturable) \
  static call_record *cached_record;                \
  status = enter_call(&cached_record, name, needs_init, capturable)

static CUresult leave(CUresult status) {
  pthread_mutex_unlock(&mutex);
  return status;
}

static void set_current(CUcontext context) {
  current = context;
  current_generation = generation;
}

/* ------------------------------------------------------------------ images */

static const Elf64_Shdr *sections_of(const unsigned char *image) {
  return (const Elf64_Shdr *)(const void *)(image + ((const Elf64_Ehdr *)(const void *)image)->e_shoff);
}

static size_t size_of(const unsigned char *image) {
  const Elf64_Ehdr *header = (const Elf64_Ehdr *)(const void *)image;
  const Elf64_Shdr *sections = sections_of(image);
  size_t end = header->e_shoff + (size_t)header->e_shnum * header->e_shentsize;
  const size_t segments = header->e_phoff + (size_t)header->e_phnum * header->e_phentsize;
  if (segments > end) end = segments;
  for (int i = 0; i < header->e_shnum; i++)
    if (sections[i].sh_type != SHT_NOBITS && sections[i].sh_offset + sections[i].sh_size > end)
      end = sections[i].sh_offset + sections[i].sh_size;
  return end;
}

/* Found by compiling for each: ptxas 12.9 (ABI 7) keeps the architecture in bits 0-7 of the flags, ptxas 13.4 (ABI 8) in
 * bits 8-15, where sm_90 means sm_90a: that is what Triton 3.9 assembles from 9.0 on. */
static int capability_of(const unsigned char *image) {
  const Elf64_Ehdr *header = (const Elf64_Ehdr *)(const void *)image;
  const unsigned flags = header->e_flags;
  return (int)(header->e_ident[EI_ABIVERSION] >= ABI_NEW_FLAGS ? flags >> 8 & 0xff : flags & 0xff);
}

static bool runs_on(int code, int capability) {
  return code >= 90 ? code == capability : code / 10 == capability / 10 && code <= capability;
}

/* What a kernel's .nv.info section says: the size of each parameter, and the block that it demands. */
static void read_info(const unsigned char *info, size_t size, CUfunction function) {
  enum { FORMAT_VALUES = 4, KPARAM_INFO = 0x17, REQNTID = 0x10 };
  for (size_t at = 0; at + 4 <= size;) {
    uint16_t bytes;
    memcpy(&bytes, info + at + 2, sizeof bytes);
    uint32_t words[3] = {0, 0, 0};
    if (info[at] != FORMAT_VALUES) bytes = 0; /* the value is in the entry itself */
    if (bytes >= sizeof words && at + 4 + sizeof words <= size) memcpy(words, info + at + 4, sizeof words);
    if (info[at + 1] == KPARAM_INFO && bytes >= sizeof words) {
      const unsigned ordinal = words[1] & 0xffff;
      if (ordinal < FAKE_MAX_PARAMS) function->param_sizes[ordinal] = words[2] >> 18;
      if (ordinal < FAKE_MAX_PARAMS && ordinal + 1 > function->param_count) function->param_count = ordinal + 1;
    }
    if (info[at + 1] == REQNTID && bytes >= sizeof words) function->threads_required = words[0];
    at += 4u + bytes;
  }
}

static bool find_kernel(const unsigned char *image, const char *name, CUfunction function) {
  const Elf64_Ehdr *header = (const Elf64_Ehdr *)(const void *)image;
  const Elf64_Shdr *sections = sections_of(image);
  const char *section_names = (const char *)image + sections[header->e_shstrndx].sh_offset;
  char info_name[160];
  snprintf(info_name, sizeof info_name, ".nv.info.%s", name);
  bool found = false;
  for (int i = 0; i < header->e_shnum; i++) {
    if (sections[i].sh_type == SHT_SYMTAB) {
      const Elf64_Sym *symbols = (const Elf64_Sym *)(const void *)(image + sections[i].sh_offset);
      const char *names = (const char *)image + sections[sections[i].sh_link].sh_offset;
      for (size_t s = 0; s < sections[i].sh_size / sizeof *symbols; s++)
        if (ELF64_ST_TYPE(symbols[s].st_info) == STT_FUNC && ELF64_ST_BIND(symbols[s].st_info) == STB_GLOBAL &&
            strcmp(names + symbols[s].st_name, name) == 0)
          found = true;
    }
    if (strcmp(section_names + sections[i].sh_name, info_name) == 0)
      read_info(image + sections[i].sh_offset, sections[i].sh_size, function);
  }
  return found;
}

/* ------------------------------------------------------------- the driver */

EXPORT CUresult cuInit(unsigned flags) {
  CUresult status;
  ENTER(status, "cuInit", false, true);
  if (status == SUCCESS && flags != 0) status = INVALID_VALUE;
  if (status == SUCCESS && device_count == 0) status = NO_DEVICE;
  if (status == SUCCESS) initialized = true;
  return leave(status);
}

EXPORT CUresult cuDriverGetVersion(int *version) {
  CUresult status;
  ENTER(status, "cuDriverGetVersion", false, true);
  if (status == SUCCESS) *version = driver_version;
  return leave(status);
}

EXPORT CUresult cuDeviceGetCount(int *count) {
  CUresult status;
  ENTER(status, "cuDeviceGetCount", true, true);
  if (status == SUCCESS) *count = device_count;
  return leave(status);
}

EXPORT CUresult cuDeviceGet(CUdevice *found, int ordinal) {
  CUresult status;
  ENTER(status, "cuDeviceGet", true, true);
  if (status == SUCCESS && (ordinal < 0 || ordinal >= device_count)) status = INVALID_DEVICE;
  if (status == SUCCESS) *found = ordinal;
  return leave(status);
}

EXPORT CUresult cuDeviceGetName(char *name, int size, CUdevice number) {
  CUresult status;
  ENTER(status, "cuDeviceGetName", true, true);
  if (status == SUCCESS && (number < 0 || number >= device_count)) status = INVALID_DEVICE;
  if (status == SUCCESS) snprintf(name, (size_t)size, "Fake GPU %d", number);
  return leave(status);
}

EXPORT CUresult cuDeviceGetAttribute(int *value, int attribute, CUdevice number) {
  CUresult status;
  ENTER(status, "cuDeviceGetAttribute", true, true);
  if (status == SUCCESS && (number < 0 || number >= device_count)) status = INVALID_DEVICE;
  if (status != SUCCESS) return leave(status);
  switch (attribute) {
    case MAX_THREADS_PER_BLOCK: *value = 1024; break;
    case MULTIPROCESSOR_COUNT: *value = 132; break;
    case MEMORY_CLOCK: *value = devices[number].memory_clock; break;
    case MEMORY_BUS: *value = devices[number].memory_bus; break;
    case CAPABILITY_MAJOR: *value = devices[number].capability / 10; break;
    case CAPABILITY_MINOR: *value = devices[number].capability % 10; break;
    case PAGEABLE_ACCESS: *value = 0; break;
    case SHARED_OPTIN: *value = devices[number].shared_optin; break;
    default: status = INVALID_VALUE;
  }
  return leave(status);
}

EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice number) {
  CUresult status;
  ENTER(status, "cuDevicePrimaryCtxRetain", true, false);
  if (status == SUCCESS && (number < 0 || number >= device_count)) status = INVALID_DEVICE;
  if (status == SUCCESS) {
    *context = &primary[number];
    if (primary[number].retained++ == 0)
      primary[number] = (struct CUctx_st){.device = number, .id = ++last_context_id, .alive = true, .retained = 1};
  }
  return leave(status);
}

static void drop_modules(CUcontext context) {
  for (unsigned i = 0; i < module_count; i++)
    if (modules[i].context == context) modules[i].alive = false;
}

EXPORT CUresult cuDevicePrimaryCtxRelease_v2(CUdevice number) {
  CUresult status;
  ENTER(status, "cuDevicePrimaryCtxRelease", true, false);
  if (status == SUCCESS && (number < 0 || number >= device_count)) status = INVALID_DEVICE;
  if (status == SUCCESS && primary[number].retained == 0) status = INVALID_CONTEXT;
  if (status == SUCCESS && --primary[number].retained == 0) {
    primary[number].alive = false;
    drop_modules(&primary[number]);
  }
  return leave(status);
}

EXPORT CUresult cuDevicePrimaryCtxRelease(CUdevice number) { return cuDevicePrimaryCtxRelease_v2(number); }

EXPORT CUresult cuCtxSetCurrent(CUcontext context) {
  CUresult status;
  ENTER(status, "cuCtxSetCurrent", true, true);
  if (status == SUCCESS) set_current(context);
  return leave(status);
}

EXPORT CUresult cuCtxGetCurrent(CUcontext *context) {
  CUresult status;
  ENTER(status, "cuCtxGetCurrent", true, true);
  if (status == SUCCESS) *context = current_context();
  return leave(status);
}

EXPORT CUresult cuCtxGetDevice(CUdevice *number) {
  CUresult status;
  ENTER(status, "cuCtxGetDevice", true, true);
  if (status == SUCCESS && current_context() == NULL) status = INVALID_CONTEXT;
  if (status == SUCCESS) *number = current_context()->device;
  return leave(status);
}

static int block_of(uint64_t address) {
  for (int i = 0; i < MAX_BLOCKS; i++)
    if (address >= blocks[i].begin && address < blocks[i].end) return i;
  return -1;
}

/* As driver 580 answers on two H200: the access flags say "read and write" whether or not the device has access. */
EXPORT CUresult cuPointerGetAttribute(void *value, int attribute, uint64_t address) {
  enum { DEVICE_POINTER = 3, DEVICE_ORDINAL = 9, ACCESS_FLAGS = 16, READ_WRITE = 3 };
  CUresult status;
  ENTER(status, "cuPointerGetAttribute", true, true);
  const CUcontext context = current_context();
  if (status == SUCCESS && context == NULL) status = INVALID_CONTEXT;
  const int found = block_of(address);
  if (status == SUCCESS && found < 0) status = INVALID_VALUE;
  if (status == SUCCESS) {
    const struct fake_block *block = &blocks[found];
    const uint64_t on_device = address - block->begin + block->on_device;
    const int answer = attribute == DEVICE_ORDINAL ? block->device : READ_WRITE;
    if (attribute == DEVICE_POINTER && (block->device == context->device || peers[context->device][block->device]))
      memcpy(value, &on_device, sizeof on_device);
    else if (attribute == DEVICE_ORDINAL || attribute == ACCESS_FLAGS)
      memcpy(value, &answer, sizeof answer);
    else
      status = INVALID_VALUE;
  }
  return leave(status);
}

#ifndef FAKE_WITHOUT_CONTEXT_IDS /* drivers before CUDA 12 lack it */
EXPORT CUresult cuCtxGetId(CUcontext context, unsigned long long *id) {
  CUresult status;
  ENTER(status, "cuCtxGetId", true, true);
  if (status == SUCCESS && context == NULL) context = current_context();
  if (status == SUCCESS && context == NULL) status = INVALID_CONTEXT;
  if (status == SUCCESS && !context->alive) status = CONTEXT_IS_DESTROYED;
  if (status == SUCCESS) *id = context->id;
  return leave(status);
}
#endif

EXPORT CUresult cuModuleLoadData(CUmodule *module, const void *code) {
  CUresult status;
  ENTER(status, "cuModuleLoadData", true, false);
  const unsigned char *image = code;
  const CUcontext context = current_context();
  if (status == SUCCESS && context == NULL) status = INVALID_CONTEXT;
  if (status == SUCCESS && !context->alive) status = CONTEXT_IS_DESTROYED;
  if (status == SUCCESS && (memcmp(image, ELFMAG, SELFMAG) != 0 || image[EI_CLASS] != ELFCLASS64 ||
                            ((const Elf64_Ehdr *)(const void *)image)->e_machine != MACHINE_CUDA))
    status = INVALID_IMAGE;
  if (status == SUCCESS && !runs_on(capability_of(image), devices[context->device].capability)) status = NO_BINARY_FOR_GPU;
  if (status == SUCCESS) {
    if (module_count == MAX_MODULES) abort(); /* too small for the test at hand */
    *module = &modules[module_count++];
    **module = (struct CUmod_st){
        .context = context, .context_id = context->id, .image = image, .image_size = size_of(image), .alive = true};
  }
  return leave(status);
}

EXPORT CUresult cuModuleUnload(CUmodule module) {
  CUresult status;
  ENTER(status, "cuModuleUnload", true, false);
  if (status == SUCCESS && (module == NULL || !module->alive)) status = INVALID_HANDLE;
  if (status == SUCCESS) module->alive = false;
  return leave(status);
}

EXPORT CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  CUresult status;
  ENTER(status, "cuModuleGetFunction", true, false);
  if (status == SUCCESS && (module == NULL || !module->alive)) status = INVALID_HANDLE;
  if (status == SUCCESS) {
    struct CUfunc_st made = {.module = module, .shared_allowed = SHARED_DEFAULT};
    snprintf(made.name, sizeof made.name, "%s", name);
    if (find_kernel(module->image, name, &made)) {
      module->function = made;
      *function = &module->function;
    } else {
      status = NOT_FOUND;
    }
  }
  return leave(status);
}

EXPORT CUresult cuFuncSetAttribute(CUfunction function, int attribute, int value) {
  CUresult status;
  ENTER(status, "cuFuncSetAttribute", true, false);
  if (status == SUCCESS && (function == NULL || !function->module->alive)) status = INVALID_HANDLE;
  const int most = attribute == SHARED_CARVEOUT ? 100 : devices[function != NULL ? function->module->context->device : 0].shared_optin;
  if (status == SUCCESS && ((attribute != MAX_DYNAMIC_SHARED && attribute != SHARED_CARVEOUT) || value < 0 || value > most))
    status = INVALID_VALUE;
  if (status == SUCCESS && attribute == MAX_DYNAMIC_SHARED) function->shared_allowed = (unsigned)value;
  return leave(status);
}

static CUresult check_launch(CUfunction function, const fake_launch_config *config) {
  const unsigned *grid = config->grid, *block = config->block;
  if (function == NULL || !function->module->alive) return INVALID_HANDLE;
  const CUcontext context = current_context();
  if (context == NULL || function->module->context != context || function->module->context_id != context->id)
    return INVALID_CONTEXT;
  for (int i = 0; i < stream_count; i++) /* as two H200 answer, for a stream of another context of the device, too */
    if (streams[i].stream != NULL && streams[i].stream == config->stream && streams[i].context != context) return INVALID_HANDLE;
  for (int i = 0; i < 3; i++)
    if (grid[i] == 0 || grid[i] > (i == 0 ? 0x7fffffffu : 65535u) || block[i] == 0) return INVALID_VALUE;
  const unsigned threads = block[0] * block[1] * block[2];
  if (threads > 1024 || (function->threads_required != 0 && threads != function->threads_required)) return INVALID_VALUE;
  return config->shared > function->shared_allowed ? INVALID_VALUE : SUCCESS;
}

/* What a launch's attributes say. */
typedef struct {
  int dependent;
  unsigned cluster[3]; /* zeros: not said */
} launch_wishes;

static void record_launch(CUfunction function, const fake_launch_config *config, void **params, const launch_wishes *wishes) {
  if (launch_count < MAX_LAUNCHES) {
    fake_launch *launch = &launches[launch_count];
    launch->kernel = function->name;
    launch->image = function->module->image;
    launch->image_size = function->module->image_size;
    memcpy(launch->grid, config->grid, sizeof launch->grid);
    memcpy(launch->block, config->block, sizeof launch->block);
    launch->shared = config->shared;
    launch->stream = config->stream;
    launch->device = function->module->context->device;
    launch->dependent = wishes->dependent;
    memcpy(launch->cluster, wishes->cluster, sizeof launch->cluster);
    launch->param_count = function->param_count;
    for (unsigned i = 0, at = 0; i < function->param_count; i++) {
      const unsigned size = function->param_sizes[i];
      if (at + size > FAKE_PARAM_BYTES) abort(); /* more than a kernel can have */
      launch->param_sizes[i] = (unsigned short)size;
      memcpy(launch->params + at, params[i], size);
      at += size;
    }
  }
  launch_count++;
}

EXPORT CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                               unsigned block_y, unsigned block_z, unsigned shared, CUstream stream, void **params,
                               void **extra) {
  CUresult status;
  ENTER(status, "cuLaunchKernel", true, true);
  const fake_launch_config config = {
      {grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, shared, stream, .attributes = NULL, .attribute_count = 0};
  if (status == SUCCESS && extra != NULL) status = INVALID_VALUE;
  if (status == SUCCESS) status = check_launch(function, &config);
  if (status == SUCCESS) record_launch(function, &config, params, &(launch_wishes){0});
  return leave(status);
}

#ifndef FAKE_WITHOUT_LAUNCH_ATTRIBUTES /* drivers before CUDA 11.8 lack it */
/* The dimensions of a cluster are 1 or more and divide the grid's; 8 blocks are what every device with clusters takes. */
static CUresult check_cluster(const unsigned *cluster, const unsigned *grid) {
  unsigned long long blocks = 1;
  for (int i = 0; i < 3; i++) {
    if (cluster[i] == 0 || grid[i] % cluster[i] != 0) return INVALID_VALUE;
    blocks *= cluster[i];
  }
  return blocks > 8 ? INVALID_CLUSTER_SIZE : SUCCESS;
}

static CUresult read_attribute(const fake_launch_attribute *attribute, const unsigned *grid, launch_wishes *wishes) {
  enum { CLUSTER_DIMENSION = 4, PROGRAMMATIC_STREAM_SERIALIZATION = 6 };
  switch (attribute->id) {
    case CLUSTER_DIMENSION:
      memcpy(wishes->cluster, attribute->value.cluster, sizeof wishes->cluster);
      return check_cluster(wishes->cluster, grid);
    case PROGRAMMATIC_STREAM_SERIALIZATION:
      wishes->dependent = attribute->value.serialization;
#ifdef FAKE_REFUSES_DEPENDENT_LAUNCH
      return NOT_SUPPORTED;
#endif
      return SUCCESS;
    default: return INVALID_VALUE;
  }
}

/* Knows two attributes, and takes them of a device that has them only. */
EXPORT CUresult cuLaunchKernelEx(const fake_launch_config *config, CUfunction function, void **params, void **extra) {
  CUresult status;
  ENTER(status, "cuLaunchKernelEx", true, true);
  launch_wishes wishes = {0};
  if (status == SUCCESS && extra != NULL) status = INVALID_VALUE;
  if (status == SUCCESS) status = check_launch(function, config);
  for (unsigned i = 0; status == SUCCESS && i < config->attribute_count; i++)
    status = read_attribute(&config->attributes[i], config->grid, &wishes);
  if (status == SUCCESS && (wishes.dependent || wishes.cluster[0]) && devices[function->module->context->device].capability < 90)
    status = INVALID_VALUE;
  if (status == SUCCESS) record_launch(function, config, params, &wishes);
  return leave(status);
}
#endif

#ifndef FAKE_WITHOUT_TENSOR_MAPS /* drivers before CUDA 12 lack it */
/* See "cuTensorMapEncodeTiled" of the CUDA driver API for what it refuses. */
static CUresult check_map(const void *map, int data_type, uint32_t rank, uint64_t address, const uint64_t *sizes,
                          const uint64_t *strides, const uint32_t *box, const uint32_t *element_strides, int swizzle) {
  static const unsigned bytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
  if (rank < 1 || rank > 5 || data_type < 0 || data_type > 12 || (uintptr_t)map % 64 != 0) return INVALID_VALUE;
  if (address == 0 || address % 16 != 0 || swizzle < 0 || swizzle > 3) return INVALID_VALUE;
  for (uint32_t i = 0; i < rank; i++) {
    if (sizes[i] == 0 || sizes[i] > UINT64_C(1) << 32 || box[i] == 0 || box[i] > 256) return INVALID_VALUE;
    if (element_strides[i] == 0 || element_strides[i] > 8) return INVALID_VALUE;
    if (i + 1 < rank && (strides[i] == 0 || strides[i] % 16 != 0 || strides[i] >= UINT64_C(1) << 40)) return INVALID_VALUE;
  }
  const unsigned inner = box[0] * bytes[data_type];
  return inner % 16 != 0 || (swizzle != 0 && inner > 16u << swizzle) ? INVALID_VALUE : SUCCESS;
}

EXPORT CUresult cuTensorMapEncodeTiled(void *map, int data_type, uint32_t rank, void *address, const uint64_t *sizes,
                                       const uint64_t *strides, const uint32_t *box, const uint32_t *element_strides,
                                       int interleave, int swizzle, int l2_promotion, int fill) {
  CUresult status;
  ENTER(status, "cuTensorMapEncodeTiled", false, true);
  if (status == SUCCESS)
    status = check_map(map, data_type, rank, (uintptr_t)address, sizes, strides, box, element_strides, swizzle);
  if (status != SUCCESS) return leave(status);
  fake_map made = {.address = (uintptr_t)address, .flags = UINT64_MAX, .rank = (uint8_t)rank, .data_type = (uint8_t)data_type};
  made.interleave = (uint8_t)interleave;
  made.swizzle = (uint8_t)swizzle;
  made.l2_promotion = (uint8_t)l2_promotion;
  made.fill = (uint8_t)fill;
  for (uint32_t i = 0; i < rank; i++) {
    made.sizes[i] = (uint32_t)sizes[i];
    made.box[i] = (uint16_t)box[i];
    made.element_strides[i] = (uint8_t)element_strides[i];
    if (i + 1 < rank) made.strides[i] = strides[i];
  }
  memset(map, 0, 128);
  memcpy(map, &made, sizeof made);
  return leave(status);
}
#endif

/* Events remember the stream that they were recorded on last, and waits are remembered for tests. */
EXPORT CUresult cuEventCreate(CUevent *event, unsigned flags) {
  CUresult status;
  ENTER(status, "cuEventCreate", true, true);
  (void)flags;
  if (status == SUCCESS && current_context() == NULL) status = INVALID_CONTEXT;
  if (status == SUCCESS && event_count == MAX_EVENTS) abort(); /* too small for the test at hand */
  if (status == SUCCESS) {
    *event = &events[event_count++];
    **event = (struct CUevent_st){.alive = true};
  }
  return leave(status);
}

EXPORT CUresult cuEventRecord(CUevent event, CUstream stream) {
  CUresult status;
  ENTER(status, "cuEventRecord", true, true);
  if (status == SUCCESS && (event == NULL || !event->alive)) status = INVALID_HANDLE;
  if (status == SUCCESS) *event = (struct CUevent_st){.alive = true, .recorded = true, .stream = stream};
  return leave(status);
}

EXPORT CUresult cuStreamWaitEvent(CUstream stream, CUevent event, unsigned flags) {
  CUresult status;
  ENTER(status, "cuStreamWaitEvent", true, true);
  if (status == SUCCESS && (event == NULL || !event->alive || flags != 0)) status = INVALID_HANDLE;
  if (status == SUCCESS && event->recorded) { /* of one that was never recorded, nothing is waited for */
    if (wait_count == MAX_EVENTS) abort();
    waits[wait_count] = (fake_wait){.stream = stream, .earlier = event->stream, .launches = launch_count};
    wait_count++;
  }
  return leave(status);
}

EXPORT CUresult cuEventDestroy_v2(CUevent event) {
  CUresult status;
  ENTER(status, "cuEventDestroy_v2", true, true);
  if (status == SUCCESS && (event == NULL || !event->alive)) status = INVALID_HANDLE;
  if (status == SUCCESS) event->alive = false;
  return leave(status);
}

EXPORT CUresult cuGetErrorString(CUresult status, const char **text) {
  switch (status) {
    case SUCCESS: *text = "no error"; return SUCCESS;
    case INVALID_VALUE: *text = "invalid argument"; return SUCCESS;
    case NOT_INITIALIZED: *text = "initialization error"; return SUCCESS;
    case NO_DEVICE: *text = "no CUDA-capable device is detected"; return SUCCESS;
    case INVALID_IMAGE: *text = "device kernel image is invalid"; return SUCCESS;
    case NO_BINARY_FOR_GPU: *text = "no kernel image is available for execution on the device"; return SUCCESS;
    case NOT_FOUND: *text = "named symbol not found"; return SUCCESS;
    default: *text = NULL; return INVALID_VALUE;
  }
}

EXPORT CUresult cuGetErrorName(CUresult status, const char **text) {
  *text = status == SUCCESS ? "CUDA_SUCCESS" : "CUDA_ERROR_FAKE";
  return SUCCESS;
}

/* -------------------------------------------------------------- for tests */

/* With the memory of an H100. */
static void set_device(CUdevice number, int capability, int shared_optin) {
  devices[number] = (device){capability, shared_optin, .memory_clock = 2619000, .memory_bus = 5120};
}

EXPORT void fake_reset(void) {
  pthread_mutex_lock(&mutex);
  if (modules == NULL) modules = calloc(MAX_MODULES, sizeof *modules);
  if (launches == NULL) launches = calloc(MAX_LAUNCHES, sizeof *launches);
  if (modules == NULL || launches == NULL) abort();
  for (int i = 0; i < MAX_DEVICES; i++) set_device(i, 90, 232448);
  device_count = 2;
  driver_version = 13000;
  initialized = false;
  for (unsigned i = 0; i < module_count; i++) modules[i].alive = false;
  memset(contexts, 0, sizeof contexts);
  memset(blocks, 0, sizeof blocks);
  memset(streams, 0, sizeof streams);
  stream_count = 0;
  memset(peers, 0, sizeof peers);
  memset(primary, 0, sizeof primary);
  context_count = 0;
  launch_count = 0;
  event_count = 0;
  wait_count = 0;
  for (int i = 0; i < MAX_FUNCTIONS; i++) { /* the names stay: records are looked up once */
    calls[i].calls = 0;
    calls[i].times = 0;
  }
  violations = 0;
  last_violation[0] = '\0';
  capturing = false;
  generation++;
  pthread_mutex_unlock(&mutex);
}

EXPORT void fake_set_device_count(int count) {
  pthread_mutex_lock(&mutex);
  device_count = count < MAX_DEVICES ? count : MAX_DEVICES;
  pthread_mutex_unlock(&mutex);
}

EXPORT void fake_set_device(CUdevice number, int capability, int shared_optin) {
  pthread_mutex_lock(&mutex);
  set_device(number, capability, shared_optin);
  pthread_mutex_unlock(&mutex);
}

EXPORT void fake_set_bandwidth(CUdevice number, int clock, int bus) {
  pthread_mutex_lock(&mutex);
  devices[number].memory_clock = clock;
  devices[number].memory_bus = bus;
  pthread_mutex_unlock(&mutex);
}

EXPORT void fake_set_driver_version(int version) {
  pthread_mutex_lock(&mutex);
  driver_version = version;
  pthread_mutex_unlock(&mutex);
}

EXPORT void fake_set_memory(uint64_t begin, uint64_t size, CUdevice number, uint64_t on_device) {
  pthread_mutex_lock(&mutex);
  int slot = block_of(begin);
  for (int i = 0; slot < 0 && i < MAX_BLOCKS; i++)
    if (blocks[i].end == 0) slot = i;
  if (slot < 0) abort(); /* too small for the test at hand */
  blocks[slot].begin = size > 0 ? begin : 0;
  blocks[slot].end = size > 0 ? begin + size : 0;
  blocks[slot].device = number;
  blocks[slot].on_device = on_device;
  pthread_mutex_unlock(&mutex);
}

EXPORT void fake_set_stream(CUstream stream, CUcontext context) {
  pthread_mutex_lock(&mutex);
  int slot = 0;
  while (slot < stream_count && streams[slot].stream != stream) slot++;
  if (slot == stream_count) /* a new one: the first free place */
    for (slot = 0; slot < stream_count && streams[slot].stream != NULL;) slot++;
  if (slot == MAX_BLOCKS) abort(); /* too small for the test at hand */
  if (slot == stream_count) stream_count++;
  streams[slot].stream = context == NULL ? NULL : stream;
  streams[slot].context = context;
  pthread_mutex_unlock(&mutex);
}

EXPORT void fake_set_peer(CUdevice number, CUdevice other) {
  pthread_mutex_lock(&mutex);
  peers[number][other] = true;
  pthread_mutex_unlock(&mutex);
}

EXPORT CUcontext fake_create_context(CUdevice number) {
  pthread_mutex_lock(&mutex);
  if (context_count == MAX_CONTEXTS) abort();
  CUcontext context = &contexts[context_count++];
  *context = (struct CUctx_st){.device = number, .id = ++last_context_id, .alive = true};
  initialized = true; /* whoever made a context has initialised the driver; a library does it once a process */
  pthread_mutex_unlock(&mutex);
  return context;
}

EXPORT void fake_destroy_context(CUcontext context) {
  pthread_mutex_lock(&mutex);
  context->alive = false;
  drop_modules(context);
  pthread_mutex_unlock(&mutex);
}

EXPORT void fake_recreate_context(CUcontext context) {
  pthread_mutex_lock(&mutex);
  drop_modules(context);
  context->id = ++last_context_id;
  context->alive = true;
  pthread_mutex_unlock(&mutex);
}

EXPORT void fake_make_current(CUcontext context) {
  pthread_mutex_lock(&mutex);
  set_current(context);
  pthread_mutex_unlock(&mutex);
}

EXPORT int fake_inject(const char *function, CUresult status, int after, int times, CUdevice number) {
  pthread_mutex_lock(&mutex);
  call_record *record = record_of(function);
  record->status = status;
  record->after = after;
  record->times = times;
  record->device = number;
  pthread_mutex_unlock(&mutex);
  return 0;
}

EXPORT unsigned long fake_calls(const char *function) {
  pthread_mutex_lock(&mutex);
  const unsigned long count = record_of(function)->calls;
  pthread_mutex_unlock(&mutex);
  return count;
}

EXPORT void fake_begin_capture(void) { capturing = true; }

EXPORT void fake_end_capture(void) { capturing = false; }

EXPORT unsigned fake_violations(void) {
  pthread_mutex_lock(&mutex);
  const unsigned count = violations;
  pthread_mutex_unlock(&mutex);
  return count;
}

EXPORT const char *fake_last_violation(void) { return last_violation; }

EXPORT unsigned long fake_launch_count(void) {
  pthread_mutex_lock(&mutex);
  const unsigned long count = launch_count;
  pthread_mutex_unlock(&mutex);
  return count;
}

EXPORT int fake_get_launch(unsigned long index, fake_launch *launch) {
  pthread_mutex_lock(&mutex);
  const bool held = index < launch_count && index < MAX_LAUNCHES;
  if (held) *launch = launches[index];
  pthread_mutex_unlock(&mutex);
  return held;
}

EXPORT unsigned long fake_wait_count(void) { return wait_count; }

EXPORT int fake_get_wait(unsigned long index, fake_wait *wait) {
  if (index >= wait_count) return 0;
  *wait = waits[index];
  return 1;
}

EXPORT unsigned fake_events_alive(void) {
  unsigned alive = 0;
  for (unsigned i = 0; i < event_count; i++) alive += events[i].alive;
  return alive;
}

EXPORT unsigned fake_modules_loaded(void) {
  pthread_mutex_lock(&mutex);
  unsigned count = 0;
  for (unsigned i = 0; i < module_count; i++) count += modules[i].alive;
  pthread_mutex_unlock(&mutex);
  return count;
}
