/* A C user of the small library: does a launch allocate, and do contexts that come and go leave something behind?
 * argv[1] is the fake driver. */
#define _GNU_SOURCE
#include "libsmall.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void *__libc_malloc(size_t);
void *__libc_calloc(size_t, size_t);
void *__libc_realloc(void *, size_t);
void __libc_free(void *);

static unsigned long allocations;
static long held; /* allocations not given back; a realloc changes nothing but from nothing */

void *malloc(size_t size) {
  allocations++;
  held++;
  return __libc_malloc(size);
}

void free(void *memory) {
  held -= memory != NULL;
  __libc_free(memory);
}

void *calloc(size_t count, size_t size) {
  allocations++;
  held++;
  return __libc_calloc(count, size);
}

void *realloc(void *memory, size_t size) {
  allocations++;
  held += memory == NULL;
  return __libc_realloc(memory, size);
}

static void call(void *library, const char *name, void *pointer_to_function) {
  void *symbol = dlsym(library, name);
  memcpy(pointer_to_function, &symbol, sizeof symbol);
}

int main(int count, char **arguments) {
  void *driver = count == 2 ? dlopen(arguments[1], RTLD_NOW) : NULL;
  void (*reset)(void);
  void *(*create)(int);
  void (*make_current)(void *);
  void (*recreate)(void *);
  if (driver == NULL) return 2;
  call(driver, "fake_reset", &reset);
  call(driver, "fake_create_context", &create);
  call(driver, "fake_make_current", &make_current);
  call(driver, "fake_recreate_context", &recreate);
  reset();
  void *context = create(0);
  make_current(context);

  const unsigned long before = allocations;
  if (load_add() != 0) {
    fprintf(stderr, "%s\n", pyfmha_last_error());
    return 1;
  }
  const unsigned long loading = allocations - before;
  for (int i = 0; i < 1000; i++) {
    if (add(NULL, 0x1000 + 4u * (i % 4), 0x2000, 0x3000, i, i % 2) != 0) {
      fprintf(stderr, "%s\n", pyfmha_last_error());
      return 1;
    }
  }
  const unsigned long launching = allocations - before - loading;
  const long before_contexts = held;
  for (int i = 0; i < 1000; i++) {
    recreate(context);
    if (load_add() != 0 || add(NULL, 0x1000, 0x2000, 0x3000, 1, 0) != 0) {
      fprintf(stderr, "%s\n", pyfmha_last_error());
      return 1;
    }
  }
  printf("allocations while loading: %lu, in 1000 launches: %lu, held after 1000 more contexts: %ld\n", loading, launching, held - before_contexts);
  return 0;
}
