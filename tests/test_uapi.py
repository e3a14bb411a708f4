"""The ABI in ``ublk_trio/uapi.py`` against C: our own header, the machine's, and the newest one.

``UBLK_TRIO_KERNEL_HEADERS=DIR`` adds the include directory of another kernel release to the checks.
A C probe prints what the compiler makes of each name as *facts*: one flat table from the kernel's
name of a thing ("UBLK_F_ZONED", "ublksrv_io_cmd.tag offset") to a number.
"""

import inspect
import json
import os
import re
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator, Mapping
from enum import Enum, IntEnum
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import pytest
from attrs import fields
from hypothesis import given
from hypothesis import strategies as st

from ublk_trio import uapi

NATIVE = Path(__file__).parent.parent / "native"
KERNEL_HEADERS_VARIABLE = "UBLK_TRIO_KERNEL_HEADERS"
NEWEST_RELEASE = (7, 3)

# ----------------------------------------------------------------- the names, in the kernel's words

ENUM_PREFIXES: dict[type[Enum], str] = {
    uapi.ControlCommand: "UBLK_CMD_",
    uapi.IoCommand: "UBLK_IO_",
    uapi.Feature: "UBLK_F_",
    uapi.DeviceState: "UBLK_S_DEV_",
    uapi.IoOp: "UBLK_IO_OP_",
    uapi.IoFlag: "UBLK_IO_F_",
    uapi.AutoBufRegFlag: "UBLK_AUTO_BUF_REG_",
    uapi.BatchFlag: "UBLK_BATCH_F_",
    uapi.ShmemBufFlag: "UBLK_SHMEM_BUF_",
    uapi.ParamType: "UBLK_PARAM_TYPE_",
    uapi.BasicAttr: "UBLK_ATTR_",
    uapi.IntegrityCap: "LBMD_PI_CAP_",
    uapi.IntegrityChecksum: "LBMD_PI_CSUM_",
    uapi.ZoneType: "BLK_ZONE_TYPE_",
    uapi.ZoneCondition: "BLK_ZONE_COND_",
}

LONE_CONSTANTS = {
    "UBLK_IO_RES_OK": uapi.IO_RES_OK,
    "UBLK_IO_RES_NEED_GET_DATA": uapi.IO_RES_NEED_GET_DATA,
    "UBLK_IO_RES_ABORT": uapi.IO_RES_ABORT,
    "UBLK_MAX_QUEUE_DEPTH": uapi.MAX_QUEUE_DEPTH,
    "UBLK_MAX_NR_QUEUES": uapi.MAX_NR_QUEUES,
    "UBLK_FEATURES_LEN": uapi.FEATURES_LEN,
    "UBLK_MIN_SEGMENT_SIZE": uapi.MIN_SEGMENT_SIZE,
    "UBLK_IO_OP_MASK": uapi.OP_MASK,
    "UBLKSRV_CMD_BUF_OFFSET": uapi.CMD_BUF_OFFSET,
    "UBLKSRV_IO_BUF_OFFSET": uapi.IO_BUF_OFFSET,
    "UBLK_IO_BUF_OFF": 0,
    "UBLK_IO_BUF_BITS": uapi.IO_BUF_BITS,
    "UBLK_IO_BUF_BITS_MASK": uapi.MAX_IO_BYTES - 1,
    "UBLK_TAG_OFF": uapi.TAG_SHIFT,
    "UBLK_TAG_BITS": uapi.TAG_BITS,
    "UBLK_TAG_BITS_MASK": (1 << uapi.TAG_BITS) - 1,
    "UBLK_QID_OFF": uapi.QUEUE_SHIFT,
    "UBLK_QID_BITS": uapi.QUEUE_BITS,
    "UBLK_QID_BITS_MASK": (1 << uapi.QUEUE_BITS) - 1,
    "UBLKSRV_IO_BUF_TOTAL_BITS": uapi.IO_BUF_TOTAL_BITS,
    "UBLKSRV_IO_BUF_TOTAL_SIZE": 1 << uapi.IO_BUF_TOTAL_BITS,
    "UBLK_INTEGRITY_FLAG_OFF": uapi.INTEGRITY_SHIFT,
    "UBLKSRV_IO_INTEGRITY_FLAG": 1 << uapi.INTEGRITY_SHIFT,
    "UBLK_AUTO_BUF_REG_F_MASK": sum(uapi.AutoBufRegFlag),
    "UBLK_SHMEM_ZC_OFF_MASK": (1 << uapi.SHMEM_ZC_OFFSET_BITS) - 1,
    "UBLK_SHMEM_ZC_IDX_OFF": uapi.SHMEM_ZC_OFFSET_BITS,
    "UBLK_SHMEM_ZC_IDX_MASK": (1 << uapi.SHMEM_ZC_INDEX_BITS) - 1,
}

# Names that only our header has: the kernel publishes no bare number for a command younger than the
# ioctl encoding, and shifts op_flags where we mask them.
OURS_ONLY = {
    "UBLK_IO_OP_MASK",
    *(f"UBLK_CMD_{command.name}" for command in uapi.ControlCommand if command > uapi.LAST_LEGACY_CONTROL_COMMAND),
    *(f"UBLK_IO_{command.name}" for command in uapi.IoCommand if command > uapi.LAST_LEGACY_IO_COMMAND),
}

# uapi.py's integers that no header has, or that the table above has under another shape.
NOT_IN_HEADERS = {
    "MAX_DEVICES",
    "SECTOR_SHIFT",
    "SECTOR_SIZE",
    "ANY_DEVICE_ID",
    "NO_QUEUE",
    "IO_DESC_SIZE",
    "IO_DESC_SIZE_MAX",
    "IO_DESC_SIZE_STEP",
}
BY_VALUE = {
    "MAX_IO_BYTES",
    "LAST_LEGACY_CONTROL_COMMAND",
    "LAST_LEGACY_IO_COMMAND",
}

HELPER_MACROS = re.compile(r"UT_(UBLK_ABI_H|OPCODE|DIRECTION_\w+|CTRL_RW?|IO_RW)$")


def enum_constants() -> dict[str, int]:
    return {prefix + member.name: member.value for enum, prefix in ENUM_PREFIXES.items() for member in enum}


def opcode_constants() -> dict[str, int]:
    control = {
        f"UBLK_U_CMD_{command.name}": uapi.control_opcode(command, ioctl_encoded=True)
        for command in uapi.ControlCommand
    }
    io = {f"UBLK_U_IO_{command.name}": uapi.io_opcode(command, ioctl_encoded=True) for command in uapi.IoCommand}
    return control | io


CONSTANTS: dict[str, int] = enum_constants() | opcode_constants() | LONE_CONSTANTS
# C enumerators are invisible to #ifdef; these have been there since before ublk.
ENUMERATORS = {name for name in CONSTANTS if name.startswith("BLK_ZONE_")} - {"BLK_ZONE_COND_ACTIVE"}


class CStruct(NamedTuple):
    """A record's C structure; ``since`` names a macro that a header with this thing also has."""

    name: str
    since: str = "UBLK_CMD_ADD_DEV"
    size_since: str = "UBLK_CMD_ADD_DEV"
    members: Mapping[str, str] = {}
    member_since: Mapping[str, str] = {}


C_STRUCTS: dict[type[uapi.Record], CStruct] = {
    uapi.ControlCmd: CStruct(
        "ublksrv_ctrl_cmd",
        members={"data": "data[0]"},
        member_since={"dev_path_len": "UBLK_F_UNPRIVILEGED_DEV"},
    ),
    uapi.DevInfo: CStruct(
        "ublksrv_ctrl_dev_info",
        member_since={
            "io_desc_size": "UBLK_F_IO_DESC_SIZE",
            "owner_uid": "UBLK_F_UNPRIVILEGED_DEV",
            "owner_gid": "UBLK_F_UNPRIVILEGED_DEV",
        },
    ),
    uapi.IoDesc: CStruct("ublksrv_io_desc"),
    uapi.IoCmd: CStruct("ublksrv_io_cmd"),
    uapi.BatchIo: CStruct("ublk_batch_io", since="UBLK_F_BATCH_IO"),
    uapi.BatchElem: CStruct("ublk_elem_header", since="UBLK_F_BATCH_IO"),
    uapi.AutoBufReg: CStruct("ublk_auto_buf_reg", since="UBLK_F_AUTO_BUF_REG"),
    uapi.ShmemBufReg: CStruct("ublk_shmem_buf_reg", since="UBLK_F_SHMEM_ZC"),
    uapi.BlkZone: CStruct("blk_zone"),
    uapi.ParamsBasic: CStruct("ublk_param_basic"),
    uapi.ParamsDiscard: CStruct("ublk_param_discard"),
    uapi.ParamsDevt: CStruct("ublk_param_devt", since="UBLK_PARAM_TYPE_DEVT"),
    uapi.ParamsZoned: CStruct("ublk_param_zoned", since="UBLK_PARAM_TYPE_ZONED"),
    uapi.ParamsDmaAlign: CStruct("ublk_param_dma_align", since="UBLK_PARAM_TYPE_DMA_ALIGN"),
    uapi.ParamsSegment: CStruct("ublk_param_segment", since="UBLK_PARAM_TYPE_SEGMENT"),
    uapi.ParamsIntegrity: CStruct("ublk_param_integrity", since="UBLK_PARAM_TYPE_INTEGRITY"),
}
PARAMS_MEMBERS = {"dma_align": "dma", "segment": "seg"}

# Encodings that are functions, not layouts: name, the macro it came with, C in the kernel's words,
# C in ours (None: the same), and our value.
SAMPLES: list[tuple[str, str, str, str | None, int]] = [
    (
        "auto_buf_reg sample",
        "UBLK_F_AUTO_BUF_REG",
        "ublk_auto_buf_reg_to_sqe_addr(&(struct ublk_auto_buf_reg){.index = 0xfedc, .flags = 0xab})",
        "ut_auto_buf_reg_to_sqe_addr(0xfedc, 0xab)",
        uapi.AutoBufReg(index=0xFEDC, flags=uapi.AutoBufRegFlag(0xAB)).to_sqe_addr(),
    ),
    (
        "shmem_zc sample",
        "UBLK_F_SHMEM_ZC",
        "ublk_shmem_zc_addr(0xfedc, 0x89abcdef)",
        None,
        uapi.shmem_zc_addr(index=0xFEDC, offset=0x89AB_CDEF),
    ),
    (
        "user_copy sample",
        "UBLK_QID_OFF",
        "UBLKSRV_IO_BUF_OFFSET + (4095ULL << UBLK_QID_OFF) + (65535ULL << UBLK_TAG_OFF) + UBLK_IO_BUF_BITS_MASK",
        "ut_user_copy_offset(4095, 65535, 0x1ffffff)",
        uapi.user_copy_offset(queue_id=4095, tag=65535, offset=0x1FF_FFFF),
    ),
]


def our_name(c_text: str) -> str:
    """The kernel's names in a piece of C as ``native/ublk_abi.h`` has them."""
    renames = [
        (r"\bUBLK(SRV)?_", "UT_"),
        (r"\bLBMD_", "UT_LBMD_"),
        (r"\bBLK_ZONE_", "UT_ZONE_"),
        (r"\bublk(srv)?_", "ut_"),
        (r"\bblk_zone\b", "ut_blk_zone"),
    ]
    for pattern, replacement in renames:
        c_text = re.sub(pattern, replacement, c_text)
    return c_text


def expected_facts() -> dict[str, int]:
    """What ``uapi.py`` says, in the probe's terms."""
    facts = dict(CONSTANTS)
    for record, c_struct in C_STRUCTS.items():
        facts[f"{c_struct.name} size"] = record.LAYOUT.size
        members = uapi.layout_members(record.LAYOUT)
        for (field, offset), (_, code) in zip(record.offsets().items(), members, strict=True):
            facts[f"{c_struct.name}.{field} offset"] = offset
            facts[f"{c_struct.name}.{field} size"] = struct.calcsize("=" + code)
            facts[f"{c_struct.name}.{field} signed"] = int(code.islower())
    facts["ublk_params size"] = uapi.Params.LAYOUT.size
    for section, offset in uapi.Params.offsets().items():
        facts[f"ublk_params.{section} offset"] = offset
    return facts | {name: value for name, _, _, _, value in SAMPLES}


# --------------------------------------------------------------------------------------- the probe

PROBE_HEAD = """
#include <errno.h>
#include <stddef.h>
#include <stdio.h>
static const char *separator = "{";
static void fact(const char *name, long long value)
{
    printf("%s\\n\\"%s\\": %lld", separator, name, value);
    separator = ",";
}
#define MEMBER(text, type, member) \\
    fact(text " offset", (long long)offsetof(type, member)); \\
    fact(text " size", (long long)sizeof(((type *)0)->member)); \\
    fact(text " signed", (__typeof__(((type *)0)->member))-1 < 1)
"""


def guarded(macro: str | None, statement: str) -> list[str]:
    return [f"#ifdef {macro}", statement, "#endif"] if macro else [statement]


def probe_statements(rename: Callable[[str], str], *, kernel: bool) -> Iterator[str]:
    """The body of a probe. Only a kernel's header may lack names: only there are they guarded."""

    def guard(macro: str, statement: str) -> list[str]:
        return guarded(macro if kernel else None, statement)

    for name in CONSTANTS:
        if kernel and name in OURS_ONLY:
            continue
        statement = f'fact("{name}", (long long)({rename(name)}));'
        yield from [statement] if name in ENUMERATORS else guard(name, statement)
    for record, c in C_STRUCTS.items():
        c_type = "struct " + rename(c.name)
        yield from guard(c.since, f'fact("{c.name} size", (long long)sizeof({c_type}));')
        for field in record.offsets():
            member = c.members.get(field, field)
            statement = f'MEMBER("{c.name}.{field}", {c_type}, {member});'
            yield from guard(c.member_since.get(field, c.since), statement)
    c_type = "struct " + rename("ublk_params")
    size = f'fact("ublk_params size", (long long)sizeof({c_type}));'
    yield from guard("UBLK_PARAM_TYPE_INTEGRITY", size)
    for section in uapi.Params.offsets():
        member = PARAMS_MEMBERS.get(section, section)
        kind = uapi.PARAM_SECTIONS[section][0].name if section in uapi.PARAM_SECTIONS else "BASIC"
        offset = f"(long long)offsetof({c_type}, {member})"
        statement = f'fact("ublk_params.{section} offset", {offset});'
        yield from guard(f"UBLK_PARAM_TYPE_{kind}", statement)
    for name, since, kernel_text, our_text, _ in SAMPLES:
        text = kernel_text if kernel else our_text or rename(kernel_text)
        yield from guard(since, f'fact("{name}", (long long)({text}));')


def probe_source(includes: str, rename: Callable[[str], str], *, kernel: bool) -> str:
    body = "\n".join(probe_statements(rename, kernel=kernel))
    tail = '    printf("\\n}\\n");\n    return 0;\n'
    return f"{includes}\n{PROBE_HEAD}\nint main(void)\n{{\n{body}\n{tail}}}\n"


def skip_unless_ci(reason: str) -> NoReturn:
    """A check that can't run is a failure where everything is supposed to be installed."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


class Compiler(NamedTuple):
    path: str
    directory: Path

    def run(self, *arguments: str, source: str) -> subprocess.CompletedProcess[str]:
        command = [self.path, *arguments, "-x", "c", "-"]
        return subprocess.run(command, input=source, capture_output=True, text=True, check=False)

    def output(self, *arguments: str, source: str) -> str:
        done = self.run(*arguments, source=source)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def facts(self, *arguments: str, source: str) -> dict[str, int]:
        """Compile a probe, run it, and read what it prints."""
        program = self.directory / "probe"
        warnings = ("-std=gnu11", "-Wall", "-Wextra", "-Werror")
        self.output(*warnings, *arguments, "-o", str(program), source=source)
        printed = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout
        facts: dict[str, int] = json.loads(printed)
        return facts


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Compiler:
    path = shutil.which(os.environ.get("CC", "cc"))
    if path is None:
        skip_unless_ci("no C compiler: install gcc, or set CC")
    return Compiler(path, tmp_path_factory.mktemp("uapi"))


KERNEL_INCLUDES = """
#include <linux/version.h>
#include <linux/fs.h>
#include <linux/blkzoned.h>
#include <linux/ublk_cmd.h>
"""


class KernelHeader(NamedTuple):
    """One ``linux/ublk_cmd.h`` and what the compiler sees in it."""

    release: tuple[int, int]
    facts: dict[str, int]
    macros: set[str]
    structs: set[str]


def include_arguments(compiler: Compiler, directory: str | None) -> list[str]:
    if directory is None:
        return []
    multiarch = compiler.output("-print-multiarch", source="").strip()
    architecture = Path(directory) / multiarch
    return ["-isystem", directory, *(["-isystem", str(architecture)] if multiarch else [])]


@pytest.fixture(scope="module", params=["system", "given"])
def kernel_header(request: pytest.FixtureRequest, compiler: Compiler) -> KernelHeader:
    directory = None
    if request.param == "given":
        directory = os.environ.get(KERNEL_HEADERS_VARIABLE)
        if directory is None:
            pytest.skip(f"{KERNEL_HEADERS_VARIABLE} names no include directory")
    arguments = include_arguments(compiler, directory)
    if compiler.run("-E", *arguments, source=KERNEL_INCLUDES).returncode:
        skip_unless_ci("no linux/ublk_cmd.h: install linux-libc-dev of Linux 6.0 or later")
    macros = compiler.output("-E", "-dM", *arguments, source=KERNEL_INCLUDES)
    version = re.search(r"^#define LINUX_VERSION_CODE (\d+)", macros, re.MULTILINE)
    assert version, "linux/version.h has no LINUX_VERSION_CODE"
    declarations = compiler.output("-E", "-P", *arguments, source=KERNEL_INCLUDES)
    # Both headers in one translation unit: they must not clash.
    includes = f'{KERNEL_INCLUDES}#include "{NATIVE / "ublk_abi.h"}"'
    return KernelHeader(
        release=(int(version[1]) >> 16, int(version[1]) >> 8 & 0xFF),
        facts=compiler.facts(*arguments, source=probe_source(includes, str, kernel=True)),
        macros=set(re.findall(r"^#define (UBLK\w+)", macros, re.MULTILINE)),
        structs=set(re.findall(r"struct (ublk\w+)\s*\{", declarations)),
    )


def our_header_facts(compiler: Compiler, header: Path) -> dict[str, int]:
    return compiler.facts(source=probe_source(f'#include "{header}"', our_name, kernel=False))


# -------------------------------------------------------------------------------------- comparisons


def differences(expected: Mapping[str, int], found: Mapping[str, int]) -> list[str]:
    """Every found fact that is not the expected one."""
    return [
        f"{name}: C has {value:#x}, uapi.py has {expected[name]:#x}" if name in expected else f"{name}: not in uapi.py"
        for name, value in found.items()
        if expected.get(name) != value
    ]


def test_our_header_says_the_same(compiler: Compiler) -> None:
    """Every constant, size, offset and width of uapi.py is in native/ublk_abi.h, and the same."""
    found = our_header_facts(compiler, NATIVE / "ublk_abi.h")
    assert differences(expected_facts(), found) == []
    assert set(found) == set(expected_facts())


def test_our_header_has_no_name_of_its_own(compiler: Compiler) -> None:
    """native/ublk_abi.h has no macro or structure that is not compared with uapi.py."""
    source = f'#include "{NATIVE / "ublk_abi.h"}"'
    macros = re.findall(r"^#define (UT_\w+)", compiler.output("-E", "-dM", source=source), re.MULTILINE)
    known = {our_name(name) for name in CONSTANTS}
    assert [m for m in macros if m not in known and not HELPER_MACROS.match(m)] == []
    structs = set(re.findall(r"struct (ut_\w+)\s*\{", compiler.output("-E", "-P", source=source)))
    assert structs == {our_name(c.name) for c in C_STRUCTS.values()} | {"ut_params"}


def test_our_header_stands_alone(compiler: Compiler) -> None:
    """native/ublk_abi.h compiles as strict C11, even included twice, and needs only stdint.h."""
    header = NATIVE / "ublk_abi.h"
    flags = ("-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fsyntax-only")
    compiler.output(*flags, source=f'#include "{header}"\n#include "{header}"\n')
    assert re.findall(r"#include\s+(\S+)", header.read_text()) == ["<stdint.h>"]


def test_kernel_header_says_the_same(kernel_header: KernelHeader) -> None:
    """What this kernel header defines has the value, size and offset that uapi.py gives it."""
    assert differences(expected_facts(), kernel_header.facts) == []
    floor = {
        "UBLK_CMD_ADD_DEV",
        "UBLK_IO_F_FUA",
        "ublksrv_io_cmd.result signed",
        "ublk_params.basic offset",
    }
    assert floor <= set(kernel_header.facts), "the probe saw next to nothing"


def test_kernel_header_has_every_feature_of_its_release(kernel_header: KernelHeader) -> None:
    """FEATURE_RELEASE dates no feature before the first header that defines it."""
    due = {
        f"UBLK_F_{feature.name}"
        for feature, release in uapi.FEATURE_RELEASE.items()
        if release <= kernel_header.release
    }
    assert due - set(kernel_header.facts) == set()


def test_nothing_in_the_newest_header_is_left_out(kernel_header: KernelHeader) -> None:
    """uapi.py has every name of a header up to 7.3, and 7.3's header every name of uapi.py."""
    known = set(CONSTANTS) - OURS_ONLY
    guards = {"UBLK_CMD_INC_H"}
    structs = {c.name for c in C_STRUCTS.values()} | {"ublk_params"}
    new = (kernel_header.macros - known - guards) | (kernel_header.structs - structs)
    if kernel_header.release > NEWEST_RELEASE and new:
        pytest.skip(f"Linux {kernel_header.release} has names to take over: {sorted(new)}")
    assert new == set()
    if kernel_header.release >= NEWEST_RELEASE:
        assert set(expected_facts()) - OURS_ONLY == set(kernel_header.facts)


def test_the_tables_cover_the_module() -> None:
    """Every enum, record and integer of uapi.py is compared with C, or listed as not in C."""
    ours = [value for value in vars(uapi).values() if inspect.isclass(value) and value.__module__ == uapi.__name__]
    assert {cls for cls in ours if issubclass(cls, Enum)} == set(ENUM_PREFIXES)
    records = {cls for cls in ours if issubclass(cls, uapi.Record)} - {uapi.Record}
    assert records == set(C_STRUCTS) == set(uapi.RECORD_SIZES) - {uapi.Params}
    integers = {name for name, value in vars(uapi).items() if isinstance(value, int) and name[0].isupper()}
    table = Path(__file__).read_text().partition("LONE_CONSTANTS = {")[2].partition("\n}\n")[0]
    compared = set(re.findall(r"\buapi\.([A-Z_]+)\b", table))
    assert integers - compared - NOT_IN_HEADERS - BY_VALUE == set()


# -------------------------------------------------------------------------------- planted mistakes


@pytest.mark.parametrize("name", sorted(expected_facts()))
def test_a_wrong_fact_is_reported(name: str) -> None:
    """The comparison names any one fact that is off by one, and no other."""
    facts = expected_facts()
    altered = facts | {name: facts[name] + 1}
    assert [line.split(":")[0] for line in differences(facts, altered)] == [name]
    assert [line.split(":")[0] for line in differences(altered, facts)] == [name]


def test_an_unknown_fact_is_reported() -> None:
    """The comparison names a fact that uapi.py lacks."""
    assert differences({}, {"UBLK_F_NEW": 1}) == ["UBLK_F_NEW: not in uapi.py"]


@pytest.mark.parametrize(
    ("original", "mistake", "reported"),
    [
        ("#define UT_F_ZONED (UINT64_C(1) << 8)", "#define UT_F_ZONED 512", ["UBLK_F_ZONED"]),
        (
            "#define UT_U_CMD_DEL_DEV_ASYNC UT_CTRL_R(",
            "#define UT_U_CMD_DEL_DEV_ASYNC UT_CTRL_RW(",
            ["UBLK_U_CMD_DEL_DEV_ASYNC"],
        ),
        (
            "\tuint16_t q_id;\n\tuint16_t tag;\n\tint32_t result;",
            "\tuint16_t tag;\n\tuint16_t q_id;\n\tint32_t result;",
            ["ublksrv_io_cmd.q_id offset", "ublksrv_io_cmd.tag offset"],
        ),
        (
            "int32_t ublksrv_pid;",
            "uint32_t ublksrv_pid;",
            ["ublksrv_ctrl_dev_info.ublksrv_pid signed"],
        ),
        (
            "(uint64_t)flags << 16 | index",
            "(uint64_t)flags << 24 | index",
            ["auto_buf_reg sample"],
        ),
    ],
)
def test_a_wrong_header_is_reported(
    compiler: Compiler, tmp_path: Path, original: str, mistake: str, reported: list[str]
) -> None:
    """A mistake in the C header comes out of compiler and probe as exactly that difference."""
    text = (NATIVE / "ublk_abi.h").read_text()
    assert text.count(original) == 1
    header = tmp_path / "ublk_abi.h"
    header.write_text(text.replace(original, mistake))
    found = our_header_facts(compiler, header)
    assert [line.split(":")[0] for line in differences(expected_facts(), found)] == reported


@pytest.mark.parametrize(("ci", "outcome"), [("1", pytest.fail.Exception), ("", pytest.skip.Exception)])
def test_no_compiler_is_a_failure_in_ci(monkeypatch: pytest.MonkeyPatch, ci: str, outcome: type[BaseException]) -> None:
    """A check that can't run fails under CI and is skipped, with its reason, elsewhere."""
    monkeypatch.setenv("CI", ci)
    with pytest.raises(outcome, match="no C compiler"):
        skip_unless_ci("no C compiler")


# -------------------------------------------------------------------------------------- round trips


def record_values(record: type[uapi.Record]) -> st.SearchStrategy[uapi.Record]:
    """Any value of a record that its fields can hold."""
    values: dict[str, st.SearchStrategy[Any]] = {}
    for attribute, (_, code) in zip(fields(record), uapi.layout_members(record.LAYOUT), strict=True):
        bits = 8 * struct.calcsize("=" + code)
        low = -(1 << bits - 1) if code.islower() else 0
        converter: Any = attribute.converter
        if inspect.isclass(converter) and issubclass(converter, IntEnum):
            values[attribute.name] = st.sampled_from(list(converter))
        else:
            values[attribute.name] = st.integers(low, low + (1 << bits) - 1)
    return st.builds(record, **values)


any_record = st.sampled_from(list(C_STRUCTS)).flatmap(record_values)
any_params = st.fixed_dictionaries(
    {}, optional={name: record_values(cls) for name, (_, cls) in uapi.PARAM_SECTIONS.items()}
).map(lambda sections: uapi.Params(**sections))  # type: ignore[arg-type]


@given(any_record)
def test_record_round_trip(record: uapi.Record) -> None:
    """unpack undoes pack, from any buffer type, and pack is as long as the C structure."""
    packed = record.pack()
    assert len(packed) == uapi.RECORD_SIZES[type(record)]
    assert record.unpack(packed) == record.unpack(bytearray(packed)) == record
    assert record.unpack(memoryview(packed)) == record


@given(any_record)
def test_each_field_is_where_its_offset_says(record: uapi.Record) -> None:
    """A field read at offsets() from the packed bytes is that field; everything else is zero."""
    packed = bytearray(record.pack())
    for (name, offset), (_, code) in zip(record.offsets().items(), uapi.layout_members(record.LAYOUT), strict=True):
        assert struct.unpack_from("=" + code, packed, offset) == (getattr(record, name),)
        struct.pack_into("=" + code, packed, offset, 0)
    assert not any(packed)


@given(any_params)
def test_params_round_trip(params: uapi.Params) -> None:
    """unpack undoes pack for any set of sections, and the header tells the length and the set."""
    packed = params.pack()
    assert struct.unpack_from("=II", packed) == (152, params.types)
    assert len(packed) == 152
    assert uapi.Params.unpack(packed) == params


@given(any_params, st.integers(8, 152))
def test_params_of_an_older_kernel(params: uapi.Params, length: int) -> None:
    """Cut short by its header's len or by the buffer, each section is whole or None."""
    packed = params.pack()
    claimed = struct.pack("=I", length) + packed[4:]
    by_header, by_buffer = uapi.Params.unpack(claimed), uapi.Params.unpack(packed[:length])
    assert by_header == by_buffer
    for name, (_, section) in uapi.PARAM_SECTIONS.items():
        fits = uapi.Params.offsets()[name] + section.LAYOUT.size <= length
        assert getattr(by_header, name) == (getattr(params, name) if fits else None)
    short = by_header.pack(length=length)
    assert struct.unpack_from("=I", short) == (length,)
    assert len(short) == length
    assert uapi.Params.unpack(short) == by_header


def test_params_that_do_not_fit_are_refused() -> None:
    """pack never drops a section that is there, and unpack never reads a header that is not."""
    params = uapi.Params(devt=uapi.ParamsDevt(char_major=1, char_minor=2, disk_major=3, disk_minor=4))
    assert len(params.pack(length=76)) == 76
    for length in (75, 153):
        with pytest.raises(ValueError, match=f"Params of {length} bytes"):
            params.pack(length=length)
    with pytest.raises(ValueError, match="header of 8 bytes, not 7"):
        uapi.Params.unpack(bytes(7))


def test_params_query_has_room_for_everything() -> None:
    """GET_PARAMS's buffer asks for the whole structure and every section, and is else zeros."""
    assert uapi.Params.query() == struct.pack("=II", 152, 0x7F) + bytes(144)


# -------------------------------------------------------------------------------- values and edges


def test_a_value_that_does_not_fit_is_named() -> None:
    """A record that could not be packed can't be made; the error names the field and its range."""
    with pytest.raises(ValueError, match=r"IoCmd.tag = 65536 does not fit: 0 to 65535"):
        uapi.IoCmd(q_id=0, tag=65536)
    with pytest.raises(ValueError, match=r"BatchElem.result = -2147483649 does not fit"):
        uapi.BatchElem(tag=0, result=-(1 << 31) - 1)


def test_a_buffer_of_the_wrong_length_is_refused() -> None:
    """unpack takes a structure, not a prefix of one nor the start of something longer."""
    for length in (63, 65):
        with pytest.raises(ValueError, match=f"DevInfo takes 64 bytes, not {length}"):
            uapi.DevInfo.unpack(bytes(length))


def test_device_info_speaks_enums() -> None:
    """A state is a DeviceState or an error; a feature bit from a newer kernel is kept."""
    info = uapi.DevInfo(nr_hw_queues=1, queue_depth=2, max_io_buf_bytes=3, flags=1 << 40 | 1)
    unpacked = uapi.DevInfo.unpack(info.pack())
    assert unpacked.state is uapi.DeviceState.DEAD
    assert unpacked.flags == 1 << 40 | uapi.Feature.SUPPORT_ZERO_COPY
    unknown_state = bytearray(info.pack())
    unknown_state[4] = 9
    with pytest.raises(ValueError, match="9 is not a valid DeviceState"):
        uapi.DevInfo.unpack(unknown_state)


def test_a_descriptor_parts_into_operation_and_flags() -> None:
    """op and flags divide op_flags between them."""
    desc = uapi.IoDesc(op_flags=1 | 1 << 13 | 1 << 17, nr_sectors=8, start_sector=0)
    assert (desc.op, desc.flags) == (
        uapi.IoOp.WRITE,
        uapi.IoFlag.FUA | uapi.IoFlag.NEED_REG_BUF,
    )
    with pytest.raises(ValueError, match="255 is not a valid IoOp"):
        _ = uapi.IoDesc(op_flags=0xFF, nr_sectors=0, start_sector=0).op


@pytest.mark.parametrize("command", [*uapi.ControlCommand, *uapi.IoCommand])
def test_bare_opcodes_end_where_the_encoding_began(
    command: uapi.ControlCommand | uapi.IoCommand,
) -> None:
    """A command has a bare opcode only if it is as old as that; both forms carry its number."""
    opcode = uapi.control_opcode if isinstance(command, uapi.ControlCommand) else uapi.io_opcode
    encoded, bare = opcode(command, ioctl_encoded=True), opcode(command, ioctl_encoded=False)
    assert uapi.split_opcode(encoded) == (ord("u"), command)
    newest_bare = (
        uapi.LAST_LEGACY_CONTROL_COMMAND if isinstance(command, uapi.ControlCommand) else uapi.LAST_LEGACY_IO_COMMAND
    )
    assert uapi.split_opcode(bare) == ((0 if command <= newest_bare else ord("u")), command)
    assert bare == (command if command <= newest_bare else encoded)


def test_an_unknown_command_has_no_opcode() -> None:
    """A number that is no command of that device is refused, whichever device it belongs to."""
    with pytest.raises(ValueError, match="is not a valid ControlCommand"):
        uapi.control_opcode(uapi.IoCommand.FETCH_REQ, ioctl_encoded=True)
    with pytest.raises(ValueError, match="is not a valid IoCommand"):
        uapi.io_opcode(0x28, ioctl_encoded=False)


@pytest.mark.parametrize(
    ("flags", "size"),
    [
        (uapi.BatchFlag(0), 8),
        (uapi.BatchFlag.HAS_BUF_ADDR, 16),
        (uapi.BatchFlag.HAS_ZONE_LBA | uapi.BatchFlag.AUTO_BUF_REG_FALLBACK, 16),
        (uapi.BatchFlag.HAS_ZONE_LBA | uapi.BatchFlag.HAS_BUF_ADDR, 24),
    ],
)
def test_a_batch_element_grows_by_its_flags(flags: uapi.BatchFlag, size: int) -> None:
    """An element is its header and one word per HAS_ flag, with no padding between."""
    layout = uapi.batch_elem_layout(flags)
    assert layout.size == size
    packed = layout.pack(1, 2, -3, *range((size - 8) // 8))
    assert uapi.BatchElem.unpack(packed[:8]) == uapi.BatchElem(tag=1, buf_index=2, result=-3)


@given(st.integers(0, (1 << 64) - 1))
def test_auto_buf_reg_round_trip(sqe_addr: int) -> None:
    """Every 64-bit word is one ublk_auto_buf_reg, and on a little-endian machine its very bytes."""
    registration = uapi.AutoBufReg.from_sqe_addr(sqe_addr)
    assert registration.to_sqe_addr() == sqe_addr
    if struct.pack("=H", 1) == b"\1\0":
        assert registration.pack() == struct.pack("<Q", sqe_addr)


@given(
    queue_id=st.integers(0, 4095),
    tag=st.integers(0, 65535),
    offset=st.integers(0, (32 << 20) - 1),
    integrity=st.booleans(),
)
def test_user_copy_round_trip(queue_id: int, tag: int, offset: int, integrity: bool) -> None:
    """A user-copy position names one byte of one request, and fits a signed 64-bit file offset."""
    position = uapi.user_copy_offset(queue_id=queue_id, tag=tag, offset=offset, integrity=integrity)
    assert 0x8000_0000 <= position < 1 << 63
    assert uapi.split_user_copy_offset(position) == (queue_id, tag, offset, integrity)


@pytest.mark.parametrize("part", ["queue_id", "tag", "offset"])
@pytest.mark.parametrize("value", [-1, 1 << 25])
def test_user_copy_never_reaches_another_tag(part: str, value: int) -> None:
    """A part that does not fit its bits is refused by name, not carried into the next part."""
    parts = {"queue_id": 0, "tag": 0, "offset": 0, part: value}
    with pytest.raises(ValueError, match=f"{part} = {value} does not fit"):
        uapi.user_copy_offset(**parts)  # type: ignore[arg-type]


@pytest.mark.parametrize("position", [0, 0x7FFF_FFFF, 0x8000_0000 + (1 << 53), 1 << 62])
def test_positions_outside_user_copy_are_refused(position: int) -> None:
    """A position before the base or past the last queue names no request."""
    with pytest.raises(ValueError, match="does not fit"):
        uapi.split_user_copy_offset(position)


@given(index=st.integers(0, 65535), offset=st.integers(0, (1 << 32) - 1))
def test_shmem_address_round_trip(index: int, offset: int) -> None:
    """A shared-memory address names one byte of one buffer and leaves its reserved bits zero."""
    addr = uapi.shmem_zc_addr(index=index, offset=offset)
    assert addr < 1 << 48
    assert uapi.split_shmem_zc_addr(addr) == (index, offset)


@pytest.mark.parametrize(
    ("queue_id", "depth", "io_desc_size", "page_size", "offset", "length"),
    [
        (0, 1, 24, 4096, 0, 4096),
        (1, 128, 24, 4096, 98304, 4096),
        (3, 4096, 24, 4096, 294912, 98304),
        (1, 171, 24, 4096, 98304, 8192),
        (1, 128, 24, 65536, 131072, 65536),
        (2, 4096, 256, 16384, 2097152, 1048576),
    ],
)
def test_where_descriptors_are_mapped(
    queue_id: int, depth: int, io_desc_size: int, page_size: int, offset: int, length: int
) -> None:
    """A queue's descriptors lie where the driver has them, for any page and descriptor size."""
    sizes = {"io_desc_size": io_desc_size, "page_size": page_size}
    assert uapi.descriptors_offset(queue_id, **sizes) == offset
    assert uapi.descriptors_length(depth, **sizes) == length


@given(
    depth=st.integers(1, 4096),
    io_desc_size=st.integers(3, 32).map(lambda words: 8 * words),
    page_size=st.sampled_from([4096, 16384, 65536]),
)
def test_no_two_queues_share_a_page(depth: int, io_desc_size: int, page_size: int) -> None:
    """A queue's mapping is whole pages, holds all its descriptors, and ends before the next one."""
    sizes = {"io_desc_size": io_desc_size, "page_size": page_size}
    start, following = (uapi.descriptors_offset(queue, **sizes) for queue in (7, 8))
    end = start + uapi.descriptors_length(depth, **sizes)
    assert start % page_size == end % page_size == 0
    assert start + depth * io_desc_size <= end <= following
