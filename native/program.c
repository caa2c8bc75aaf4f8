/* Start a program from a child that shares the memory of the calling process.
 *
 * fork() copies the page tables of a Python process, and later each page that either side writes to. This child is
 * created by clone(CLONE_VM) with a stack of its own. It makes the system calls of a table, of which the last one is
 * execve, and does nothing else: it runs no Python, uses no C library, and writes to nothing but the table and its stack.
 *
 * It is not a vfork: the parent continues at once, so a program that stops the child cannot stop the parent. The
 * parent keeps the table and the stack until the child has called execve or has ended (guest/init/programs.py).
 */

#include "child.h"

/* Compared by guest/init/native.py when it loads the library. Increase it with each change of a signature or a layout. */
EXPORTED const long rock_native_version = 3;

/* Start a child that makes `count` calls. Returns its pid, or a negative error number.
 *
 * stack: `size` bytes for the child. The table of arguments is copied to its top, because this function returns while
 * the child still uses it. All signals are blocked until the child exists: it starts with the same blocked signals, so
 * it never runs a signal handler on the shared memory. The table unblocks them right before execve.
 */
EXPORTED long rock_start_program(struct call *calls, unsigned long count, char *stack, unsigned long size)
{
    unsigned long top = ((unsigned long)stack + size - sizeof(struct table)) & ~15UL;
    struct table *table = (struct table *)top;
    unsigned long all = ~0UL, previous = 0;
    long pid;

    table->calls = calls;
    table->count = count;
    set_blocked_signals(&all, &previous);
    pid = clone_child(0, (void *)top, table);
    set_blocked_signals(&previous, (unsigned long *)0);
    return pid;
}
