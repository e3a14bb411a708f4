/*
 * io_uring for ublk. See ring.h for the interface.
 *
 * Some facts, and what they mean here:
 *
 * - A ublk command does not fit a 64-byte SQE: every ring has SQE128, with the command at byte 48. liburing's helpers clear
 *   the first 64 bytes only, so we clear all 128 ourselves.
 * - With COOP_TASKRUN the kernel does not interrupt us to post completions: it posts them when we next enter it, for whatever
 *   reason. A reap that finds nothing must therefore look at the TASKRUN flag, and enter when it is set.
 * - A tag has at most one command with the kernel and, once that is done, one completion that we have not reaped. So a CQ of twice the
 *   SQ, which has one entry a tag, cannot overflow.
 * - With UBLK_F_USER_COPY the kernel copies nothing by itself. pread on the char device, at the tag's place, gets a WRITE's data,
 *   pwrite puts a READ's there; both copy at once and by any thread's hand, as long as the request is not committed. A command with
 *   an address is refused. So a READ's data is put there just before its commit is queued. A copy that came short or failed must
 *   not be acknowledged in part: since Linux 7.2 the kernel takes any result above 0 for the whole request.
 * - Closing a ring only begins to end it: a kernel worker cancels its commands later, and until then a request may still be copied
 *   into our buffers. Only the kernel knows when that is over, and it tells us so: see the witness.
 */
#define _GNU_SOURCE
#include "ring.h"

#include <errno.h>
#include <fcntl.h>
#include <liburing.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "ublk_abi.h"

/* Younger than liburing 2.3's header, or than the oldest header that we build with; the values are kernel ABI. */
#ifndef IORING_SETUP_SINGLE_ISSUER
#define IORING_SETUP_SINGLE_ISSUER (1U << 12)
#endif

#define SQE_BYTES 128
#define SQE_COMMAND_OFFSET 48

/* Fixed files of a queue ring. */
#define CHAR_DEVICE_FILE 0
#define WITNESS_FILE 1

#define CONTROL_SQ_ENTRIES 16

/* Descriptors count in sectors of 512 bytes, whatever a disk's blocks are. */
#define SECTOR_SHIFT 9

/* How often a submit is tried again while the kernel is short of memory. */
#define SUBMIT_RETRIES_MAX 128

/* user_data of a recall's own completion. */
#define RECALL_ID UINT64_MAX

_Static_assert(sizeof(struct ut_event) == 24, "ut_event must match EVENT in ublk_trio/ring.py");
_Static_assert(SQE_COMMAND_OFFSET + sizeof(struct ut_io_cmd) <= SQE_BYTES, "per-tag command");
_Static_assert(SQE_COMMAND_OFFSET + sizeof(struct ut_ctrl_cmd) <= SQE_BYTES, "control command");

struct ut_queue {
	struct io_uring ring;
	const unsigned char *descriptors;
	uint64_t descriptors_length;
	uint32_t descriptor_bytes;
	uint32_t opcode_base;
	uint16_t queue_id;
	uint16_t depth;
	uint32_t buffers;
	uint64_t arena;
	uint64_t buffer_stride;
	const uint16_t *slots;
	/* The char device, which stays open longer than the ring; -1 unless data moves by user copy. */
	int user_copy_fd;
	struct ut_queue_counters counters;
	/*
	 * The read end of a pipe whose only write end is a fixed file of the ring. The kernel drops a ring's fixed files after its last
	 * command has ended, so this end reads end-of-file exactly when the kernel has done with our buffers.
	 */
	int witness;
};

struct ut_control {
	struct io_uring ring;
	int control_fd;
};

/* ---- both kinds of ring ---- */

static int ring_open(struct io_uring *ring, unsigned sq_entries, unsigned cq_entries)
{
	/* SINGLE_ISSUER is from 6.0, the other two from 5.19. They make things faster and nothing else depends on them. */
	const unsigned wanted = IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_COOP_TASKRUN | IORING_SETUP_TASKRUN_FLAG;
	const unsigned attempts[] = { wanted, 0 };
	int error = -EINVAL;

	for (unsigned i = 0; i < 2 && error == -EINVAL; i++) {
		struct io_uring_params params;

		memset(&params, 0, sizeof params);
		params.flags = IORING_SETUP_SQE128 | IORING_SETUP_CQSIZE | attempts[i];
		params.cq_entries = cq_entries;
		error = io_uring_queue_init_params(sq_entries, ring, &params);
	}
	return error;
}

static struct io_uring_sqe *ring_sqe(struct io_uring *ring)
{
	struct io_uring_sqe *sqe = io_uring_get_sqe(ring);

	if (sqe)
		memset(sqe, 0, SQE_BYTES);
	return sqe;
}

static void *sqe_command(struct io_uring_sqe *sqe)
{
	return (unsigned char *)sqe + SQE_COMMAND_OFFSET;
}

/* Hand every prepared SQE to the kernel. */
static int ring_submit(struct io_uring *ring)
{
	unsigned retries = 0;

	while (io_uring_sq_ready(ring) > 0) {
		int submitted = io_uring_submit(ring);

		if (submitted > 0)
			continue;
		if (submitted < 0 && submitted != -EINTR && submitted != -EAGAIN && submitted != -EBUSY)
			return submitted;
		if (++retries > SUBMIT_RETRIES_MAX)
			return submitted ? submitted : -EAGAIN;
		io_uring_get_events(ring);
	}
	return 0;
}

static unsigned ring_ready(const struct io_uring *ring)
{
	return io_uring_smp_load_acquire(ring->cq.ktail) - *ring->cq.khead;
}

/* How many completions are there, after asking the kernel for those that it has but did not post yet. */
static int ring_ready_or_flush(struct io_uring *ring)
{
	unsigned ready = ring_ready(ring);
	int error;

	if (ready > 0)
		return (int)ready;
	if (!(IO_URING_READ_ONCE(*ring->sq.kflags) & (IORING_SQ_TASKRUN | IORING_SQ_CQ_OVERFLOW)))
		return 0;
	error = io_uring_get_events(ring);
	if (error < 0 && error != -EINTR && error != -EAGAIN && error != -EBUSY)
		return error;
	return (int)ring_ready(ring);
}

static const struct io_uring_cqe *ring_cqe(const struct io_uring *ring, unsigned i)
{
	return &ring->cq.cqes[(*ring->cq.khead + i) & (ring->cq.ring_entries - 1)];
}

/* ---- a queue's ring ---- */

static int register_files(struct ut_queue *queue, int char_fd, const char **failed)
{
	int witness[2];
	int files[2];
	int error;

	*failed = "pipe2";
	if (pipe2(witness, O_CLOEXEC | O_NONBLOCK) < 0)
		return -errno;
	files[CHAR_DEVICE_FILE] = char_fd;
	files[WITNESS_FILE] = witness[1];
	*failed = "io_uring_register_files";
	error = io_uring_register_files(&queue->ring, files, 2);
	close(witness[1]);
	if (error < 0) {
		close(witness[0]);
		return error;
	}
	queue->witness = witness[0];
	return 0;
}

int ut_queue_open(struct ut_queue **opened, struct ut_queue_config *config)
{
	struct ut_queue *queue;
	void *descriptors;
	unsigned entries = 1;
	int error;

	if (config->depth == 0 || config->depth > UT_MAX_QUEUE_DEPTH || config->buffers > UT_NO_SLOT ||
	    config->descriptor_bytes < sizeof(struct ut_io_desc) ||
	    (uint64_t)config->depth * config->descriptor_bytes > config->descriptors_length) {
		config->failed = "ut_queue_open";
		return -EINVAL;
	}
	config->failed = "calloc";
	queue = calloc(1, sizeof *queue);
	if (!queue)
		return -ENOMEM;

	config->failed = "mmap";
	descriptors = mmap(NULL, config->descriptors_length, PROT_READ, MAP_SHARED | MAP_POPULATE, config->char_fd,
			   (off_t)config->descriptors_offset);
	if (descriptors == MAP_FAILED) {
		error = -errno;
		goto free_queue;
	}

	while (entries < config->depth)
		entries <<= 1;
	config->failed = "io_uring_setup";
	error = ring_open(&queue->ring, entries, 2 * entries);
	if (error < 0)
		goto unmap;
	error = register_files(queue, config->char_fd, &config->failed);
	if (error < 0)
		goto exit_ring;

	queue->descriptors = descriptors;
	queue->descriptors_length = config->descriptors_length;
	queue->descriptor_bytes = config->descriptor_bytes;
	queue->opcode_base = config->opcode_base;
	queue->queue_id = config->queue_id;
	queue->depth = config->depth;
	queue->buffers = config->buffers;
	queue->arena = (uint64_t)(uintptr_t)config->arena;
	queue->buffer_stride = config->buffer_stride;
	queue->slots = config->slots;
	queue->user_copy_fd = config->user_copy ? config->char_fd : -1;
	config->failed = NULL;
	*opened = queue;
	return 0;

exit_ring:
	io_uring_queue_exit(&queue->ring);
unmap:
	munmap(descriptors, config->descriptors_length);
free_queue:
	free(queue);
	return error;
}

int ut_queue_fd(const struct ut_queue *queue)
{
	return queue ? queue->ring.ring_fd : -EBADF;
}

/* The most events that one reap can give. */
unsigned ut_queue_events_max(const struct ut_queue *queue)
{
	return queue ? queue->ring.cq.ring_entries : 0;
}

static const struct ut_io_desc *tag_descriptor(const struct ut_queue *queue, uint16_t tag)
{
	return (const void *)(queue->descriptors + (uint64_t)tag * queue->descriptor_bytes);
}

static void read_event(const struct ut_queue *queue, const struct io_uring_cqe *cqe, struct ut_event *event)
{
	uint16_t tag = (uint16_t)cqe->user_data;

	memset(event, 0, sizeof *event);
	event->tag = tag;
	event->result = cqe->res;
	if (cqe->res != UT_IO_RES_OK && cqe->res != UT_IO_RES_NEED_GET_DATA)
		return;
	if (tag < queue->depth) {
		const struct ut_io_desc *descriptor = tag_descriptor(queue, tag);

		event->op_flags = descriptor->op_flags;
		event->nr_sectors = descriptor->nr_sectors;
		event->start_sector = descriptor->start_sector;
	}
}

/* Up to max completions. A system call only when there is none and the kernel says that it holds some back. */
int ut_queue_reap(struct ut_queue *queue, struct ut_event *events, unsigned max)
{
	int ready;

	if (!queue)
		return -EBADF;
	queue->counters.reaps++;
	ready = ring_ready_or_flush(&queue->ring);
	if (ready <= 0)
		return ready;
	if ((unsigned)ready > max)
		ready = (int)max;
	for (int i = 0; i < ready; i++)
		read_event(queue, ring_cqe(&queue->ring, (unsigned)i), &events[i]);
	io_uring_cq_advance(&queue->ring, (unsigned)ready);
	queue->counters.events += (uint64_t)ready;
	return ready;
}

/* The address that a tag's command carries. */
static uint64_t tag_address(const struct ut_queue *queue, uint16_t tag)
{
	uint16_t slot = tag < queue->depth && queue->user_copy_fd < 0 ? queue->slots[tag] : UT_NO_SLOT;

	return slot == UT_NO_SLOT ? 0 : queue->arena + slot * queue->buffer_stride;
}

/*
 * User copy: a READ's data, from the tag's buffer into the request, if the answer says that there is some. Gives the result to
 * commit: the answer's, or -EIO when not all of it could be moved.
 */
static int32_t copy_out(struct ut_queue *queue, uint16_t tag, uint16_t number, int32_t result)
{
	uint16_t slot;
	ssize_t copied;

	if (queue->user_copy_fd < 0 || number != UT_IO_COMMIT_AND_FETCH_REQ || result <= 0 || tag >= queue->depth ||
	    ut_io_op(tag_descriptor(queue, tag)) != UT_IO_OP_READ)
		return result;
	slot = queue->slots[tag];
	if (slot != UT_NO_SLOT) {
		copied = pwrite(queue->user_copy_fd, (const void *)(uintptr_t)(queue->arena + slot * queue->buffer_stride),
				(size_t)result, (off_t)ut_user_copy_offset(queue->queue_id, tag, 0));
		if (copied == result)
			return result;
	}
	queue->counters.copies_failed++;
	return -EIO;
}

/*
 * User copy: a delivered WRITE's data, all of it, into a buffer; from any thread, before the tag is committed. -EIO: not all of it
 * came. -ERANGE: there is no such buffer.
 */
int ut_queue_copy_in(const struct ut_queue *queue, uint16_t tag, uint16_t slot)
{
	uint64_t length;
	ssize_t copied;

	if (!queue)
		return -EBADF;
	if (tag >= queue->depth || slot >= queue->buffers || queue->user_copy_fd < 0)
		return -ERANGE;
	length = (uint64_t)tag_descriptor(queue, tag)->nr_sectors << SECTOR_SHIFT;
	if (length > queue->buffer_stride)
		return -ERANGE;
	copied = pread(queue->user_copy_fd, (void *)(uintptr_t)(queue->arena + slot * queue->buffer_stride), length,
		       (off_t)ut_user_copy_offset(queue->queue_id, tag, 0));
	if (copied < 0)
		return -errno;
	return (uint64_t)copied == length ? 0 : -EIO;
}

static void prepare_answer(struct ut_queue *queue, struct io_uring_sqe *sqe, int64_t answer)
{
	uint16_t tag = (uint16_t)answer;
	uint16_t number = (uint16_t)(answer >> 16);
	struct ut_io_cmd *command = sqe_command(sqe);

	sqe->opcode = IORING_OP_URING_CMD;
	sqe->flags = IOSQE_FIXED_FILE;
	sqe->fd = CHAR_DEVICE_FILE;
	sqe->cmd_op = queue->opcode_base | number;
	sqe->user_data = (uint64_t)number << 16 | tag;
	command->q_id = queue->queue_id;
	command->tag = tag;
	command->result = copy_out(queue, tag, number, (int32_t)(answer >> 32));
	command->addr = tag_address(queue, tag);
}

/*
 * Send n answers (ring.py's pack_answer), in one system call unless there are more than SQEs. The submit itself copies the data of
 * READs out of the buffers, which is why it must not hold the GIL; cffi gives that up around every call. With user copy each READ's
 * data is moved here, by a system call of its own.
 *
 * -ERANGE, with nothing sent: a slot that is not in the arena. The kernel would write wherever that points.
 */
int ut_queue_commit(struct ut_queue *queue, const int64_t *answers, unsigned n)
{
	if (!queue)
		return -EBADF;
	for (unsigned i = 0; i < n; i++) {
		uint16_t tag = (uint16_t)answers[i];

		if (tag < queue->depth && queue->slots[tag] != UT_NO_SLOT && queue->slots[tag] >= queue->buffers)
			return -ERANGE;
	}
	for (unsigned i = 0; i < n; i++) {
		struct io_uring_sqe *sqe = ring_sqe(&queue->ring);

		if (!sqe) {
			int error = ring_submit(&queue->ring);

			if (error < 0)
				return error;
			sqe = ring_sqe(&queue->ring);
			if (!sqe)
				return -EBUSY;
		}
		prepare_answer(queue, sqe, answers[i]);
	}
	queue->counters.commits++;
	queue->counters.answers += n;
	return ring_submit(&queue->ring);
}

void ut_queue_counters(const struct ut_queue *queue, struct ut_queue_counters *counters)
{
	if (queue)
		*counters = queue->counters;
	else
		memset(counters, 0, sizeof *counters);
}

/* Gives the witness: a descriptor, now the caller's, that reads end-of-file once the arena may be unmapped. */
int ut_queue_close(struct ut_queue *queue)
{
	int witness;

	if (!queue)
		return -EBADF;
	witness = queue->witness;
	io_uring_queue_exit(&queue->ring);
	munmap((void *)queue->descriptors, queue->descriptors_length);
	free(queue);
	return witness;
}

/* ---- the control ring ---- */

/*
 * Every control command is sent with IOSQE_ASYNC, so it always runs on one of io_uring's worker threads. Kernels up to 6.1 would run
 * it inline in our thread instead, where a START_DEV waits for fetches that only this thread can send. Others avoid that with SQPOLL,
 * but then one kernel thread runs all commands one after the other and a START_DEV that waits holds up the STOP_DEV which would
 * end it; with IOSQE_ASYNC each has a worker of its own.
 *
 * A worker of its own, if there are enough: the kernel's bound is four per CPU (or the size of the ring that the thread
 * used first), and waiting START_DEVs use them up. So the bound is raised to as many commands as we allow.
 */
int ut_control_open(struct ut_control **opened, int control_fd, const char **failed)
{
	struct ut_control *control = calloc(1, sizeof *control);
	unsigned workers_max[2] = { UT_CONTROL_COMMANDS_MAX, 0 };
	int error;

	*failed = "calloc";
	if (!control)
		return -ENOMEM;
	*failed = "io_uring_setup";
	/* Twice as many completions as commands: a recall has one as well. */
	error = ring_open(&control->ring, CONTROL_SQ_ENTRIES, 2 * UT_CONTROL_COMMANDS_MAX);
	if (error < 0) {
		free(control);
		return error;
	}
	*failed = "io_uring_register_iowq_max_workers";
	error = io_uring_register_iowq_max_workers(&control->ring, workers_max);
	if (error < 0) {
		io_uring_queue_exit(&control->ring);
		free(control);
		return error;
	}
	control->control_fd = control_fd;
	*failed = NULL;
	*opened = control;
	return 0;
}

int ut_control_fd(const struct ut_control *control)
{
	return control ? control->ring.ring_fd : -EBADF;
}

/*
 * Send one command (struct ut_ctrl_cmd, copied here). What its addr points at must live until the result is reaped. The ring
 * holds nothing over from one call to the next, so an SQE is always free; on failure the SQE may still be in the ring, and
 * the ring is of no more use.
 */
int ut_control_submit(struct ut_control *control, uint64_t id, uint32_t opcode, const void *command)
{
	struct io_uring_sqe *sqe;

	if (!control)
		return -EBADF;
	sqe = ring_sqe(&control->ring);
	if (!sqe)
		return -EBUSY;
	sqe->opcode = IORING_OP_URING_CMD;
	sqe->flags = IOSQE_ASYNC;
	sqe->fd = control->control_fd;
	sqe->cmd_op = opcode;
	sqe->user_data = id;
	memcpy(sqe_command(sqe), command, sizeof(struct ut_ctrl_cmd));
	return ring_submit(&control->ring);
}

/* Interrupt a command that waits in the kernel, or every one, so far as it lets itself be interrupted. Each still gives its result. */
int ut_control_recall(struct ut_control *control, uint64_t id)
{
	struct io_uring_sqe *sqe;

	if (!control)
		return -EBADF;
	sqe = ring_sqe(&control->ring);
	if (!sqe)
		return -EBUSY;
	sqe->opcode = IORING_OP_ASYNC_CANCEL;
	sqe->fd = -1;
	if (id == UT_EVERY_COMMAND)
		sqe->cancel_flags = IORING_ASYNC_CANCEL_ALL | IORING_ASYNC_CANCEL_ANY;
	else
		sqe->addr = id;
	sqe->user_data = RECALL_ID;
	return ring_submit(&control->ring);
}

/* Up to max results, in the order in which the commands ended. A recall's own completion is dropped. */
int ut_control_reap(struct ut_control *control, struct ut_control_result *results, unsigned max)
{
	unsigned taken = 0;
	int n = 0;
	int ready;

	if (!control)
		return -EBADF;
	ready = ring_ready_or_flush(&control->ring);
	if (ready <= 0)
		return ready;
	for (; taken < (unsigned)ready && (unsigned)n < max; taken++) {
		const struct io_uring_cqe *cqe = ring_cqe(&control->ring, taken);

		if (cqe->user_data == RECALL_ID)
			continue;
		results[n].id = cqe->user_data;
		results[n].result = cqe->res;
		results[n].pad = 0;
		n++;
	}
	io_uring_cq_advance(&control->ring, taken);
	return n;
}

void ut_control_close(struct ut_control *control)
{
	if (!control)
		return;
	io_uring_queue_exit(&control->ring);
	free(control);
}
