#pragma once

/* In the order of instructions.h. */
extern const char * const pydflash_compiled[];
