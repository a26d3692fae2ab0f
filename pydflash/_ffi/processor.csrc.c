/* Does the processor have the instructions that the libraries were compiled for? Compiled for any processor and asked
 * before the libraries are loaded, which may end the process with an illegal instruction while they are. */
#include "compiled.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>

enum { EAX, EBX, ECX, EDX };

/* Register files that the operating system saves (XCR0); without that the instructions fault although cpuid has them. */
static uint32_t saved_registers(void) {
    uint32_t leaf[4] = { 0 }, low = 0, high;
    if (!__get_cpuid(1, &leaf[EAX], &leaf[EBX], &leaf[ECX], &leaf[EDX]) || !(leaf[ECX] >> 27 & 1)) {
        return 0;
    }
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

static bool present(uint32_t leaf, uint32_t subleaf, int word, int bit, uint32_t saved) {
    uint32_t out[4] = { 0 };
    return __get_cpuid_count(leaf, subleaf, &out[EAX], &out[EBX], &out[ECX], &out[EDX]) && (out[word] >> bit & 1) &&
           (saved_registers() & saved) == saved;
}
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>

static bool present(unsigned long word, int bit) {
    return getauxval(word) >> bit & 1;
}
#endif

#define INSTRUCTIONS(macro, ...) #macro,
static const char * const names[] = {
#include "instructions.h"
    NULL,
};
#undef INSTRUCTIONS

static int pydflash_instructions_count(void) {
    return (int) (sizeof(names) / sizeof(names[0])) - 1;
}

static const char * pydflash_instructions_name(int index) {
    return names[index];
}

static bool pydflash_instructions_compiled(int index) {
    return pydflash_compiled[index][0] == '1';
}

static bool pydflash_instructions_present(int index) {
#define INSTRUCTIONS(macro, ...) if (index-- == 0) return present(__VA_ARGS__);
#include "instructions.h"
    return false;
}
