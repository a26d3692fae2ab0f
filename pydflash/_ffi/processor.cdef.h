/* What Python asks of processor.csrc.c. */
int pydflash_instructions_count(void);
const char * pydflash_instructions_name(int index);
bool pydflash_instructions_compiled(int index);
bool pydflash_instructions_present(int index);
