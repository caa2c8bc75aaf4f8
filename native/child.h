/* A child that shares the memory of its parent until it executes a program. See program.c and zygote.c. */

#ifndef ROCK_CHILD_H
#define ROCK_CHILD_H

#include "syscall.h"

#define SHARE_MEMORY 0x100     /* CLONE_VM */
#define UNTIL_EXECUTED 0x4000  /* CLONE_VFORK: the parent waits until the child has called execve or has ended */
#define FAILED 127             /* exit status of a child that could not become the program */

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

/* clone(CLONE_VM | flags) with `stack` as the child's stack pointer, on which the child calls run_child(table).
 *
 * This needs assembly from the system call to the function call: the child returns from clone with another stack
 * pointer, so compiled code could not reach its own variables. Returns the pid, or a negative error number.
 */
static long clone_child(long flags, void *stack, const struct table *table)
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
                     : "a"((long)CALL_CLONE), "D"(flags | SHARE_MEMORY | SIGNAL_CHILD), "S"(stack), "d"(0L), "r"(r10),
                       "r"(r8), [table] "r"(table), [child] "r"(run_child)
                     : "rcx", "r11", "cc", "memory");
    return pid;
#else
    register long x8 __asm__("x8") = CALL_CLONE;
    register long x0 __asm__("x0") = flags | SHARE_MEMORY | SIGNAL_CHILD;
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

#endif
