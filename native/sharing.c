/* Give back pages of this process that are equal to those of the file that they were mapped from.
 *
 * The memory of each pid 1 is a private mapping of a sealed memory file (runtime/namespace/launcher/snapshot.py). A page that was
 * written to is a copy, even when its bytes are those of the file again. This function finds such copies and drops
 * them: what is read there next is the page of the file, which all sandboxes share. See guest/init/sharing.py.
 */

#include "syscall.h"

#define PAGE 4096UL
#define WORDS (PAGE / sizeof(unsigned long))
#define CHUNK 512UL          /* pages per read of the page table */
#define DONT_NEED 4          /* MADV_DONTNEED */
#define KIND(entry) ((entry) >> 61)
#define PRESENT_AND_OWN 4UL  /* bits 63 to 61 of a page table entry: present, not swapped, not a page of a file */

struct region {
    unsigned long start; /* address */
    unsigned long pages;
    unsigned long copy;  /* address at which the same part of the file is mapped read-only */
};
_Static_assert(sizeof(struct region) == 24, "Region in guest/init/sharing.py");

static int equal(const unsigned long *one, const unsigned long *other)
{
    unsigned long index;

    for (index = 0; index < WORDS; index++)
        if (one[index] != other[index])
            return 0;
    return 1;
}

/* volatile: the compiler must not make a call of memcpy of it */
static void copy_page(volatile unsigned long *to, const unsigned long *from)
{
    unsigned long index;

    for (index = 0; index < WORDS; index++)
        to[index] = from[index];
}

/* Drop the pages of one chunk that are equal to the file. entries: what the page table says about each, overwritten.
 * Returns how many were equal and still are.
 */
static long share_chunk(unsigned long start, unsigned long copy, unsigned long *entries, unsigned long count)
{
    unsigned long index;
    long shared = 0;

    for (index = 0; index < count; index++) {
        unsigned long offset = index * PAGE;

        /* An absent page is not touched, so that a hole in the memory is no fault. */
        entries[index] = KIND(entries[index]) == PRESENT_AND_OWN &&
                         equal((unsigned long *)(start + offset), (unsigned long *)(copy + offset));
        if (entries[index]) {
            system_call(CALL_MADVISE, start + offset, PAGE, DONT_NEED, 0, 0, 0);
            shared++;
        }
    }
    /* Memory that was unmapped and mapped anew is not the file's: dropping such a page loses its bytes. They were equal
     * to the file, so they are copied back from there. */
    for (index = 0; index < count; index++) {
        unsigned long offset = index * PAGE;

        if (entries[index] && !equal((unsigned long *)(start + offset), (unsigned long *)(copy + offset))) {
            copy_page((unsigned long *)(start + offset), (unsigned long *)(copy + offset));
            shared--;
        }
    }
    return shared;
}

/* Drop the pages of `count` regions that are equal to the file. Returns how many were equal.
 *
 * pagemap: descriptor of /proc/self/pagemap. The caller guarantees that there is one thread and that no child shares the
 * memory; signals are blocked here. So nobody writes to a page between its comparison and its release. All variables
 * are on the stack, which is in no region.
 */
EXPORTED long rock_share_pages(const struct region *regions, unsigned long count, long pagemap)
{
    unsigned long entries[CHUNK];
    unsigned long all = ~0UL, previous = 0, index;
    long shared = 0;

    set_blocked_signals(&all, &previous);
    for (index = 0; index < count; index++) {
        unsigned long start = regions[index].start, copy = regions[index].copy, left = regions[index].pages;

        while (left > 0) {
            unsigned long pages = left < CHUNK ? left : CHUNK;
            long size = pages * sizeof(entries[0]);

            if (system_call(CALL_PREAD64, pagemap, (long)entries, size, start / PAGE * sizeof(entries[0]), 0, 0) != size)
                break; /* no page table: this region stays as it is */
            shared += share_chunk(start, copy, entries, pages);
            start += pages * PAGE;
            copy += pages * PAGE;
            left -= pages;
        }
    }
    set_blocked_signals(&previous, (unsigned long *)0);
    return shared;
}
