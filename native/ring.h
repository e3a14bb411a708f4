/*
 * io_uring for ublk: one ring per queue, one for control commands. Everything that Python calls is between the two marker
 * lines below; native/build_native.py hands those lines to cffi as they stand.
 *
 * Every function returns a count, or a negative errno. A ring belongs to the thread that opened it. A null ring is allowed
 * everywhere and gives -EBADF, so that use after close is an error and not a crash.
 */
#ifndef UT_RING_H
#define UT_RING_H

#include <stdint.h>

/* ---- cffi begins ---- */

/* In ut_queue_config.slots: the tag's commands carry no buffer. */
#define UT_NO_SLOT 0xffff

/* ut_control's bound on commands that are with the kernel at once. */
#define UT_CONTROL_COMMANDS_MAX 1024

/* ring.py's EVENT. The last three members mean something only when result is 0 or 1. */
struct ut_event {
	uint16_t tag;
	uint16_t pad;
	int32_t result;
	uint32_t op_flags;
	uint32_t nr_sectors;
	uint64_t start_sector;
};

struct ut_queue_config {
	int char_fd;
	uint16_t queue_id;
	uint16_t depth;
	uint32_t descriptor_bytes; /* from one descriptor to the next */
	uint64_t descriptors_offset;
	uint64_t descriptors_length;
	uint32_t opcode_base; /* a per-tag command's opcode without the command's number */
	void *arena;
	uint64_t buffer_stride; /* bytes from one buffer to the next */
	uint32_t buffers;
	const uint16_t *slots; /* per tag: which buffer, or UT_NO_SLOT */
	int user_copy;	       /* whether the device has UBLK_F_USER_COPY: then we move the data, and commands carry no address */
	const char *failed;    /* out: the call that failed */
};

struct ut_queue_counters {
	uint64_t reaps;
	uint64_t events;
	uint64_t commits;
	uint64_t answers;
	uint64_t copies_failed; /* user copy: READs that were answered EIO because their data could not be moved */
};

struct ut_queue;

int ut_queue_open(struct ut_queue **queue, struct ut_queue_config *config);
int ut_queue_fd(const struct ut_queue *queue);
unsigned ut_queue_events_max(const struct ut_queue *queue);
int ut_queue_reap(struct ut_queue *queue, struct ut_event *events, unsigned max);
int ut_queue_commit(struct ut_queue *queue, const int64_t *answers, unsigned n);
int ut_queue_copy_in(const struct ut_queue *queue, uint16_t tag, uint16_t slot);
void ut_queue_counters(const struct ut_queue *queue, struct ut_queue_counters *counters);
int ut_queue_close(struct ut_queue *queue);

/* In ut_control_recall: every command. */
#define UT_EVERY_COMMAND 0

struct ut_control_result {
	uint64_t id;
	int32_t result;
	uint32_t pad;
};

struct ut_control;

int ut_control_open(struct ut_control **control, int control_fd, const char **failed);
int ut_control_fd(const struct ut_control *control);
int ut_control_submit(struct ut_control *control, uint64_t id, uint32_t opcode, const void *command);
int ut_control_recall(struct ut_control *control, uint64_t id);
int ut_control_reap(struct ut_control *control, struct ut_control_result *results, unsigned max);
void ut_control_close(struct ut_control *control);

/* ---- cffi ends ---- */

#endif
