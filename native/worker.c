/*
 * Workers. See worker.h for the interface.
 *
 * Some facts, and what they mean here:
 *
 * - The kernel binds a tag to the thread that fetched it, and a ring with SINGLE_ISSUER to the thread that set it up. So a worker
 *   opens its queues' rings itself and sends every one of their commands.
 * - The data of a WRITE is copied when the kernel hands the request over, in the thread that fetched the tag; that of a READ in the
 *   thread that commits. Both are the worker here: that, and the system calls, is all that it does. It never runs Python.
 * - With user copy a READ's data is moved by the worker as well, when it sends the answer. A WRITE's is moved by the engine's thread, which
 *   alone knows when there is a buffer, and would have to be woken once more if the worker did it.
 * - A command that ends becomes task work of the worker. Task work wakes a thread that sleeps in epoll_wait, blocked signals or not,
 *   and is run before that returns; the ring's descriptor is readable then. So sleeping there misses nothing.
 * - A commit is no longer done when the call that asked for it returns: until the worker has sent it, the kernel has not read the
 *   buffer. Who uses that buffer for something else looks at ut_worker_queue_untaken first.
 *
 * What both threads touch is under the worker's mutex, which nobody holds during a system call but for the writes that wake the
 * other side. An eventfd is written only if the other side said that it sleeps.
 */
#define _GNU_SOURCE
#include "worker.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

/* A worker calls nothing that needs more. */
#define STACK_BYTES (256 * 1024)

/* More than any kernel is built for: a larger number is a mistake, and its set of CPUs would cost memory. */
#define CPUS_MAX (1U << 16)

/* How many readable rings one epoll_wait tells of. The others are found all the same. */
#define READABLE_MAX 16

struct answer {
	int64_t packed;
	uint16_t slot;
};

struct ut_worker_queue {
	struct ut_worker *worker;
	uint16_t depth;
	uint32_t buffers;
	unsigned events_max;
	/* The engine's: which buffer each tag has. Read by the engine's thread only. */
	const uint16_t *slots;

	/* The worker's alone. */
	struct ut_worker_queue *next;
	struct ut_queue *ring;
	uint16_t *sent_slots;
	int64_t *sending;
	struct ut_event *reaped;
	bool broken;

	/* Under the worker's mutex. pending_count may be looked at without: it is set before its worker is woken. */
	struct answer *pending;
	atomic_uint pending_count;
	struct ut_event *events;
	unsigned events_count;
	/* Answers that came from the engine, and those of them that the kernel has; events that the engine got. */
	uint64_t accepted;
	uint64_t taken;
	uint64_t given;
	/* What the engine was told of taken, if it waits for more. */
	uint64_t taken_seen;
	bool taken_watched;
	int error;
	bool armed;
	bool signalled;
	struct ut_queue_counters counters;
	/* Readable when the engine, which had nothing to do, has something. */
	int event_fd;
};

enum job_kind { OPEN_QUEUE, CLOSE_QUEUE };

/* Something that the worker's thread must do while its caller waits. */
struct job {
	enum job_kind kind;
	struct ut_worker_queue *queue;
	struct ut_queue_config *config;
	int result;
	bool done;
	struct job *next;
};

struct ut_worker {
	pthread_t thread;
	unsigned cpu;
	int epoll_fd;
	int wake_fd;

	/* The worker's alone. */
	struct ut_worker_queue *queues;

	pthread_mutex_t mutex;
	pthread_cond_t changed;
	/* Under the mutex. */
	struct job *jobs;
	int thread_id;
	bool asleep;
	bool stopping;
};

static void lock(struct ut_worker *worker)
{
	pthread_mutex_lock(&worker->mutex);
}

static void unlock(struct ut_worker *worker)
{
	pthread_mutex_unlock(&worker->mutex);
}

/* An eventfd's counter cannot overflow by ones, so the only write that fails is one that was interrupted. */
static void signal_eventfd(int fd)
{
	const uint64_t one = 1;

	while (write(fd, &one, sizeof one) < 0 && errno == EINTR)
		;
}

/* Under the mutex. */
static void wake_worker(struct ut_worker *worker)
{
	if (!worker->asleep)
		return;
	worker->asleep = false;
	signal_eventfd(worker->wake_fd);
}

/* Under the mutex. */
static bool engine_has_work(const struct ut_worker_queue *queue)
{
	return queue->events_count > 0 || queue->error < 0 || (queue->taken_watched && queue->taken > queue->taken_seen);
}

/* Under the mutex. */
static void wake_engine(struct ut_worker_queue *queue)
{
	if (!queue->armed || !engine_has_work(queue))
		return;
	queue->armed = false;
	queue->signalled = true;
	signal_eventfd(queue->event_fd);
}

/* ---- in the worker's thread ---- */

/* Send what the engine has put there. Returns how many, or a negative errno. */
static int send_pending(struct ut_worker_queue *queue)
{
	struct ut_worker *worker = queue->worker;
	unsigned n;
	int error;

	if (atomic_load_explicit(&queue->pending_count, memory_order_acquire) == 0)
		return 0;
	lock(worker);
	n = atomic_load_explicit(&queue->pending_count, memory_order_relaxed);
	for (unsigned i = 0; i < n; i++) {
		uint16_t tag = (uint16_t)queue->pending[i].packed;

		queue->sending[i] = queue->pending[i].packed;
		if (tag < queue->depth)
			queue->sent_slots[tag] = queue->pending[i].slot;
	}
	atomic_store_explicit(&queue->pending_count, 0, memory_order_relaxed);
	unlock(worker);
	error = queue->broken ? 0 : ut_queue_commit(queue->ring, queue->sending, n);
	return error < 0 ? error : (int)n;
}

/* One pass over a queue. Returns whether there was anything to do. */
static bool serve(struct ut_worker_queue *queue)
{
	struct ut_worker *worker = queue->worker;
	struct ut_queue_counters of_ring;
	int sent = send_pending(queue);
	int reaped = 0;

	if (sent >= 0 && !queue->broken)
		reaped = ut_queue_reap(queue->ring, queue->reaped, queue->events_max);
	if (sent == 0 && reaped == 0)
		return false;
	if (sent < 0 || reaped < 0) {
		/* A ring that fails stays readable for ever. */
		queue->broken = true;
		epoll_ctl(worker->epoll_fd, EPOLL_CTL_DEL, ut_queue_fd(queue->ring), NULL);
	}
	ut_queue_counters(queue->ring, &of_ring);
	lock(worker);
	queue->counters.copies_failed = of_ring.copies_failed;
	if (sent > 0)
		queue->taken += (unsigned)sent;
	if (reaped > 0) {
		/* ut_worker_queue_commit lets no more commands through than there is room for events, and each has one. */
		if (queue->events_count + (unsigned)reaped > queue->events_max)
			abort();
		memcpy(queue->events + queue->events_count, queue->reaped, (unsigned)reaped * sizeof *queue->events);
		queue->events_count += (unsigned)reaped;
	}
	if (queue->error == 0)
		queue->error = sent < 0 ? sent : reaped < 0 ? reaped : 0;
	wake_engine(queue);
	unlock(worker);
	return true;
}

static int open_ring(struct ut_worker_queue *queue, struct ut_queue_config *config)
{
	struct ut_worker *worker = queue->worker;
	struct epoll_event readable = { .events = EPOLLIN };
	int error = ut_queue_open(&queue->ring, config);

	if (error < 0)
		return error;
	config->failed = "epoll_ctl";
	if (epoll_ctl(worker->epoll_fd, EPOLL_CTL_ADD, ut_queue_fd(queue->ring), &readable) < 0) {
		error = -errno;
		close(ut_queue_close(queue->ring));
		return error;
	}
	config->failed = NULL;
	queue->next = worker->queues;
	worker->queues = queue;
	return 0;
}

/* What the engine has answered goes out before. Gives the witness. */
static int close_ring(struct ut_worker_queue *queue)
{
	struct ut_worker_queue **link = &queue->worker->queues;

	send_pending(queue);
	while (*link != queue)
		link = &(*link)->next;
	*link = queue->next;
	if (!queue->broken)
		epoll_ctl(queue->worker->epoll_fd, EPOLL_CTL_DEL, ut_queue_fd(queue->ring), NULL);
	return ut_queue_close(queue->ring);
}

/* Under the mutex, which is let go meanwhile. */
static void do_jobs(struct ut_worker *worker)
{
	while (worker->jobs) {
		struct job *job = worker->jobs;

		worker->jobs = job->next;
		unlock(worker);
		job->result = job->kind == OPEN_QUEUE ? open_ring(job->queue, job->config) : close_ring(job->queue);
		lock(worker);
		job->done = true;
		pthread_cond_broadcast(&worker->changed);
	}
}

/* Under the mutex: whether nobody has put anything there since the last pass. If so, from now on who does wakes the worker. */
static bool fall_asleep(struct ut_worker *worker)
{
	if (worker->jobs || worker->stopping)
		return false;
	for (const struct ut_worker_queue *queue = worker->queues; queue; queue = queue->next)
		if (atomic_load_explicit(&queue->pending_count, memory_order_relaxed) > 0)
			return false;
	worker->asleep = true;
	return true;
}

static void *work(void *argument)
{
	struct ut_worker *worker = argument;
	struct epoll_event readable[READABLE_MAX];
	char name[16];

	snprintf(name, sizeof name, "ublk-cpu%u", worker->cpu);
	pthread_setname_np(pthread_self(), name);
	lock(worker);
	worker->thread_id = gettid();
	pthread_cond_broadcast(&worker->changed);
	for (;;) {
		bool busy = false;
		bool idle;

		do_jobs(worker);
		if (worker->stopping)
			break;
		unlock(worker);
		for (struct ut_worker_queue *queue = worker->queues; queue; queue = queue->next)
			busy |= serve(queue);
		lock(worker);
		idle = !busy && fall_asleep(worker);
		if (!idle)
			continue;
		unlock(worker);
		/* The wake-up descriptor is edge-triggered, so that nobody has to read it. An interrupted wait is a wait that is over. */
		epoll_wait(worker->epoll_fd, readable, READABLE_MAX, -1);
		lock(worker);
		worker->asleep = false;
	}
	unlock(worker);
	return NULL;
}

/* ---- in the engine's thread ---- */

static int start_thread(struct ut_worker *worker)
{
	pthread_attr_t attributes;
	cpu_set_t *cpus = CPU_ALLOC(worker->cpu + 1);
	size_t cpus_bytes = CPU_ALLOC_SIZE(worker->cpu + 1);
	sigset_t all, before;
	int error;

	if (!cpus)
		return -ENOMEM;
	error = pthread_attr_init(&attributes);
	if (error) {
		CPU_FREE(cpus);
		return -error;
	}
	CPU_ZERO_S(cpus_bytes, cpus);
	CPU_SET_S(worker->cpu, cpus_bytes, cpus);
	error = pthread_attr_setaffinity_np(&attributes, cpus_bytes, cpus);
	if (!error)
		error = pthread_attr_setstacksize(&attributes, STACK_BYTES);
	if (!error) {
		/* Signals are for the threads that run Python. The new one inherits the mask. */
		sigfillset(&all);
		pthread_sigmask(SIG_SETMASK, &all, &before);
		error = pthread_create(&worker->thread, &attributes, work, worker);
		pthread_sigmask(SIG_SETMASK, &before, NULL);
	}
	pthread_attr_destroy(&attributes);
	CPU_FREE(cpus);
	return -error;
}

/* Starts a thread on that CPU. -EINVAL: this process may not run there, or the CPU is offline. */
int ut_worker_open(struct ut_worker **opened, unsigned cpu, const char **failed)
{
	struct epoll_event woken = { .events = EPOLLIN | EPOLLET };
	struct ut_worker *worker;
	int error;

	*failed = "ut_worker_open";
	if (cpu >= CPUS_MAX)
		return -EINVAL;
	*failed = "calloc";
	worker = calloc(1, sizeof *worker);
	if (!worker)
		return -ENOMEM;
	worker->cpu = cpu;
	worker->wake_fd = -1;
	pthread_mutex_init(&worker->mutex, NULL);
	pthread_cond_init(&worker->changed, NULL);
	*failed = "epoll_create1";
	worker->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	if (worker->epoll_fd < 0) {
		error = -errno;
		goto free_worker;
	}
	*failed = "eventfd";
	worker->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (worker->wake_fd < 0) {
		error = -errno;
		goto close_files;
	}
	*failed = "epoll_ctl";
	if (epoll_ctl(worker->epoll_fd, EPOLL_CTL_ADD, worker->wake_fd, &woken) < 0) {
		error = -errno;
		goto close_files;
	}
	*failed = "pthread_create";
	error = start_thread(worker);
	if (error < 0)
		goto close_files;
	lock(worker);
	while (worker->thread_id == 0)
		pthread_cond_wait(&worker->changed, &worker->mutex);
	unlock(worker);
	*failed = NULL;
	*opened = worker;
	return 0;

close_files:
	if (worker->wake_fd >= 0)
		close(worker->wake_fd);
	close(worker->epoll_fd);
free_worker:
	pthread_cond_destroy(&worker->changed);
	pthread_mutex_destroy(&worker->mutex);
	free(worker);
	return error;
}

int ut_worker_thread_id(const struct ut_worker *worker)
{
	return worker ? worker->thread_id : -EBADF;
}

/* Ends the thread and waits for its end. -EBUSY, with nothing done: it still has queues. */
int ut_worker_close(struct ut_worker *worker)
{
	if (!worker)
		return -EBADF;
	/* Only jobs change the list, and who calls here is who gives the jobs. */
	if (worker->queues)
		return -EBUSY;
	lock(worker);
	worker->stopping = true;
	wake_worker(worker);
	unlock(worker);
	pthread_join(worker->thread, NULL);
	close(worker->wake_fd);
	close(worker->epoll_fd);
	pthread_cond_destroy(&worker->changed);
	pthread_mutex_destroy(&worker->mutex);
	free(worker);
	return 0;
}

/* Have the worker do something, and wait until it is done. */
static int run_job(struct ut_worker_queue *queue, enum job_kind kind, struct ut_queue_config *config)
{
	struct ut_worker *worker = queue->worker;
	struct job job = { .kind = kind, .queue = queue, .config = config };

	lock(worker);
	job.next = worker->jobs;
	worker->jobs = &job;
	wake_worker(worker);
	while (!job.done)
		pthread_cond_wait(&worker->changed, &worker->mutex);
	unlock(worker);
	return job.result;
}

static void free_queue(struct ut_worker_queue *queue)
{
	if (queue->event_fd >= 0)
		close(queue->event_fd);
	free(queue->sent_slots);
	free(queue->sending);
	free(queue->reaped);
	free(queue->pending);
	free(queue->events);
	free(queue);
}

static bool allocate_batches(struct ut_worker_queue *queue, uint16_t depth)
{
	unsigned entries = 1;

	/* As large as the ring's completion queue, see ut_queue_open. */
	while (entries < depth)
		entries <<= 1;
	queue->events_max = 2 * entries;
	queue->sent_slots = malloc(depth * sizeof *queue->sent_slots);
	queue->sending = malloc(queue->events_max * sizeof *queue->sending);
	queue->reaped = malloc(queue->events_max * sizeof *queue->reaped);
	queue->pending = malloc(queue->events_max * sizeof *queue->pending);
	queue->events = malloc(queue->events_max * sizeof *queue->events);
	return queue->sent_slots && queue->sending && queue->reaped && queue->pending && queue->events;
}

/* As ut_queue_open; the ring is the worker's. */
int ut_worker_queue_open(struct ut_worker_queue **opened, struct ut_worker *worker, struct ut_queue_config *config)
{
	struct ut_queue_config of_worker = *config;
	struct ut_worker_queue *queue;
	int error = -ENOMEM;

	config->failed = "ut_worker_queue_open";
	if (!worker)
		return -EBADF;
	if (config->depth == 0)
		return -EINVAL;
	config->failed = "calloc";
	queue = calloc(1, sizeof *queue);
	if (!queue)
		return -ENOMEM;
	queue->worker = worker;
	queue->depth = config->depth;
	queue->buffers = config->buffers;
	queue->slots = config->slots;
	queue->event_fd = -1;
	if (!allocate_batches(queue, config->depth))
		goto free_queue;
	config->failed = "eventfd";
	queue->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (queue->event_fd < 0) {
		error = -errno;
		goto free_queue;
	}
	of_worker.slots = queue->sent_slots;
	error = run_job(queue, OPEN_QUEUE, &of_worker);
	config->failed = of_worker.failed;
	if (error < 0)
		goto free_queue;
	*opened = queue;
	return 0;

free_queue:
	free_queue(queue);
	return error;
}

/* Readable once ut_worker_queue_arm has said that there is nothing to do, and that has changed. */
int ut_worker_queue_fd(const struct ut_worker_queue *queue)
{
	return queue ? queue->event_fd : -EBADF;
}

unsigned ut_worker_queue_events_max(const struct ut_worker_queue *queue)
{
	return queue ? queue->events_max : 0;
}

/* Up to max events. Never a system call. */
int ut_worker_queue_reap(struct ut_worker_queue *queue, struct ut_event *events, unsigned max)
{
	unsigned n;
	int error;

	if (!queue)
		return -EBADF;
	lock(queue->worker);
	queue->counters.reaps++;
	n = queue->events_count < max ? queue->events_count : max;
	memcpy(events, queue->events, n * sizeof *events);
	queue->events_count -= n;
	memmove(queue->events, queue->events + n, queue->events_count * sizeof *events);
	queue->given += n;
	queue->counters.events += n;
	error = queue->error;
	unlock(queue->worker);
	return n == 0 && error < 0 ? error : (int)n;
}

/*
 * Hand n answers to the worker. -ERANGE, with nothing handed over: a slot that is not in the arena. -EBUSY, likewise: more commands
 * than the ring has room for, which nobody sends who sends one for each tag.
 */
int ut_worker_queue_commit(struct ut_worker_queue *queue, const int64_t *answers, unsigned n)
{
	unsigned count;
	int error;

	if (!queue)
		return -EBADF;
	for (unsigned i = 0; i < n; i++) {
		uint16_t tag = (uint16_t)answers[i];

		if (tag < queue->depth && queue->slots[tag] != UT_NO_SLOT && queue->slots[tag] >= queue->buffers)
			return -ERANGE;
	}
	lock(queue->worker);
	error = queue->error;
	if (error == 0 && queue->accepted - queue->given + n > queue->events_max)
		error = -EBUSY;
	if (error < 0) {
		unlock(queue->worker);
		return error;
	}
	count = atomic_load_explicit(&queue->pending_count, memory_order_relaxed);
	for (unsigned i = 0; i < n; i++) {
		uint16_t tag = (uint16_t)answers[i];

		queue->pending[count + i].packed = answers[i];
		queue->pending[count + i].slot = tag < queue->depth ? queue->slots[tag] : UT_NO_SLOT;
	}
	atomic_store_explicit(&queue->pending_count, count + n, memory_order_release);
	queue->accepted += n;
	queue->counters.commits++;
	queue->counters.answers += n;
	wake_worker(queue->worker);
	unlock(queue->worker);
	return 0;
}

/* As ut_queue_copy_in. What it reads of the ring does not change while that is open. */
int ut_worker_queue_copy_in(const struct ut_worker_queue *queue, uint16_t tag, uint16_t slot)
{
	return queue ? ut_queue_copy_in(queue->ring, tag, slot) : -EBADF;
}

/* How many answers the kernel does not have yet: the last ones. Whoever was told of some is woken when there are fewer. */
int ut_worker_queue_untaken(struct ut_worker_queue *queue)
{
	int untaken;

	if (!queue)
		return -EBADF;
	lock(queue->worker);
	untaken = (int)(queue->accepted - queue->taken);
	queue->taken_seen = queue->taken;
	queue->taken_watched = untaken > 0;
	unlock(queue->worker);
	return untaken;
}

/* 1: there is something to do. 0: nothing, and the descriptor becomes readable when there is. */
int ut_worker_queue_arm(struct ut_worker_queue *queue)
{
	bool has_work;

	if (!queue)
		return -EBADF;
	lock(queue->worker);
	if (queue->signalled) {
		uint64_t count;

		/* Nobody else reads it, and it was written to: this never fails. */
		while (read(queue->event_fd, &count, sizeof count) < 0 && errno == EINTR)
			;
		queue->signalled = false;
	}
	has_work = engine_has_work(queue);
	queue->armed = !has_work;
	/* It is told of this once: it need not ask again. */
	if (queue->taken > queue->taken_seen)
		queue->taken_watched = false;
	unlock(queue->worker);
	return has_work;
}

void ut_worker_queue_counters(struct ut_worker_queue *queue, struct ut_queue_counters *counters)
{
	memset(counters, 0, sizeof *counters);
	if (!queue)
		return;
	lock(queue->worker);
	*counters = queue->counters;
	unlock(queue->worker);
}

/* As ut_queue_close: what was answered is sent before, and nothing of the queue is used any more when this returns. */
int ut_worker_queue_close(struct ut_worker_queue *queue)
{
	int witness;

	if (!queue)
		return -EBADF;
	witness = run_job(queue, CLOSE_QUEUE, NULL);
	free_queue(queue);
	return witness;
}
