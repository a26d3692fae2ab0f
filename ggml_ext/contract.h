// The limits that the operations' contracts share, each stated once; Python reads them through the binding's cdef.
#pragma once

#define PYDFLASH_MAX_PARAMS   8                    // of a node: 32-bit words, each an int32_t or the bits of a float
#define PYDFLASH_EXACT_ROWS   16                   // the most rows of a sequence in a step that may be kept in part
#define PYDFLASH_STEP_ROWS    64                   // the most rows of all sequences in such a step
#define PYDFLASH_TAPE_ROWS    PYDFLASH_EXACT_ROWS  // that a delta-net layer can hold pending: all of an exact step
#define PYDFLASH_MAX_TAPS     16                   // of a delta-net layer's convolution
#define PYDFLASH_CHANNEL_STEP 16                   // channels of that convolution are a multiple
#define PYDFLASH_SLOT_STEP    32                   // slots of a K/V cache are a multiple
#define PYDFLASH_PAGE         256                  // positions of a page of a K/V cache; a multiple of the slot step
#define PYDFLASH_MAX_HEAD     256                  // values of a head of attention or of a delta-net layer's state
