/* What the libraries were compiled for. Compiled with their flags, so there must be data only: no function, which could
 * itself hold an instruction that the processor lacks. */
#include "compiled.h"

/* "1" for an instruction set that the compiler may use; its own name where the macro is not defined. */
#define TEXT(macro) #macro
#define INSTRUCTIONS(macro, ...) TEXT(macro),
const char * const pydflash_compiled[] = {
#include "instructions.h"
    "",
};
