/*
 * The ublk ABI as of Linux 7.3, for our native code.
 *
 * Why not linux/ublk_cmd.h: we build on machines whose header is years older than the kernels we
 * serve on (Debian 12 has 6.1's). Names are the kernel's with UBLK_ and UBLKSRV_ turned into UT_,
 * and struct ublk_ and ublksrv_ into ut_, so that both headers fit into one translation unit.
 * ublk_trio/uapi.py says the same in Python, and tests/test_uapi.py compares all three.
 *
 * Host byte order; reserved members must be zero.
 */
#ifndef UT_UBLK_ABI_H
#define UT_UBLK_ABI_H

#include <stdint.h>

/* ---- opcodes: ioctl numbers of type 'u', sized like the command structure ---- */

/* Three direction bits on these architectures, two elsewhere; see asm/ioctl.h. */
#if defined(__powerpc__) || defined(__mips__) || defined(__sparc__) || defined(__alpha__)
#define UT_OPCODE(direction, nr, size) \
	((uint32_t)(direction) << 29 | (uint32_t)(size) << 16 | 0x75u << 8 | (uint32_t)(nr))
#define UT_DIRECTION_READ 2u
#define UT_DIRECTION_WRITE 4u
#else
#define UT_OPCODE(direction, nr, size) \
	((uint32_t)(direction) << 30 | (uint32_t)(size) << 16 | 0x75u << 8 | (uint32_t)(nr))
#define UT_DIRECTION_READ 2u
#define UT_DIRECTION_WRITE 1u
#endif

#define UT_CTRL_R(nr) UT_OPCODE(UT_DIRECTION_READ, nr, 32)
#define UT_CTRL_RW(nr) UT_OPCODE(UT_DIRECTION_READ | UT_DIRECTION_WRITE, nr, 32)
#define UT_IO_RW(nr) UT_OPCODE(UT_DIRECTION_READ | UT_DIRECTION_WRITE, nr, 16)

/* Control commands. The bare numbers work as opcodes up to GET_DEV_INFO2 only. */
#define UT_CMD_GET_QUEUE_AFFINITY 0x01
#define UT_CMD_GET_DEV_INFO 0x02
#define UT_CMD_ADD_DEV 0x04
#define UT_CMD_DEL_DEV 0x05
#define UT_CMD_START_DEV 0x06
#define UT_CMD_STOP_DEV 0x07
#define UT_CMD_SET_PARAMS 0x08
#define UT_CMD_GET_PARAMS 0x09
#define UT_CMD_START_USER_RECOVERY 0x10
#define UT_CMD_END_USER_RECOVERY 0x11
#define UT_CMD_GET_DEV_INFO2 0x12
#define UT_CMD_GET_FEATURES 0x13
#define UT_CMD_DEL_DEV_ASYNC 0x14
#define UT_CMD_UPDATE_SIZE 0x15
#define UT_CMD_QUIESCE_DEV 0x16
#define UT_CMD_TRY_STOP_DEV 0x17
#define UT_CMD_REG_BUF 0x18
#define UT_CMD_UNREG_BUF 0x19

#define UT_U_CMD_GET_QUEUE_AFFINITY UT_CTRL_R(UT_CMD_GET_QUEUE_AFFINITY)
#define UT_U_CMD_GET_DEV_INFO UT_CTRL_R(UT_CMD_GET_DEV_INFO)
#define UT_U_CMD_ADD_DEV UT_CTRL_RW(UT_CMD_ADD_DEV)
#define UT_U_CMD_DEL_DEV UT_CTRL_RW(UT_CMD_DEL_DEV)
#define UT_U_CMD_START_DEV UT_CTRL_RW(UT_CMD_START_DEV)
#define UT_U_CMD_STOP_DEV UT_CTRL_RW(UT_CMD_STOP_DEV)
#define UT_U_CMD_SET_PARAMS UT_CTRL_RW(UT_CMD_SET_PARAMS)
#define UT_U_CMD_GET_PARAMS UT_CTRL_R(UT_CMD_GET_PARAMS)
#define UT_U_CMD_START_USER_RECOVERY UT_CTRL_RW(UT_CMD_START_USER_RECOVERY)
#define UT_U_CMD_END_USER_RECOVERY UT_CTRL_RW(UT_CMD_END_USER_RECOVERY)
#define UT_U_CMD_GET_DEV_INFO2 UT_CTRL_R(UT_CMD_GET_DEV_INFO2)
#define UT_U_CMD_GET_FEATURES UT_CTRL_R(UT_CMD_GET_FEATURES)
#define UT_U_CMD_DEL_DEV_ASYNC UT_CTRL_R(UT_CMD_DEL_DEV_ASYNC)
#define UT_U_CMD_UPDATE_SIZE UT_CTRL_RW(UT_CMD_UPDATE_SIZE)
#define UT_U_CMD_QUIESCE_DEV UT_CTRL_RW(UT_CMD_QUIESCE_DEV)
#define UT_U_CMD_TRY_STOP_DEV UT_CTRL_RW(UT_CMD_TRY_STOP_DEV)
#define UT_U_CMD_REG_BUF UT_CTRL_RW(UT_CMD_REG_BUF)
#define UT_U_CMD_UNREG_BUF UT_CTRL_RW(UT_CMD_UNREG_BUF)

/* I/O commands. The bare numbers work as opcodes up to NEED_GET_DATA only. */
#define UT_IO_FETCH_REQ 0x20
#define UT_IO_COMMIT_AND_FETCH_REQ 0x21
#define UT_IO_NEED_GET_DATA 0x22
#define UT_IO_REGISTER_IO_BUF 0x23
#define UT_IO_UNREGISTER_IO_BUF 0x24
#define UT_IO_PREP_IO_CMDS 0x25
#define UT_IO_COMMIT_IO_CMDS 0x26
#define UT_IO_FETCH_IO_CMDS 0x27

#define UT_U_IO_FETCH_REQ UT_IO_RW(UT_IO_FETCH_REQ)
#define UT_U_IO_COMMIT_AND_FETCH_REQ UT_IO_RW(UT_IO_COMMIT_AND_FETCH_REQ)
#define UT_U_IO_NEED_GET_DATA UT_IO_RW(UT_IO_NEED_GET_DATA)
#define UT_U_IO_REGISTER_IO_BUF UT_IO_RW(UT_IO_REGISTER_IO_BUF)
#define UT_U_IO_UNREGISTER_IO_BUF UT_IO_RW(UT_IO_UNREGISTER_IO_BUF)
#define UT_U_IO_PREP_IO_CMDS UT_IO_RW(UT_IO_PREP_IO_CMDS)
#define UT_U_IO_COMMIT_IO_CMDS UT_IO_RW(UT_IO_COMMIT_IO_CMDS)
#define UT_U_IO_FETCH_IO_CMDS UT_IO_RW(UT_IO_FETCH_IO_CMDS)

/* What a fetch completes with; ABORT is -ENODEV, after which the tag is not fetched again. */
#define UT_IO_RES_OK 0
#define UT_IO_RES_NEED_GET_DATA 1
#define UT_IO_RES_ABORT (-19)

/* ---- limits, and positions in the char device ---- */

#define UT_MAX_QUEUE_DEPTH 4096
#define UT_MAX_NR_QUEUES 4096
#define UT_FEATURES_LEN 8
#define UT_MIN_SEGMENT_SIZE 4096

#define UT_CMD_BUF_OFFSET 0          /* mmap: descriptors of queue 0 */
#define UT_IO_BUF_OFFSET 0x80000000u /* pread, pwrite: user-copy positions start here */

/* A user-copy position past that base: byte (25 bits), tag (16), queue (12); bit 62: integrity. */
#define UT_IO_BUF_OFF 0
#define UT_IO_BUF_BITS 25
#define UT_IO_BUF_BITS_MASK ((UINT64_C(1) << UT_IO_BUF_BITS) - 1)
#define UT_TAG_OFF 25
#define UT_TAG_BITS 16
#define UT_TAG_BITS_MASK ((UINT64_C(1) << UT_TAG_BITS) - 1)
#define UT_QID_OFF 41
#define UT_QID_BITS 12
#define UT_QID_BITS_MASK ((UINT64_C(1) << UT_QID_BITS) - 1)
#define UT_IO_BUF_TOTAL_BITS 53
#define UT_IO_BUF_TOTAL_SIZE (UINT64_C(1) << UT_IO_BUF_TOTAL_BITS)
#define UT_INTEGRITY_FLAG_OFF 62
#define UT_IO_INTEGRITY_FLAG (UINT64_C(1) << UT_INTEGRITY_FLAG_OFF)

/* ---- device features and states ---- */

#define UT_F_SUPPORT_ZERO_COPY (UINT64_C(1) << 0)
#define UT_F_URING_CMD_COMP_IN_TASK (UINT64_C(1) << 1)
#define UT_F_NEED_GET_DATA (UINT64_C(1) << 2)
#define UT_F_USER_RECOVERY (UINT64_C(1) << 3)
#define UT_F_USER_RECOVERY_REISSUE (UINT64_C(1) << 4)
#define UT_F_UNPRIVILEGED_DEV (UINT64_C(1) << 5)
#define UT_F_CMD_IOCTL_ENCODE (UINT64_C(1) << 6)
#define UT_F_USER_COPY (UINT64_C(1) << 7)
#define UT_F_ZONED (UINT64_C(1) << 8)
#define UT_F_USER_RECOVERY_FAIL_IO (UINT64_C(1) << 9)
#define UT_F_UPDATE_SIZE (UINT64_C(1) << 10)
#define UT_F_AUTO_BUF_REG (UINT64_C(1) << 11)
#define UT_F_QUIESCE (UINT64_C(1) << 12)
#define UT_F_PER_IO_DAEMON (UINT64_C(1) << 13)
#define UT_F_BUF_REG_OFF_DAEMON (UINT64_C(1) << 14)
#define UT_F_BATCH_IO (UINT64_C(1) << 15)
#define UT_F_INTEGRITY (UINT64_C(1) << 16)
#define UT_F_SAFE_STOP_DEV (UINT64_C(1) << 17)
#define UT_F_NO_AUTO_PART_SCAN (UINT64_C(1) << 18)
#define UT_F_SHMEM_ZC (UINT64_C(1) << 19)
#define UT_F_IO_DESC_SIZE (UINT64_C(1) << 20)

#define UT_S_DEV_DEAD 0
#define UT_S_DEV_LIVE 1
#define UT_S_DEV_QUIESCED 2
#define UT_S_DEV_FAIL_IO 3

/* ---- requests: op_flags is an operation in its low byte, flags above ---- */

#define UT_IO_OP_READ 0
#define UT_IO_OP_WRITE 1
#define UT_IO_OP_FLUSH 2
#define UT_IO_OP_DISCARD 3
#define UT_IO_OP_WRITE_SAME 4
#define UT_IO_OP_WRITE_ZEROES 5
#define UT_IO_OP_ZONE_OPEN 10
#define UT_IO_OP_ZONE_CLOSE 11
#define UT_IO_OP_ZONE_FINISH 12
#define UT_IO_OP_ZONE_APPEND 13
#define UT_IO_OP_ZONE_RESET_ALL 14
#define UT_IO_OP_ZONE_RESET 15
#define UT_IO_OP_REPORT_ZONES 18
#define UT_IO_OP_MASK 0xffu

#define UT_IO_F_FAILFAST_DEV (1u << 8)
#define UT_IO_F_FAILFAST_TRANSPORT (1u << 9)
#define UT_IO_F_FAILFAST_DRIVER (1u << 10)
#define UT_IO_F_META (1u << 11)
#define UT_IO_F_FUA (1u << 13)
#define UT_IO_F_NOUNMAP (1u << 15)
#define UT_IO_F_SWAP (1u << 16)
#define UT_IO_F_NEED_REG_BUF (1u << 17)
#define UT_IO_F_INTEGRITY (1u << 18)
#define UT_IO_F_SHMEM_ZC (1u << 19)

#define UT_AUTO_BUF_REG_FALLBACK (1u << 0)
#define UT_AUTO_BUF_REG_F_MASK UT_AUTO_BUF_REG_FALLBACK

#define UT_BATCH_F_HAS_ZONE_LBA (1u << 0)
#define UT_BATCH_F_HAS_BUF_ADDR (1u << 1)
#define UT_BATCH_F_AUTO_BUF_REG_FALLBACK (1u << 2)

#define UT_SHMEM_BUF_READ_ONLY (1u << 0)

#define UT_SHMEM_ZC_OFF_MASK UINT64_C(0xffffffff)
#define UT_SHMEM_ZC_IDX_OFF 32
#define UT_SHMEM_ZC_IDX_MASK UINT64_C(0xffff)

/* ---- parameters ---- */

#define UT_PARAM_TYPE_BASIC (1u << 0)
#define UT_PARAM_TYPE_DISCARD (1u << 1)
#define UT_PARAM_TYPE_DEVT (1u << 2)
#define UT_PARAM_TYPE_ZONED (1u << 3)
#define UT_PARAM_TYPE_DMA_ALIGN (1u << 4)
#define UT_PARAM_TYPE_SEGMENT (1u << 5)
#define UT_PARAM_TYPE_INTEGRITY (1u << 6)

#define UT_ATTR_READ_ONLY (1u << 0)
#define UT_ATTR_ROTATIONAL (1u << 1)
#define UT_ATTR_VOLATILE_CACHE (1u << 2)
#define UT_ATTR_FUA (1u << 3)

/* Borrowed: integrity parameters from linux/fs.h, zone reports from linux/blkzoned.h. */
#define UT_LBMD_PI_CAP_INTEGRITY (1u << 0)
#define UT_LBMD_PI_CAP_REFTAG (1u << 1)
#define UT_LBMD_PI_CSUM_NONE 0
#define UT_LBMD_PI_CSUM_IP 1
#define UT_LBMD_PI_CSUM_CRC16_T10DIF 2
#define UT_LBMD_PI_CSUM_CRC64_NVME 4

#define UT_ZONE_TYPE_CONVENTIONAL 1
#define UT_ZONE_TYPE_SEQWRITE_REQ 2
#define UT_ZONE_TYPE_SEQWRITE_PREF 3

#define UT_ZONE_COND_NOT_WP 0x0
#define UT_ZONE_COND_EMPTY 0x1
#define UT_ZONE_COND_IMP_OPEN 0x2
#define UT_ZONE_COND_EXP_OPEN 0x3
#define UT_ZONE_COND_CLOSED 0x4
#define UT_ZONE_COND_READONLY 0xd
#define UT_ZONE_COND_FULL 0xe
#define UT_ZONE_COND_OFFLINE 0xf
#define UT_ZONE_COND_ACTIVE 0xff

/* ---- structures ---- */

struct ut_ctrl_cmd {
	uint32_t dev_id;
	uint16_t queue_id; /* 0xffff: not about a queue */
	uint16_t len;      /* bytes at addr */
	uint64_t addr;
	uint64_t data[1];
	uint16_t dev_path_len; /* with the NUL; unprivileged devices */
	uint16_t pad;
	uint32_t reserved;
};
_Static_assert(sizeof(struct ut_ctrl_cmd) == 32, "ut_ctrl_cmd");

struct ut_ctrl_dev_info {
	uint16_t nr_hw_queues;
	uint16_t queue_depth;
	uint16_t state;
	uint16_t io_desc_size; /* bytes; 7.3 */
	uint32_t max_io_buf_bytes;
	uint32_t dev_id;
	int32_t ublksrv_pid; /* -1: no server */
	uint32_t pad1;
	uint64_t flags;
	uint64_t ublksrv_flags; /* ours to use */
	uint32_t owner_uid;
	uint32_t owner_gid;
	uint64_t reserved1;
	uint64_t reserved2;
};
_Static_assert(sizeof(struct ut_ctrl_dev_info) == 64, "ut_ctrl_dev_info");

struct ut_io_desc {
	uint32_t op_flags;
	union {
		uint32_t nr_sectors;
		uint32_t nr_zones; /* REPORT_ZONES */
	};
	uint64_t start_sector;
	uint64_t addr; /* server's buffer, or a place in shared memory */
};
_Static_assert(sizeof(struct ut_io_desc) == 24, "ut_io_desc");

struct ut_io_cmd {
	uint16_t q_id;
	uint16_t tag;
	int32_t result; /* commits: bytes done, or a negative errno */
	union {
		uint64_t addr;
		uint64_t zone_append_lba;
	};
};
_Static_assert(sizeof(struct ut_io_cmd) == 16, "ut_io_cmd");

/* A batch's elements: this, then a u64 buffer address and a u64 zone LBA as the flags say. */
struct ut_elem_header {
	uint16_t tag;
	uint16_t buf_index;
	int32_t result;
};
_Static_assert(sizeof(struct ut_elem_header) == 8, "ut_elem_header");

struct ut_batch_io {
	uint16_t q_id;
	uint16_t flags;
	uint16_t nr_elem;
	uint8_t elem_bytes; /* 8, 16 or 24 */
	uint8_t reserved;
	uint64_t reserved2;
};
_Static_assert(sizeof(struct ut_batch_io) == 16, "ut_batch_io");

struct ut_auto_buf_reg {
	uint16_t index;
	uint8_t flags;
	uint8_t reserved0;
	uint32_t reserved1;
};
_Static_assert(sizeof(struct ut_auto_buf_reg) == 8, "ut_auto_buf_reg");

struct ut_shmem_buf_reg {
	uint64_t addr;
	uint64_t len; /* bytes, whole pages */
	uint32_t flags;
	uint32_t reserved;
};
_Static_assert(sizeof(struct ut_shmem_buf_reg) == 24, "ut_shmem_buf_reg");

/* One entry of a zone report, in sectors; a zero len ends a short report. */
struct ut_blk_zone {
	uint64_t start;
	uint64_t len;
	uint64_t wp;
	uint8_t type;
	uint8_t cond;
	uint8_t non_seq;
	uint8_t reset;
	uint8_t resv[4];
	uint64_t capacity;
	uint8_t reserved[24];
};
_Static_assert(sizeof(struct ut_blk_zone) == 64, "ut_blk_zone");

struct ut_param_basic {
	uint32_t attrs;
	uint8_t logical_bs_shift;
	uint8_t physical_bs_shift;
	uint8_t io_opt_shift;
	uint8_t io_min_shift;
	uint32_t max_sectors;
	uint32_t chunk_sectors;
	uint64_t dev_sectors;
	uint64_t virt_boundary_mask;
};
_Static_assert(sizeof(struct ut_param_basic) == 32, "ut_param_basic");

struct ut_param_discard {
	uint32_t discard_alignment;
	uint32_t discard_granularity;
	uint32_t max_discard_sectors;
	uint32_t max_write_zeroes_sectors;
	uint16_t max_discard_segments;
	uint16_t reserved0;
};
_Static_assert(sizeof(struct ut_param_discard) == 20, "ut_param_discard");

struct ut_param_devt {
	uint32_t char_major;
	uint32_t char_minor;
	uint32_t disk_major;
	uint32_t disk_minor;
};
_Static_assert(sizeof(struct ut_param_devt) == 16, "ut_param_devt");

struct ut_param_zoned {
	uint32_t max_open_zones;
	uint32_t max_active_zones;
	uint32_t max_zone_append_sectors;
	uint8_t reserved[20];
};
_Static_assert(sizeof(struct ut_param_zoned) == 32, "ut_param_zoned");

struct ut_param_dma_align {
	uint32_t alignment;
	uint8_t pad[4];
};
_Static_assert(sizeof(struct ut_param_dma_align) == 8, "ut_param_dma_align");

struct ut_param_segment {
	uint64_t seg_boundary_mask;
	uint32_t max_segment_size;
	uint16_t max_segments;
	uint8_t pad[2];
};
_Static_assert(sizeof(struct ut_param_segment) == 16, "ut_param_segment");

struct ut_param_integrity {
	uint32_t flags;
	uint16_t max_integrity_segments;
	uint8_t interval_exp;
	uint8_t metadata_size;
	uint8_t pi_offset;
	uint8_t csum_type;
	uint8_t tag_size;
	uint8_t pad[5];
};
_Static_assert(sizeof(struct ut_param_integrity) == 16, "ut_param_integrity");

struct ut_params {
	uint32_t len; /* bytes of this structure that the writer knows */
	uint32_t types;
	struct ut_param_basic basic;
	struct ut_param_discard discard;
	struct ut_param_devt devt;
	struct ut_param_zoned zoned;
	struct ut_param_dma_align dma;
	uint32_t dma_pad; /* written out: a 64-bit kernel's layout even where u64 aligns to 4 */
	struct ut_param_segment seg;
	struct ut_param_integrity integrity;
};
_Static_assert(sizeof(struct ut_params) == 152, "ut_params");

/* ---- encodings ---- */

static inline uint8_t ut_io_op(const struct ut_io_desc *desc)
{
	return (uint8_t)(desc->op_flags & UT_IO_OP_MASK);
}

static inline uint64_t ut_auto_buf_reg_to_sqe_addr(uint16_t index, uint8_t flags)
{
	return (uint64_t)flags << 16 | index;
}

static inline uint64_t ut_user_copy_offset(uint16_t queue_id, uint16_t tag, uint32_t offset)
{
	uint64_t queue = (uint64_t)queue_id << UT_QID_OFF;

	return UT_IO_BUF_OFFSET + (queue | (uint64_t)tag << UT_TAG_OFF | offset);
}

static inline uint64_t ut_shmem_zc_addr(uint16_t index, uint32_t offset)
{
	return (uint64_t)index << UT_SHMEM_ZC_IDX_OFF | offset;
}

#endif
