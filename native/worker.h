/*
 * Workers: threads that own the rings of queues, so that the kernel copies requests' data in them and not in the thread that
 * serves. Whoever serves sees of such a queue what it sees of a ring of its own (ring.h): events, answers, and a descriptor to
 * wait for. Everything that Python calls is between the two marker lines below.
 *
 * Every function returns a count, or a negative errno. Of one worker's queues all calls come from one thread. A null queue is
 * allowed everywhere and gives -EBADF.
 */
#ifndef UT_WORKER_H
#define UT_WORKER_H

#include <stdint.h>

#include "ring.h"

/* ---- cffi begins ---- */

struct ut_worker;

int ut_worker_open(struct ut_worker **worker, unsigned cpu, const char **failed);
int ut_worker_thread_id(const struct ut_worker *worker);
int ut_worker_close(struct ut_worker *worker);

struct ut_worker_queue;

int ut_worker_queue_open(struct ut_worker_queue **queue, struct ut_worker *worker, struct ut_queue_config *config);
int ut_worker_queue_fd(const struct ut_worker_queue *queue);
unsigned ut_worker_queue_events_max(const struct ut_worker_queue *queue);
int ut_worker_queue_reap(struct ut_worker_queue *queue, struct ut_event *events, unsigned max);
int ut_worker_queue_commit(struct ut_worker_queue *queue, const int64_t *answers, unsigned n);
int ut_worker_queue_copy_in(const struct ut_worker_queue *queue, uint16_t tag, uint16_t slot);
int ut_worker_queue_untaken(struct ut_worker_queue *queue);
int ut_worker_queue_arm(struct ut_worker_queue *queue);
void ut_worker_queue_counters(struct ut_worker_queue *queue, struct ut_queue_counters *counters);
int ut_worker_queue_close(struct ut_worker_queue *queue);

/* ---- cffi ends ---- */

#endif
