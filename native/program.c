/* Start a program from a child that shares the memory of the calling process.
 *
 * fork() copies the page tables of a Python process, and later each page that either side writes to. This child is
 * created by clone(CLONE_VM) with a stack of its own. It makes the system calls of a table, of which the last one is
 * execve, and does nothing else: it runs no Python, uses no C library, and writes to nothing but the table and its stack.
 *
 * It is not a vfork: the parent continues at once, so a program that stops the child cannot stop the parent. The
 * parent keeps the table and the stack until the child has called execve or has ended (guest/init/programs.py).
 */

#include "syscall.h"

#define SHARE_MEMORY 0x100 /* CLONE_VM */
#define FAILED 127         /* exit status of a child that could not become the program */

/* Compared by guest/init/native.py when it loads the library. Increase it with each change of a signature or a layout. */
EXPORTED const long rock_native_version = 1;

struct table {
    struct call *calls;
    unsigned long count;
};

/* All that the child does. It writes the result of each call to its row and stops at the first that fails. */
static __attribute__((noreturn, noinline)) void run_child(const struct table *table)
{
    struct call *call = table->calls;
    struct call *end = call + table->count;

    for (; call < end; call++) {
        call->result = make_call(call);
        if (call->result < 0)
            break;
    }
    for (;;)
        system_call(CALL_EXIT_GROUP, FAILED, 0, 0, 0, 0, 0);
}

/* clone(CLONE_VM) with `stack` as the child's stack pointer, on which the child calls run_child(table).
 *
 * This needs assembly from the system call to the function call: the child returns from clone with another stack
 * pointer, so compiled code could not reach its own variables. Returns the pid, or a negative error number.
 */
static long clone_child(void *stack, const struct table *table)
{
#if defined(__x86_64__)
    register long r10 __asm__("r10") = 0; /* no address for the child's thread id */
    register long r8 __asm__("r8") = 0;   /* no thread-local storage of its own */
    long pid;

    __asm__ volatile("syscall\n\t"
                     "test %%rax, %%rax\n\t"
                     "jnz 1f\n\t" /* the parent, or an error */
                     "mov %[table], %%rdi\n\t"
                     "call *%[child]\n\t" /* does not return */
                     "ud2\n"
                     "1:"
                     : "=a"(pid)
                     : "a"((long)CALL_CLONE), "D"((long)(SHARE_MEMORY | SIGNAL_CHILD)), "S"(stack), "d"(0L), "r"(r10),
                       "r"(r8), [table] "r"(table), [child] "r"(run_child)
                     : "rcx", "r11", "cc", "memory");
    return pid;
#else
    register long x8 __asm__("x8") = CALL_CLONE;
    register long x0 __asm__("x0") = SHARE_MEMORY | SIGNAL_CHILD;
    register void *x1 __asm__("x1") = stack;
    register long x2 __asm__("x2") = 0;
    register long x3 __asm__("x3") = 0; /* no thread-local storage of its own */
    register long x4 __asm__("x4") = 0; /* no address for the child's thread id */

    __asm__ volatile("svc #0\n\t"
                     "cbnz x0, 1f\n\t" /* the parent, or an error */
                     "mov x0, %[table]\n\t"
                     "blr %[child]\n\t" /* does not return */
                     "brk #0\n"
                     "1:"
                     : "+r"(x0)
                     : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4), [table] "r"(table), [child] "r"(run_child)
                     : "cc", "memory");
    return x0;
#endif
}

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
    pid = clone_child((void *)top, table);
    set_blocked_signals(&previous, (unsigned long *)0);
    return pid;
}
