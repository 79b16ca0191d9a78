// posix_memalign, which torch's CPU tensors come from, with an unmapped page behind every block: to touch what lies
// beyond is a segmentation fault at once. The bytes between a block's end and that page are checked where it is freed.
// Preloaded (LD_PRELOAD) by test_guarded_memory.py.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { kPage = 4096, kFill = 0xa5 };
static const size_t kArena = (size_t)1 << 40;  // addresses alone: pages are mapped as they are given out, and not reused

static uint8_t* arena;
static atomic_size_t used;

struct Header {
  size_t size, mapped;
};  // in the page before a block's own

__attribute__((constructor)) static void reserve(void) {
  arena = mmap(NULL, kArena, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (arena == MAP_FAILED) abort();
}

int posix_memalign(void** out, size_t alignment, size_t size) {
  const size_t room = (size + alignment - 1) / alignment * alignment, mapped = (room + kPage - 1) / kPage * kPage + kPage;
  if (alignment > kPage || size > kArena / 2) return ENOMEM;
  const size_t at = atomic_fetch_add(&used, mapped + kPage);
  if (at + mapped > kArena || mprotect(arena + at, mapped, PROT_READ | PROT_WRITE)) return ENOMEM;
  struct Header* const header = (struct Header*)(arena + at);
  *header = (struct Header){size, mapped};
  uint8_t* const block = arena + at + mapped - room;
  memset(block, kFill, room);
  *out = block;
  return 0;
}

void free(void* block) {
  static void (*real)(void*);
  uint8_t* const p = block;
  if (!arena || p < arena || p >= arena + kArena) {
    if (!real) real = (void (*)(void*))dlsym(RTLD_NEXT, "free");
    real(block);
    return;
  }
  // A block begins in the second page of what was mapped for it.
  struct Header* const header = (struct Header*)(arena + ((size_t)(p - arena) / kPage - 1) * kPage);
  const size_t slack = (size_t)((uint8_t*)header + header->mapped - p) - header->size;
  for (size_t i = 0; i < slack; ++i)
    if (p[header->size + i] != kFill) {
      fprintf(stderr, "guard_allocator: byte %zu behind a block of %zu was written\n", i, header->size);
      abort();
    }
  madvise(header, header->mapped, MADV_DONTNEED);
  mprotect(header, header->mapped, PROT_NONE);
}
