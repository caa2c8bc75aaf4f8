/* The zygote: a process that waits for commands in this function and never runs Python again.
 *
 * Each pid 1 is forked from it. It writes to no page while it waits, so all its pages stay shared with its children.
 * A pid 1 that was given a first program starts it here, and waits here too until it has work: until then it uses no
 * memory of its own but the stack. See runtime/namespace/launcher/zygote.py, which prepares the memory and reads
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
#define WHOLE 0x20             /* MSG_TRUNC: the result is the size of the message */
#define NO_SIGNAL 0x4000        /* MSG_NOSIGNAL */
#define READABLE 1             /* POLLIN */
#define SERVER 2               /* in the note: the user id of the server, see pack_note */
#define HELD 11                /* in the note: the first of the descriptors that are retained for streams */
#define STREAMS 4              /* of them; the first one is written to, the others are read */
#define LONGEST 128            /* bytes of a request that is served here */
#define ANSWER 192             /* bytes, more than of any response to one */
#define SOCKETS 1              /* SOL_SOCKET */
#define RIGHTS 1               /* SCM_RIGHTS */
#define PEER 17                /* SO_PEERCRED */
#define FOR_THIS_PROCESS 02004000 /* SOCK_CLOEXEC | SOCK_NONBLOCK */
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

/* In the zygote's own memory. 184 bytes. */
struct control {
    long commands;      /* descriptor from which addresses of areas are read */
    long replies;       /* descriptor to which they are written once their child exists */
    struct call *own;   /* calls of the zygote itself, made before it waits (namespace/snapshot.py) */
    unsigned long left; /* how many; afterwards how many were not made */
    long started;       /* in a child that waited: pid of the first program, or a negative error number */
    long connection;    /* there: the connection of the server, or -1 after its end */
    long watching;      /* there: whether the server waits for output of the first program */
    long note[NOTE];    /* there: the note of the area */
};
_Static_assert(__builtin_offsetof(struct control, left) == 24, "Zygote._control in runtime/namespace/launcher/zygote.py");
_Static_assert(sizeof(struct control) == 184, "_CONTROL in runtime/namespace/launcher/zygote.py");

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

static unsigned long length_of(const char *text)
{
    unsigned long length = 0;

    while (text[length])
        length++;
    return length;
}

/* Add a text, or a number, to a message that has room for it. Returns the new length. */
static unsigned long add_text(char *message, unsigned long length, const char *text)
{
    while (*text)
        message[length++] = *text++;
    return length;
}

static unsigned long add_number(char *message, unsigned long length, unsigned long number)
{
    char digits[20];
    unsigned long count = 0;

    do
        digits[count++] = (char)('0' + number % 10);
    while ((number /= 10));
    while (count)
        message[length++] = digits[--count];
    return length;
}

/* The number of a request that ends in this text, in the only form in which the server sends it
 * (rock/runtime/init/link.py); 0 for any other message.
 */
static unsigned long number_of(const char *message, unsigned long size, const char *after)
{
    static const char before[] = "{\"id\": ";
    unsigned long place, index, number = 0;

    for (place = 0; before[place]; place++)
        if (place >= size || message[place] != before[place])
            return 0;
    for (index = place; index < size && index < place + 15 && message[index] >= '0' && message[index] <= '9'; index++)
        number = number * 10 + (unsigned long)(message[index] - '0');
    if (size - index != length_of(after))
        return 0;
    for (place = 0; after[place]; place++)
        if (message[index + place] != after[place])
            return 0;
    return number;
}

/* Send a message if that is possible at once. Returns 0, or -1. */
static long send(long connection, const char *message, unsigned long size)
{
    return system_call(CALL_SENDTO, connection, (long)message, (long)size, NOW | NO_SIGNAL, 0, 0) == (long)size ? 0 : -1;
}

/* As `send`, with the descriptors that are retained for the streams of the first program. */
static long send_streams(long connection, const char *message, unsigned long size, const long *held)
{
    struct {
        unsigned long size;
        int level;
        int kind;
        int descriptors[STREAMS];
    } rights = {sizeof(rights), SOCKETS, RIGHTS, {0}};
    struct {
        const char *start;
        unsigned long size;
    } part = {message, size};
    struct {
        void *name;
        unsigned int name_size;
        void *parts;
        unsigned long count;
        void *rights;
        unsigned long rights_size;
        int flags;
    } whole = {(void *)0, 0, &part, 1, &rights, sizeof(rights), 0};
    unsigned long index;

    for (index = 0; index < STREAMS; index++)
        rights.descriptors[index] = (int)held[index];
    return system_call(CALL_SENDMSG, connection, (long)&whole, NOW | NO_SIGNAL, 0, 0, 0) == (long)size ? 0 : -1;
}

#define ENDED 1  /* the server has closed the connection */
#define SERVED 2 /* a request was served here */

/* Look at the message that waits on a connection: ENDED, SERVED, or 0 for work, which stays there. Served are requests for
 * what a server needs of an idle sandbox: to watch the streams of the first program while it has closed its own
 * descriptors, to receive them again, and to know the programs after its own restart.
 */
static long look_at_message(struct control *control)
{
    char request[LONGEST], reply[ANSWER];
    long connection = control->connection, program = control->started, sent;
    long size = system_call(CALL_RECVFROM, connection, (long)request, LONGEST, PEEK | NOW | WHOLE, 0, 0);
    unsigned long number, length, watch, attach, known;

    if (size == 0)
        return ENDED;
    if (size < 0 || size > LONGEST || program <= 0)
        return 0;
    watch = number_of(request, (unsigned long)size, ", \"op\": \"watch_streams\", \"key\": \"session:default\"}");
    attach = number_of(request, (unsigned long)size, ", \"op\": \"attach\", \"key\": \"session:default\"}");
    known = number_of(request, (unsigned long)size, ", \"op\": \"hello\", \"brief\": true}");
    number = watch ? watch : attach ? attach : known;
    if (!number)
        return 0;
    length = add_text(reply, 0, "{\"id\": ");
    length = add_number(reply, length, number);
    if (watch) {
        length = add_text(reply, length, ", \"ok\": true}");
        sent = send(connection, reply, length);
    } else if (attach) {
        length = add_text(reply, length, ", \"pid\": ");
        length = add_number(reply, length, (unsigned long)program);
        length = add_text(reply, length, ", \"pty\": false, \"streams\": [\"stdin\", \"stdout\", \"197\", \"199\"]}");
        sent = send_streams(connection, reply, length, control->note + HELD);
    } else {
        length = add_text(reply, length, ", \"programs\": [{\"pid\": ");
        length = add_number(reply, length, (unsigned long)program);
        length = add_text(reply, length, ", \"key\": \"session:default\", \"keep\": true}]}");
        sent = send(connection, reply, length);
    }
    if (sent < 0)
        return 0;
    if (!known)
        control->watching = watch != 0;
    system_call(CALL_RECVFROM, connection, (long)request, LONGEST, NOW, 0, 0);
    return SERVED;
}

/* Accept the connection of a server after the end of the earlier one, with the checks of Python (pid1.py): a process
 * outside of this pid namespace, of the server's user. Any other one is closed. Returns 0, or -1 for work.
 */
static long accept_server(long listener, struct control *control)
{
    struct {
        int process;
        unsigned int user;
        unsigned int group;
    } peer = {-1, 0, 0};
    unsigned int size = sizeof(peer);
    long connection;

    if (control->connection >= 0)
        return -1;
    connection = system_call(CALL_ACCEPT4, listener, 0, 0, FOR_THIS_PROCESS, 0, 0);
    if (connection < 0)
        return -1;
    if (system_call(CALL_GETSOCKOPT, connection, SOCKETS, PEER, (long)&peer, (long)&size, 0) < 0 || peer.process != 0 ||
        peer.user != (unsigned int)control->note[SERVER]) {
        system_call(CALL_CLOSE, connection, 0, 0, 0, 0, 0);
        return 0;
    }
    control->connection = connection;
    control->watching = 0;
    return 0;
}

/* Tell the server that there is output of the first program, or the end of it. Returns 0, or -1. */
static long tell_output(long connection, long program)
{
    char event[LONGEST];
    unsigned long length = add_text(event, 0, "{\"event\": \"readable\", \"pid\": ");

    length = add_number(event, length, (unsigned long)program);
    length = add_text(event, length, "}");
    return send(connection, event, length);
}

/* Wait until there is work: a request of the server that is not served here, a second connection, or one of the blocked
 * signals, which tell of the end of a child. The end of the connection is no work, nor is the next one of a server.
 * `connection` and `watching` of the control are valid afterwards.
 */
static void wait_for_work(long listener, struct control *control, const unsigned long *blocked)
{
    long signals = system_call(CALL_SIGNALFD4, -1, (long)blocked, SIGNALS_SIZE, CLOSE_ON_EXEC, 0, 0);

    while (signals >= 0) {
        struct waited waited[2 + STREAMS];
        unsigned long count = control->watching ? 2 + STREAMS : 3, index, output = 0;
        long found;

        for (index = 0; index < count; index++) {
            waited[index].descriptor = (int)(index == 0 ? listener : index == 1 ? control->connection
                                             : index == 2 ? signals : control->note[HELD + index - 2]);
            waited[index].events = READABLE;
            waited[index].found = 0;
        }
        found = system_call(CALL_PPOLL, (long)waited, (long)count, 0, 0, SIGNALS_SIZE, 0);
        if (found == INTERRUPTED)
            continue;
        if (found < 0 || waited[2].found)
            break;
        for (index = 3; index < count; index++)
            output |= waited[index].found != 0;
        if (waited[1].found) {
            long message = look_at_message(control);

            if (message == 0)
                break;
            if (message == SERVED)
                continue;
            system_call(CALL_CLOSE, control->connection, 0, 0, 0, 0, 0);
            control->connection = -1;
            control->watching = 0;
        } else if (waited[0].found) {
            if (accept_server(listener, control) < 0)
                break;
        } else if (output) {
            if (tell_output(control->connection, control->started) < 0)
                break;
            control->watching = 0;
        }
    }
    if (signals >= 0)
        system_call(CALL_CLOSE, signals, 0, 0, 0, 0, 0);
}

/* The life of a child whose rows are made: start the first program, report that this process is ready, wait. From the
 * report on, the launcher uses the area for another child: it is unmapped first. The end of a child stays pending until
 * Python looks for ended children.
 */
static long live(struct area *area, struct control *control)
{
    struct call *program = area->calls + area->count;
    unsigned long child = 1UL << (SIGNAL_CHILD - 1), previous = 0, index;
    long listener = area->listener, ready = area->ready;

    set_blocked_signals(&child, &previous);
    control->started = area->started = start_first(program, area->program);
    for (index = 0; index < NOTE; index++)
        control->note[index] = area->note[index];
    control->connection = area->connection;
    control->watching = 0;
    run_rows(program + area->program, area->after);
    system_call(CALL_MUNMAP, area->shared, area->size, 0, 0, 0, 0);
    system_call(CALL_WRITE, ready, (long)"{}", 2, 0, 0, 0);
    system_call(CALL_CLOSE, ready, 0, 0, 0, 0, 0);
    wait_for_work(listener, control, &child);
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
