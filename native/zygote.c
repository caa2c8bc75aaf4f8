/* The zygote: a process that waits for commands in this function and never runs Python again.
 *
 * Each pid 1 is forked from it. It writes to no page while it waits, so all its pages stay shared with its children.
 * A pid 1 that was given a first program starts it here, and waits here too until it has something to do: until then it
 * uses no memory of its own but the stack. See runtime/namespace/launcher/zygote.py, which prepares the memory and reads
 * the results.
 */

#include "child.h"

#define OPTIONAL 1 /* in `result` of a row before the call: the call may fail */
#define WAITED 1   /* result of rock_run_zygote: of a pid 1 that has waited; no address of an area */
#define NOTE 16    /* words */
#define STACK 4096 /* bytes, of the child that becomes the first program */

#define CLOSE_ON_EXEC 02000000 /* SFD_CLOEXEC */
#define NOW 0x40               /* MSG_DONTWAIT */
#define PEEK 2                 /* MSG_PEEK */
#define READABLE 1             /* POLLIN */
#define INTERRUPTED (-4)       /* EINTR */

/* Memory shared with the launcher, for one child. 96 bytes, then the rows. */
struct area {
    unsigned long flags;   /* of clone: namespaces, and the signal to send at the end */
    unsigned long count;   /* rows */
    long pid;              /* of the child, or a negative error number; written by the zygote */
    unsigned long program; /* rows after those, of the first program; 0: there is none */
    unsigned long after;   /* rows after those, made once the program was started */
    long started;          /* pid of the first program, or a negative error number; written by the child */
    long listener;         /* descriptor on which the server connects */
    long connection;       /* descriptor of the connection of the server */
    long ready;            /* descriptor for the report that the child is ready */
    unsigned long shared;  /* address and size of all areas */
    unsigned long size;
    const long *note;      /* NOTE words for the child */
    struct call calls[];
};
_Static_assert(sizeof(struct area) == 96, "_HEAD in runtime/namespace/launcher/zygote.py");

/* In the zygote's own memory. 176 bytes. */
struct control {
    long commands;      /* descriptor from which addresses of areas are read */
    long replies;       /* descriptor to which they are written once their child exists */
    struct call *own;   /* calls of the zygote itself, made before it waits (namespace/snapshot.py) */
    unsigned long left; /* how many; afterwards how many were not made */
    long started;       /* in a child that waited: pid of the first program, or a negative error number */
    long connection;    /* there: the connection of the server, or -1 after its end */
    long note[NOTE];    /* there: the note of the area */
};
_Static_assert(__builtin_offsetof(struct control, left) == 24, "Zygote._control in runtime/namespace/launcher/zygote.py");
_Static_assert(sizeof(struct control) == 176, "_CONTROL in runtime/namespace/launcher/zygote.py");

struct waited {
    int descriptor;
    short events;
    short found;
};

/* Rows, in order. Returns 0, or -1 when a call failed that had to succeed. */
static long run_rows(struct call *call, unsigned long count)
{
    struct call *end = call + count;

    for (; call < end; call++) {
        long needed = call->result;

        call->result = make_call(call);
        if (call->result < 0 && needed != OPTIONAL)
            return -1;
    }
    return 0;
}

/* Start the first program: a child makes its rows, of which the last one is execve. Returns its pid, or a negative error
 * number. Nothing else runs in the sandbox yet, so nothing can stop the child while this process waits for it.
 */
static long start_first(struct call *calls, unsigned long count)
{
    char stack[STACK] __attribute__((aligned(16)));
    struct table table = {calls, count};
    unsigned long all = ~0UL, previous = 0, index;
    long pid;

    set_blocked_signals(&all, &previous);
    pid = clone_child(UNTIL_EXECUTED, stack + sizeof(stack), &table);
    set_blocked_signals(&previous, (unsigned long *)0);
    for (index = 0; pid > 0 && index < count; index++)
        if (calls[index].result < 0)
            return calls[index].result;
    return pid;
}

/* Whether the peer of a connection has closed it without leaving a message. */
static long is_over(long connection)
{
    char byte;

    return system_call(CALL_RECVFROM, connection, (long)&byte, 1, PEEK | NOW, 0, 0) == 0;
}

/* Wait until there is work: a request of the server, another connection, or one of the blocked signals, which tell of the
 * end of a child. Returns the connection of the server, or -1 after its end, which is no work.
 */
static long wait_for_work(long listener, long connection, const unsigned long *blocked)
{
    long signals = system_call(CALL_SIGNALFD4, -1, (long)blocked, SIGNALS_SIZE, CLOSE_ON_EXEC, 0, 0);

    while (signals >= 0) {
        struct waited waited[3] = {{(int)listener, READABLE, 0}, {(int)connection, READABLE, 0},
                                   {(int)signals, READABLE, 0}};
        long found = system_call(CALL_PPOLL, (long)waited, 3, 0, 0, SIGNALS_SIZE, 0);

        if (found == INTERRUPTED)
            continue;
        if (found < 0 || waited[0].found || waited[2].found || !is_over(connection))
            break;
        system_call(CALL_CLOSE, connection, 0, 0, 0, 0, 0);
        connection = -1;
    }
    if (signals >= 0)
        system_call(CALL_CLOSE, signals, 0, 0, 0, 0, 0);
    return connection;
}

/* The life of a child whose rows are made: start the first program, report that this process is ready, wait. From the
 * report on, the launcher uses the area for another child: it is unmapped first. The end of a child stays pending until
 * Python looks for ended children.
 */
static long live(struct area *area, struct control *control)
{
    struct call *program = area->calls + area->count;
    unsigned long child = 1UL << (SIGNAL_CHILD - 1), previous = 0, index;
    long listener = area->listener, connection = area->connection, ready = area->ready;

    set_blocked_signals(&child, &previous);
    control->started = area->started = start_first(program, area->program);
    for (index = 0; index < NOTE; index++)
        control->note[index] = area->note[index];
    run_rows(program + area->program, area->after);
    system_call(CALL_MUNMAP, area->shared, area->size, 0, 0, 0, 0);
    system_call(CALL_WRITE, ready, (long)"{}", 2, 0, 0, 0);
    system_call(CALL_CLOSE, ready, 0, 0, 0, 0, 0);
    control->connection = wait_for_work(listener, connection, &child);
    set_blocked_signals(&previous, (unsigned long *)0);
    return WAITED;
}

/* Make the zygote's own calls, then fork a child for each area that is asked for.
 *
 * Returns 0 in the zygote, when the launcher has closed its end of `commands`. Returns in each child: the address of its
 * area, negated when a call failed that had to succeed, or WAITED. So the child continues in Python, from a copy of the
 * frame that called this function.
 *
 * The own calls write the memory of this process to a file and map the file over the same memory. Between the first and
 * the last of them nothing may be written but the stack, which is not part of it. `result` of such a row is the only
 * result with which the next one is made.
 */
EXPORTED long rock_run_zygote(struct control *control)
{
    struct call *own = control->own;
    unsigned long left = control->left;

    while (left > 0 && make_call(own) == own->result) {
        own++;
        left--;
    }
    control->left = left;
    system_call(CALL_WRITE, control->replies, (long)&control->left, sizeof(long), 0, 0, 0);
    for (;;) {
        struct area *area = 0;
        long pid;

        if (system_call(CALL_READ, control->commands, (long)&area, sizeof(area), 0, 0, 0) != sizeof(area))
            return 0;
        pid = system_call(CALL_CLONE, area->flags, 0, 0, 0, 0, 0); /* without a stack this is a fork */
        if (pid == 0) {
            if (run_rows(area->calls, area->count) < 0)
                return -(long)area;
            return area->program ? live(area, control) : (long)area;
        }
        area->pid = pid;
        system_call(CALL_WRITE, control->replies, (long)&area, sizeof(area), 0, 0, 0);
    }
}
