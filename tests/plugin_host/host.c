/* Plays TensorRT for the plugins of a library: no Python in the process, no headers of others.
 *
 * Reads one command a line and answers with one line that begins with "=", before which stand the lines of the logger:
 * "log SEVERITY TEXT". Words are parted by blanks, texts and bytes are in hexadecimal digits behind an "x", so that none is
 * empty. The layouts are written down here anew, not taken from the library's own sources: two hands that must agree.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <inttypes.h>
#include <malloc.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "fake_cuda.h"

enum { MAX_OBJECTS = 1 << 16, MAX_TENSORS = 64, MAX_TEXT = 1 << 20 };

/* ------------------------------------------------------------------ what TensorRT passes */

typedef struct {
  const char *name;
  const void *data;
  int32_t type, length;
} field;
typedef struct {
  int32_t count;
  const field *fields;
} fields;
typedef struct {
  int32_t count;
  int64_t size[8];
} dims;
typedef struct {
  dims shape;
  int32_t type, format;
  float scale;
} desc;
typedef struct {
  desc own;
  dims min, max, opt;
} dynamic;

typedef void function(void);
typedef struct {
  function *const *table;
} object; /* any of TensorRT's, or of the plugin's */

/* Slot `n` of an object's table, as a function of a certain type. */
#define SLOT(o, n, result, ...) ((result(*)(__VA_ARGS__))((const object *)(o))->table[n])

/* ------------------------------------------------------------------ sizes of axes: known, or not known to the plugin */

typedef struct {
  function *const *table;
  const object *impl;
  object behind;
  bool constant, empty;
  int64_t value;
} expression;
typedef struct {
  int32_t count;
  const expression *size[8];
} expressions;

static expression *pool[1 << 14];
static int pooled;

static bool is_constant(void *self) {
  const expression *e = (const expression *)((const char *)self - offsetof(expression, behind));
  return e->constant;
}
static int64_t constant_value(void *self) {
  const expression *e = (const expression *)((const char *)self - offsetof(expression, behind));
  return e->constant ? e->value : -1;
}
static void unused(void) { abort(); }
static function *const expression_table[] = {unused, unused, (function *)is_constant, (function *)constant_value, unused};
static function *const no_table[] = {unused, unused, unused, unused};

static expression *make(bool constant, bool empty, int64_t value) {
  expression *e = calloc(1, sizeof *e);
  if (e == NULL || pooled == (int)(sizeof pool / sizeof *pool)) abort();
  *e = (expression){no_table, NULL, {expression_table}, constant, empty, value};
  e->impl = &e->behind;
  pool[pooled++] = e;
  return e;
}

static const expression *builder_constant(const void *self, int64_t value) {
  (void)self;
  return make(true, false, value);
}

static int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b != 0 && (a < 0) != (b < 0)); }

/* DimensionOperation: SUM, PROD, MAX, MIN, SUB, EQUAL, LESS, FLOOR_DIV, CEIL_DIV. Wraps around, as the test's other side. */
static const expression *builder_operation(const void *self, int32_t operation, const expression *a, const expression *b) {
  (void)self;
  if (a == NULL || b == NULL) return NULL;
  const bool divides = operation == 7 || operation == 8;
  const bool empty = a->empty || b->empty || (divides && b->value == 0);
  int64_t value = 0;
  if (!empty) switch (operation) {
      case 0: value = (int64_t)((uint64_t)a->value + (uint64_t)b->value); break;
      case 1: value = (int64_t)((uint64_t)a->value * (uint64_t)b->value); break;
      case 2: value = a->value > b->value ? a->value : b->value; break;
      case 3: value = a->value < b->value ? a->value : b->value; break;
      case 4: value = (int64_t)((uint64_t)a->value - (uint64_t)b->value); break;
      case 5: value = a->value == b->value; break;
      case 6: value = a->value < b->value; break;
      case 7: value = floor_div(a->value, b->value); break;
      case 8: value = -floor_div(-a->value, b->value); break;
      default: return NULL;
    }
  return make(a->constant && b->constant && !empty, empty, value);
}
static function *const builder_table[] = {unused, unused, (function *)builder_constant, (function *)builder_operation};
static const object builder_impl = {builder_table};
static const struct {
  function *const *table;
  const object *impl;
} builder = {no_table, &builder_impl};

/* ------------------------------------------------------------------ words */

static char *rest;

static const char *word(void) {
  const char *found = strtok_r(NULL, " \n", &rest);
  if (found == NULL) {
    fprintf(stderr, "a command ends too early\n");
    exit(3);
  }
  return found;
}
static int64_t number(void) { return strtoll(word(), NULL, 0); }
static int count(void) { return (int)number(); }

static unsigned char *bytes(size_t *length) {
  const char *text = word() + 1;
  const size_t found = strlen(text) / 2;
  unsigned char *to = malloc(found + 1);
  if (to == NULL) abort();
  for (size_t i = 0; i < found; i++) {
    unsigned value;
    if (sscanf(text + 2 * i, "%2x", &value) != 1) exit(3);
    to[i] = (unsigned char)value;
  }
  to[found] = 0;
  if (length != NULL) *length = found;
  return to;
}
static char *text_word(void) { return (char *)bytes(NULL); }

static pthread_mutex_t output = PTHREAD_MUTEX_INITIALIZER;

static void put_hex(const void *data, size_t length) {
  putchar('x');
  for (size_t i = 0; i < length; i++) printf("%02x", ((const unsigned char *)data)[i]);
}
static void put_text(const char *text) {
  putchar(' ');
  if (text == NULL) putchar('-');
  else put_hex(text, strlen(text));
}

static dims read_dims(void) {
  dims d = {count(), {0}};
  for (int i = 0; i < d.count; i++) {
    const int64_t size = number();
    if (i < 8) d.size[i] = size;
  }
  return d;
}
static desc read_desc(void) {
  desc d = {.type = count(), .format = count(), .scale = 1.0f};
  d.shape = read_dims();
  return d;
}
static int read_descs(desc *to) {
  const int found = count();
  for (int i = 0; i < found; i++) to[i] = read_desc();
  return found;
}
static int read_dynamics(dynamic *to) {
  const int found = count();
  for (int i = 0; i < found; i++) {
    to[i].own = read_desc();
    to[i].min = read_dims();
    to[i].max = read_dims();
    to[i].opt = to[i].max;
  }
  return found;
}

/* "5": known. "?5": 5, which the plugin is not told. "?": nobody knows. */
static void read_expressions(expressions *e) {
  e->count = count();
  for (int i = 0; i < e->count; i++) {
    const char *said = word();
    const bool known = said[0] != '?';
    const char *digits = known ? said : said + 1;
    e->size[i] = make(known, digits[0] == '\0', strtoll(digits, NULL, 0));
  }
}

/* ------------------------------------------------------------------ the logger */

static atomic_bool has_logger = true;

static void log_line(void *self, int32_t severity, const char *text) {
  (void)self;
  pthread_mutex_lock(&output);
  printf("log %d", severity);
  put_text(text);
  putchar('\n');
  pthread_mutex_unlock(&output);
}
static function *const logger_table[] = {unused, unused, unused, unused, (function *)log_line};
static function *const logger_table_10[] = {(function *)log_line, unused, unused};
static const object logger = {logger_table}, logger_10 = {logger_table_10};
static atomic_int version = 110400;
/* TensorRT's loggers and finders have no version before 11; TensorRT-RTX's, which counts from 10000, have one. */
static bool is_old(void) { return version > 0 && version < 110000 && (version < 10000 || version >= 100000); }
static const object *find_logger(void *self) {
  (void)self;
  return has_logger ? (is_old() ? &logger_10 : &logger) : NULL; /* none before there is a builder or a runtime */
}
static function *const finder_table[] = {unused, unused, unused, unused, (function *)find_logger};
static function *const finder_table_10[] = {(function *)find_logger, unused, unused};
static function *const unknown_table[] = {unused, unused, unused, unused, unused, unused}; /* of a later TensorRT: not to be called */
static bool is_later(void) { return version >= 120000 || (version >= 20000 && version < 100000); }
static object finder = {finder_table};

int32_t getInferLibVersion(void);
int32_t getInferLibVersion(void) { return version; }

/* ------------------------------------------------------------------ memory of a library that is linked with -Wl,--wrap */

static atomic_long live, made_in_all, fail_at;

static bool fails(void) {
  made_in_all++;
  if (fail_at > 0 && --fail_at == 0) return true;
  live++;
  return false;
}
void *__wrap_malloc(size_t size);
void *__wrap_calloc(size_t a, size_t b);
char *__wrap_strdup(const char *text);
void __wrap_free(void *memory);
void *__wrap_malloc(size_t size) { return fails() ? NULL : malloc(size); }
void *__wrap_calloc(size_t a, size_t b) { return fails() ? NULL : calloc(a, b); }
char *__wrap_strdup(const char *text) { return fails() ? NULL : strdup(text); }
void __wrap_free(void *memory) {
  if (memory != NULL) live--;
  free(memory);
}

/* ------------------------------------------------------------------ the library, and its plugins by number */

static const void *const *creators, *const *(*get_creators)(int32_t *);
static const char *(*last_error)(void), *(*plugin_error)(void);
static void *objects[MAX_OBJECTS];
static int object_count;
static struct {
  CUcontext (*create)(CUdevice);
  void (*use)(CUcontext);
  unsigned long (*launches)(void);
  int (*launch)(unsigned long, fake_launch *);
  unsigned (*modules)(void);
  int (*wait)(void *); /* of a real driver */
} cuda;
static void *opened;
static CUcontext contexts[64];
static int context_count;

static void *symbol(void *library, const char *name) {
  void *found = dlsym(library, name);
  if (found == NULL) {
    fprintf(stderr, "no symbol %s\n", name);
    exit(3);
  }
  return found;
}
#define TAKE(to, library, name) (*(void **)&(to) = symbol(library, name))

static void *capability(void *plugin, int32_t kind) { return SLOT(plugin, 4, void *, void *, int32_t)(plugin, kind); }
static void *core_of(void *plugin) { return capability(plugin, 0); }
static void *build_of(void *plugin) { return capability(plugin, 1); }
static void *runtime_of(void *plugin) { return capability(plugin, 2); }
static void *create(int creator, const char *name, const fields *given, int phase) {
  void *c = (void *)(uintptr_t)creators[creator];
  return SLOT(c, 4, void *, void *, const char *, const fields *, int32_t)(c, name, given, phase);
}
static void *copy_of(void *plugin) { return SLOT(plugin, 5, void *, void *)(plugin); }
static void *attach(void *plugin) { return SLOT(runtime_of(plugin), 7, void *, void *, void *)(runtime_of(plugin), NULL); }
static void destroy(void *plugin) { SLOT(plugin, 3, void, void *)(plugin); }
static const fields *stored(void *plugin) { return SLOT(runtime_of(plugin), 8, const fields *, void *)(runtime_of(plugin)); }

static void *plugin_word(void) {
  const int index = count();
  if (index < 0 || index >= object_count || objects[index] == NULL) {
    fprintf(stderr, "no plugin %d\n", index);
    exit(3);
  }
  return objects[index];
}
static void keep(void *plugin) {
  if (object_count == MAX_OBJECTS) abort();
  if (plugin == NULL) {
    printf("= null\n");
    return;
  }
  objects[object_count] = plugin;
  printf("= %d\n", object_count++);
}

static void put_fields(const fields *f) {
  static const int sizes[] = {2, 4, 8, 1, 2, 4, 1, 0, 1, 2, 8};
  printf("= %d", f->count);
  for (int i = 0; i < f->count; i++) {
    put_text(f->fields[i].name);
    printf(" %d %d ", f->fields[i].type, f->fields[i].length);
    put_hex(f->fields[i].data, (size_t)(f->fields[i].length * sizes[f->fields[i].type]));
  }
  putchar('\n');
}

/* Fields whose memory is gone after the call, as TensorRT's. */
static void do_create(void) {
  const int creator = count();
  char *layer = text_word();
  const int phase = count();
  const fields given = {count(), calloc(256, sizeof(field))};
  field *to = (field *)(uintptr_t)given.fields;
  size_t lengths[256];
  for (int i = 0; i < given.count; i++) {
    to[i].name = text_word();
    to[i].type = count();
    to[i].length = count();
    to[i].data = bytes(&lengths[i]);
  }
  void *made = create(creator, layer, &given, phase);
  for (int i = 0; i < given.count; i++) {
    memset((void *)(uintptr_t)to[i].data, 0xDB, lengths[i]);
    free((void *)(uintptr_t)to[i].data);
    free((void *)(uintptr_t)to[i].name);
  }
  free(to);
  free(layer);
  keep(made);
}

static void do_types(void *plugin) {
  int32_t in[MAX_TENSORS], out[MAX_TENSORS];
  const int in_count = count();
  for (int i = 0; i < in_count; i++) in[i] = count();
  const int out_count = count();
  const int32_t status =
      SLOT(build_of(plugin), 5, int32_t, void *, int32_t *, int32_t, const int32_t *, int32_t)(build_of(plugin), out, out_count, in, in_count);
  printf("= %d", status);
  for (int i = 0; i < out_count && status == 0; i++) printf(" %d", out[i]);
  putchar('\n');
}

static void do_shapes(void *plugin) {
  expressions in[MAX_TENSORS], values[MAX_TENSORS], out[MAX_TENSORS] = {{0, {NULL}}};
  const int in_count = count();
  for (int i = 0; i < in_count; i++) read_expressions(&in[i]);
  const int value_count = count();
  for (int i = 0; i < value_count; i++) read_expressions(&values[i]);
  const int out_count = count();
  const int32_t status = SLOT(build_of(plugin), 6, int32_t, void *, const expressions *, int32_t, const expressions *, int32_t, expressions *, int32_t,
                              const void *)(build_of(plugin), in, in_count, value_count ? values : NULL, value_count, out, out_count, &builder);
  printf("= %d", status);
  for (int i = 0; i < out_count && status == 0; i++) {
    printf(" %d", out[i].count);
    for (int k = 0; k < out[i].count; k++) {
      const expression *e = out[i].size[k];
      printf(" %s", e->constant ? "" : "?");
      if (!e->empty) printf("%" PRId64, e->value);
    }
  }
  putchar('\n');
  while (pooled > 0) free(pool[--pooled]);
}

static void do_supports(void *plugin) {
  dynamic all[MAX_TENSORS];
  const int position = count(), outputs = count(), found = read_dynamics(all);
  const bool answer =
      SLOT(build_of(plugin), 7, bool, void *, int32_t, const dynamic *, int32_t, int32_t)(build_of(plugin), position, all, found - outputs, outputs);
  printf("= %d\n", answer);
}

static void do_dynamic(void *plugin, bool workspace) {
  static dynamic in[MAX_TENSORS], out[MAX_TENSORS];
  const int in_count = read_dynamics(in), out_count = read_dynamics(out);
  void *build = build_of(plugin);
  if (workspace)
    printf("= %zu\n", SLOT(build, 9, size_t, void *, const dynamic *, int32_t, const dynamic *, int32_t)(build, in, in_count, out, out_count));
  else printf("= %d\n", SLOT(build, 4, int32_t, void *, const dynamic *, int32_t, const dynamic *, int32_t)(build, in, in_count, out, out_count));
}

static void do_tactics(void *plugin) {
  void *build = build_of(plugin);
  int32_t ids[256], found = SLOT(build, 11, int32_t, void *)(build);
  int32_t status = found < 0 ? found : SLOT(build, 10, int32_t, void *, int32_t *, int32_t)(build, ids, found);
  printf("= %d", status);
  for (int i = 0; i < found && status == 0; i++) printf(" %d", ids[i]);
  putchar('\n');
}

/* The tensors of the last change of shape, for threads. */
static desc last_in[MAX_TENSORS], last_out[MAX_TENSORS];
static int last_in_count, last_out_count;

static int32_t change(void *plugin) {
  void *runtime = runtime_of(plugin);
  return SLOT(runtime, 5, int32_t, void *, const desc *, int32_t, const desc *, int32_t)(runtime, last_in, last_in_count, last_out, last_out_count);
}
static int32_t enqueue(void *plugin, const void *const *in, void *const *out, void *workspace, void *stream) {
  void *runtime = runtime_of(plugin);
  return SLOT(runtime, 6, int32_t, void *, const desc *, const desc *, const void *const *, void *const *, void *, void *)(
      runtime, last_in, last_out, in, out, workspace, stream);
}
static void do_change(void *plugin) {
  last_in_count = read_descs(last_in);
  last_out_count = read_descs(last_out);
  printf("= %d\n", change(plugin));
}
static void do_enqueue(void *plugin) {
  const void *in[MAX_TENSORS];
  void *out[MAX_TENSORS];
  const int in_count = count();
  for (int i = 0; i < in_count; i++) in[i] = (const void *)(uintptr_t)strtoull(word(), NULL, 0);
  const int out_count = count();
  for (int i = 0; i < out_count; i++) out[i] = (void *)(uintptr_t)strtoull(word(), NULL, 0);
  void *workspace = (void *)(uintptr_t)strtoull(word(), NULL, 0), *stream = (void *)(uintptr_t)strtoull(word(), NULL, 0);
  printf("= %d\n", enqueue(plugin, in, out, workspace, stream));
}

static void do_launches(void) {
  const unsigned long from = (unsigned long)number(), to = cuda.launches();
  static fake_launch l;
  printf("= %lu", to);
  for (unsigned long i = from; i < to; i++) {
    if (!cuda.launch(i, &l)) continue;
    putchar(' ');
    put_hex(l.image, l.image_size);
    printf(" %u %u %u %u %u %u %" PRIuPTR " %d %u", l.grid[0], l.grid[1], l.grid[2], l.block[0], l.block[1], l.block[2], (uintptr_t)l.stream, l.device,
           l.param_count);
    size_t at = 0;
    for (unsigned k = 0; k < l.param_count; at += l.param_sizes[k++]) {
      putchar(' ');
      put_hex(l.params + at, l.param_sizes[k]);
    }
  }
  putchar('\n');
}

/* Stored, created again, cloned, attached, all deleted: so many times. */
static void do_repeat(void *plugin) {
  const int creator = count(), times = count();
  size_t before = 0;
  long before_live = 0;
  int failed = 0;
  for (int i = 0; i < times; i++) {
    if (i == times / 2) { /* what is allocated once has been */
      before = mallinfo2().uordblks;
      before_live = live;
    }
    void *made = create(creator, "again", stored(plugin), 1);
    void *copy = made == NULL ? NULL : copy_of(made), *attached = copy == NULL ? NULL : attach(copy);
    failed += attached == NULL;
    if (i % 2 && made != NULL) destroy(made); /* a clone does not hang on what it was made of */
    if (attached != NULL && change(attached) != 0) failed++;
    if (attached != NULL) destroy(attached);
    if (copy != NULL) destroy(copy);
    if (i % 2 == 0 && made != NULL) destroy(made);
  }
  printf("= %d %ld %ld %u\n", failed, (long)mallinfo2().uordblks - (long)before, live - before_live, cuda.modules());
}

typedef struct {
  void *plugin;
  CUcontext context;
  uintptr_t stream;
  int times, failed;
} worker;
static pthread_barrier_t start;

static void *work(void *argument) {
  worker *w = argument;
  cuda.use(w->context);
  void *attached = attach(w->plugin);
  const void *in[MAX_TENSORS];
  void *out[MAX_TENSORS];
  for (int i = 0; i < MAX_TENSORS; i++) in[i] = out[i] = (void *)(uintptr_t)(INT64_C(0x7F0000000000) + INT64_C(0x10000000) * i);
  w->failed = attached == NULL || change(attached) != 0;
  pthread_barrier_wait(&start);
  for (int i = 0; i < w->times && !w->failed; i++) w->failed += enqueue(attached, in, out, (void *)(uintptr_t)0x7C0000000100, (void *)w->stream) != 0;
  if (attached != NULL) destroy(attached);
  return NULL;
}

/* One plugin on two threads, each with a context of its own, with the tensors of the last change of shape. */
static void do_threads(void *plugin) {
  const int times = count();
  worker workers[2];
  pthread_t threads[2];
  pthread_barrier_init(&start, NULL, 2);
  for (int i = 0; i < 2; i++) {
    workers[i] = (worker){plugin, contexts[count()], (uintptr_t)(i + 1), times, 0};
    pthread_create(&threads[i], NULL, work, &workers[i]);
  }
  for (int i = 0; i < 2; i++) pthread_join(threads[i], NULL);
  printf("= %d %d %u\n", workers[0].failed, workers[1].failed, cuda.modules());
}

/* Another TensorRT of the process gives the plugins its finder; what it heard of them, in all. */
static void *other;
static void open_other(void) {
  char *path = text_word();
  void (*set)(void *);
  other = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  TAKE(set, opened, "setLoggerFinder");
  set(dlsym(other, "finder"));
  printf("= %d\n", other != NULL);
  free(path);
}

static void open_library(void) {
  char *path = text_word();
  void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (library == NULL) {
    fprintf(stderr, "%s\n", dlerror());
    exit(3);
  }
  opened = library;
  void (*set)(object *);
  TAKE(get_creators, library, "getCreators");
  TAKE(plugin_error, library, "pyfmha_plugin_error");
  TAKE(set, library, "setLoggerFinder");
  TAKE(last_error, library, "pyfmha_last_error");
  int32_t found = 0;
  set(&finder);
  creators = get_creators(&found);
  printf("= %d\n", found);
  free(path);
}

static void open_cuda(void) {
  char *path = text_word();
  setenv("PYFMHA_LIBCUDA", path, 1);
  void *library = dlopen(path, RTLD_NOW);
  int (*init)(unsigned);
  if (library == NULL) exit(3);
  TAKE(init, library, "cuInit");
  TAKE(cuda.create, library, "fake_create_context");
  TAKE(cuda.use, library, "fake_make_current");
  TAKE(cuda.launches, library, "fake_launch_count");
  TAKE(cuda.launch, library, "fake_get_launch");
  TAKE(cuda.modules, library, "fake_modules_loaded");
  void (*reset)(void);
  TAKE(reset, library, "fake_reset");
  reset();
  printf("= %d\n", init(0));
  free(path);
}

/* A real driver: its first device, a stream, and memory for tensors. */
static void open_gpu(void) {
  char *path = text_word();
  const size_t bytes_wanted = (size_t)number();
  void *library = dlopen(path, RTLD_NOW), *context = NULL, *stream = NULL;
  if (library == NULL) {
    fprintf(stderr, "%s\n", dlerror());
    exit(3);
  }
  int (*init)(unsigned), (*retain)(void **, int), (*use)(void *), (*make_stream)(void **, unsigned), (*allocate)(uint64_t *, size_t);
  TAKE(init, library, "cuInit");
  TAKE(retain, library, "cuDevicePrimaryCtxRetain");
  TAKE(use, library, "cuCtxSetCurrent");
  TAKE(make_stream, library, "cuStreamCreate");
  TAKE(allocate, library, "cuMemAlloc_v2");
  TAKE(cuda.wait, library, "cuStreamSynchronize");
  uint64_t memory = 0;
  int status = init(0);
  if (status == 0) status = retain(&context, 0);
  if (status == 0) status = use(context);
  if (status == 0) status = make_stream(&stream, 1);
  if (status == 0) status = allocate(&memory, bytes_wanted);
  printf("= %d %" PRIuPTR " %" PRIu64 "\n", status, (uintptr_t)stream, memory);
  free(path);
}

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

/* Nanoseconds of one enqueue through the table and of one launch by the library's own function, the best of many rounds by
 * turns. Arguments: rounds, launches a round, addresses as of enqueue, the function's name and its packed arguments. */
static void do_time(void *plugin) {
  const void *in[MAX_TENSORS];
  void *out[MAX_TENSORS];
  const int rounds = count(), times = count(), in_count = count();
  for (int i = 0; i < in_count; i++) in[i] = (const void *)(uintptr_t)strtoull(word(), NULL, 0);
  const int out_count = count();
  for (int i = 0; i < out_count; i++) out[i] = (void *)(uintptr_t)strtoull(word(), NULL, 0);
  void *workspace = (void *)(uintptr_t)strtoull(word(), NULL, 0), *stream = (void *)(uintptr_t)strtoull(word(), NULL, 0);
  char *name = text_word();
  unsigned char *packed = bytes(NULL);
  int (*launch)(const void *);
  TAKE(launch, opened, name);
  double best[2] = {1e18, 1e18};
  int failed = 0;
  for (int round = 0; round < rounds; round++)
    for (int which = 0; which < 2; which++) {
      const double start_time = now();
      for (int i = 0; i < times; i++) failed += which ? launch(packed) != 0 : enqueue(plugin, in, out, workspace, stream) != 0;
      const double taken = (now() - start_time) / times;
      if (taken < best[which]) best[which] = taken;
      if (cuda.wait != NULL) failed += cuda.wait(stream) != 0;
    }
  printf("= %d %.1f %.1f\n", failed, best[0], best[1]);
  free(packed);
  free(name);
}

static void do_creator(void) {
  void *c = (void *)(uintptr_t)creators[count()];
  typedef struct {
    const char *kind;
    int32_t major, minor;
  } info;
  const info about = SLOT(c, 1, info, void *)(c);
  printf("=");
  for (int slot = 6; slot < 9; slot++) put_text(SLOT(c, slot, const char *, void *)(c));
  put_text(about.kind);
  printf(" %d %d %d\n", about.major, about.minor, SLOT(c, 0, int32_t, void *)(c));
}

static bool of_library(const char *command) {
  if (!strcmp(command, "open")) open_library();
  else if (!strcmp(command, "cuda")) open_cuda();
  else if (!strcmp(command, "gpu")) open_gpu();
  else if (!strcmp(command, "creators")) {
    int32_t found = -1;
    get_creators(&found);
    printf("= %d", found);
    put_text(plugin_error());
    putchar('\n');
  } else if (!strcmp(command, "creator")) do_creator();
  else if (!strcmp(command, "creator_fields")) {
    void *c = (void *)(uintptr_t)creators[count()];
    put_fields(SLOT(c, 5, const fields *, void *)(c));
  } else if (!strcmp(command, "create")) do_create();
  else if (!strcmp(command, "error")) {
    printf("=");
    put_text(last_error());
    putchar('\n');
  } else if (!strcmp(command, "context")) {
    cuda.use(contexts[context_count] = cuda.create(count()));
    printf("= %d\n", context_count++);
  } else if (!strcmp(command, "use")) {
    const int index = count();
    cuda.use(index < 0 ? NULL : contexts[index]);
    printf("= 0\n");
  } else if (!strcmp(command, "launches")) do_launches();
  else if (!strcmp(command, "modules")) printf("= %u\n", cuda.modules());
  else if (!strcmp(command, "logger")) printf("= %d\n", has_logger = count());
  else if (!strcmp(command, "other")) open_other();
  else if (!strcmp(command, "heard")) printf("= %d\n", *(int *)dlsym(other, "heard"));
  else if (!strcmp(command, "version")) {
    version = count();
    finder.table = is_later() ? unknown_table : is_old() ? finder_table_10 : finder_table;
    printf("= %d\n", version);
  }
  else if (!strcmp(command, "fail")) {
    fail_at = count();
    printf("= %ld %ld\n", (long)live, (long)made_in_all);
  } else return false;
  return true;
}

static bool of_plugin(const char *command) {
  void *p = plugin_word();
  if (!strcmp(command, "clone")) keep(copy_of(p));
  else if (!strcmp(command, "attach")) keep(attach(p));
  else if (!strcmp(command, "delete")) {
    for (int i = 0; i < object_count; i++)
      if (objects[i] == p) objects[i] = NULL;
    destroy(p);
    printf("= 0\n");
  } else if (!strcmp(command, "outputs")) printf("= %d\n", SLOT(build_of(p), 8, int32_t, void *)(build_of(p)));
  else if (!strcmp(command, "types")) do_types(p);
  else if (!strcmp(command, "shapes")) do_shapes(p);
  else if (!strcmp(command, "supports")) do_supports(p);
  else if (!strcmp(command, "configure") || !strcmp(command, "workspace")) do_dynamic(p, command[0] == 'w');
  else if (!strcmp(command, "tactics")) do_tactics(p);
  else if (!strcmp(command, "timing")) {
    printf("=");
    put_text(SLOT(build_of(p), 12, const char *, void *)(build_of(p)));
    putchar('\n');
  } else if (!strcmp(command, "others")) { /* formats, metadata, an alias */
    void *build = build_of(p);
    printf("= %d", SLOT(build, 13, int32_t, void *)(build));
    put_text(SLOT(build, 14, const char *, void *)(build));
    printf(" %d\n", SLOT(build, 15, int32_t, void *, int32_t)(build, 0));
  } else if (!strcmp(command, "core")) {
    printf("=");
    for (int slot = 4; slot < 7; slot++) put_text(SLOT(core_of(p), slot, const char *, void *)(core_of(p)));
    putchar('\n');
  } else if (!strcmp(command, "tactic")) {
    const int32_t tactic = count();
    printf("= %d\n", SLOT(runtime_of(p), 4, int32_t, void *, int32_t)(runtime_of(p), tactic));
  } else if (!strcmp(command, "change")) do_change(p);
  else if (!strcmp(command, "enqueue")) do_enqueue(p);
  else if (!strcmp(command, "stored")) put_fields(stored(p));
  else if (!strcmp(command, "repeat")) do_repeat(p);
  else if (!strcmp(command, "threads")) do_threads(p);
  else if (!strcmp(command, "time")) do_time(p);
  else return false;
  return true;
}

int main(void) {
  static char line[MAX_TEXT];
  while (fgets(line, sizeof line, stdin) != NULL) {
    const char *command = strtok_r(line, " \n", &rest);
    if (command == NULL) continue;
    if (!of_library(command) && !of_plugin(command)) {
      fprintf(stderr, "unknown command %s\n", command);
      return 3;
    }
    fflush(stdout);
  }
  return 0;
}
