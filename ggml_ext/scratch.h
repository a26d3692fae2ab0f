// Working memory of a CPU reference. Custom ops have no barrier, so every thread prepares what it needs for itself.
#pragma once

#include "ggml.h"

#include <stdlib.h>

// At least `needed` bytes, contents undefined, until the next call of the same thread from the same source file. The
// memory grows to the largest amount asked for and lives as long as the thread.
static inline void * pydflash_scratch(size_t needed) {
    static _Thread_local void * buffer   = NULL;
    static _Thread_local size_t capacity = 0;
    if (needed > capacity) {
        free(buffer);
        buffer   = malloc(needed);
        capacity = needed;
        GGML_ASSERT(buffer != NULL);
    }
    return buffer;
}
