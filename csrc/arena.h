/* 暂存的切分。 */
#ifndef DSO_ARENA_H
#define DSO_ARENA_H

#include <stddef.h>

/* 从一大块暂存里依次切出对齐的小块；base 为 NULL 时只累计大小（plan 用同一份代码）。 */
typedef struct {
  char *base;
  size_t used;
} dso_arena;

static inline void *dso_take(dso_arena *arena, size_t bytes) {
  void *at = arena->base ? arena->base + arena->used : NULL;
  arena->used += (bytes + 63) / 64 * 64;
  return at;
}

#endif
