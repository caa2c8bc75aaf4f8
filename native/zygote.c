/* The zygote: a process that waits for commands in this function and never runs Python again.
 *
 * Each pid 1 is forked from it. It writes to no page while it waits, so all its pages stay shared with its children.
 * See runtime/namespace/launcher/zygote.py, which prepares the memory and reads the results.
 */

#include "syscall.h"

#define OPTIONAL 1 /* in `result` of a row before the call: the call may fail */

/* Memory shared with the launcher, for one child. 24 bytes, then the rows. */
struct area {
    unsigned long flags; /* of clone: namespaces, and the signal to send at the end */
    unsigned long count; /* rows */
    long pid;            /* of the child, or a negative error number; written by the zygote */
    struct call calls[];
};
_Static_assert(sizeof(struct area) == 24, "_HEAD in runtime/namespace/launcher/zygote.py");

/* In the zygote's own memory. 32 bytes. */
struct control {
    long commands;      /* descriptor from which addresses of areas are read */
    long replies;       /* descriptor to which they are written once their child exists */
    struct call *own;   /* calls of the zygote itself, made before it waits (namespace/snapshot.py) */
    unsigned long left; /* how many; afterwards how many were not made */
};
_Static_assert(__builtin_offsetof(struct control, left) == 24, "Zygote._control in runtime/namespace/launcher/zygote.py");

/* The rows of a new child, in order. Returns the address of the area, negated when a call failed that had to succeed. */
static long run_rows(struct area *area)
{
    unsigned long index;

    for (index = 0; index < area->count; index++) {
        struct call *call = &area->calls[index];
        long needed = call->result;

        call->result = make_call(call);
        if (call->result < 0 && needed != OPTIONAL)
            return -(long)area;
    }
    return (long)area;
}

/* Make the zygote's own calls, then fork a child for each area that is asked for.
 *
 * Returns 0 in the zygote, when the launcher has closed its end of `commands`. Returns in each child with the result
 * of run_rows: so the child continues in Python, from a copy of the frame that called this function.
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
        if (pid == 0)
            return run_rows(area);
        area->pid = pid;
        system_call(CALL_WRITE, control->replies, (long)&area, sizeof(area), 0, 0, 0);
    }
}
