/* System calls without the C library, for the three functions of this folder.
 *
 * The functions run where the C library must not: in a child that shares the memory of a Python process, and between
 * two system calls that replace the memory of the process itself. So they make system calls with inline assembly, use
 * no global variable, and call nothing outside of their own file. The linker checks this (-Wl,--no-undefined).
 *
 * Each system call number is written here, so that no kernel header is needed to compile;
 * tests/runtime/test_native.py compares them with <asm/unistd.h>.
 */

#ifndef ROCK_SYSCALL_H
#define ROCK_SYSCALL_H

#if defined(__x86_64__) && defined(__LP64__)
#define CALL_READ 0
#define CALL_WRITE 1
#define CALL_CLOSE 3
#define CALL_MUNMAP 11
#define CALL_RT_SIGPROCMASK 14
#define CALL_PREAD64 17
#define CALL_MADVISE 28
#define CALL_SENDTO 44
#define CALL_RECVFROM 45
#define CALL_SENDMSG 46
#define CALL_GETSOCKOPT 55
#define CALL_CLONE 56
#define CALL_EXIT_GROUP 231
#define CALL_PPOLL 271
#define CALL_ACCEPT4 288
#define CALL_SIGNALFD4 289
#elif defined(__aarch64__) && defined(__LP64__)
#define CALL_CLOSE 57
#define CALL_READ 63
#define CALL_WRITE 64
#define CALL_PREAD64 67
#define CALL_PPOLL 73
#define CALL_SIGNALFD4 74
#define CALL_EXIT_GROUP 94
#define CALL_RT_SIGPROCMASK 135
#define CALL_SENDTO 206
#define CALL_RECVFROM 207
#define CALL_GETSOCKOPT 209
#define CALL_SENDMSG 211
#define CALL_MUNMAP 215
#define CALL_CLONE 220
#define CALL_MADVISE 233
#define CALL_ACCEPT4 242
#else
#error "x86_64 and aarch64 only; ROCK uses fork elsewhere"
#endif

/* A function that Python finds by its name. All others are static. */
#define EXPORTED __attribute__((visibility("default")))

#define SIGNAL_CHILD 17 /* SIGCHLD */
#define SIGNALS_SIZE 8  /* bytes of the kernel's signal set */
#define SET_MASK 2      /* SIG_SETMASK */

/* One prepared system call: a row of a table that Python writes. 64 bytes.
 *
 * result: before the call, what the caller of the table put there; after it, what the kernel returned, which is a
 * negative error number on failure.
 */
struct call {
    long number;
    long arguments[6];
    long result;
};
_Static_assert(sizeof(struct call) == 64, "_ROW in guest/init/native.py and in runtime/namespace/launcher/zygote.py");

/* Make a system call; the result is a negative error number on failure. */
static inline __attribute__((always_inline)) long
system_call(long number, long first, long second, long third, long fourth, long fifth, long sixth)
{
#if defined(__x86_64__)
    register long r10 __asm__("r10") = fourth;
    register long r8 __asm__("r8") = fifth;
    register long r9 __asm__("r9") = sixth;
    long result;

    /* The kernel overwrites rcx and r11. */
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(number), "D"(first), "S"(second), "d"(third), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "cc", "memory");
    return result;
#else
    register long x8 __asm__("x8") = number;
    register long x0 __asm__("x0") = first;
    register long x1 __asm__("x1") = second;
    register long x2 __asm__("x2") = third;
    register long x3 __asm__("x3") = fourth;
    register long x4 __asm__("x4") = fifth;
    register long x5 __asm__("x5") = sixth;

    __asm__ volatile("svc #0"
                     : "+r"(x0)
                     : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x5)
                     : "cc", "memory");
    return x0;
#endif
}

/* Make the system call of a row. The result is returned, and not written to the row. */
static inline __attribute__((always_inline)) long make_call(const struct call *call)
{
    return system_call(call->number, call->arguments[0], call->arguments[1], call->arguments[2], call->arguments[3],
                       call->arguments[4], call->arguments[5]);
}

/* Set the signals that this thread blocks; the previous ones are written to `previous` unless it is null. */
static inline __attribute__((always_inline)) void
set_blocked_signals(const unsigned long *blocked, unsigned long *previous)
{
    system_call(CALL_RT_SIGPROCMASK, SET_MASK, (long)blocked, (long)previous, SIGNALS_SIZE, 0, 0);
}

#endif
