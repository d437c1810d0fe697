"""Little kernels in PTX, written by hand, and how they are run on the machine."""

from __future__ import annotations

import re
import struct
from typing import Any

import numpy as np

from bench.ptx_machine import machine
from bench.ptx_machine.global_memory import Region

Array = np.ndarray[Any, Any]
REGISTERS = ".reg .pred %p<16>; .reg .b16 %rs<64>; .reg .b32 %r<400>; .reg .b64 %rd<64>;"
FILES = {"8": "%rs", "16": "%rs", "32": "%r", "64": "%rd"}
DTYPES: dict[str, Any] = {"f16": np.float16, "bf16": np.uint16, "f32": np.float32, "f64": np.float64, "pred": np.uint32}


def text(body: str, arrays: int, threads: int = 32) -> str:
    """A kernel that takes so many pointers, which begin in %rd0, %rd1, ..., the thread's number being in %r0."""
    given = ",\n".join(f"\t.param .u64 .ptr .global .align 1 test_param_{i}" for i in range(arrays))
    loads = "".join(f"\tld.param.b64 %rd{i}, [test_param_{i}];\n" for i in range(arrays))
    lines = "".join(f"\t{line.strip()}\n" for line in body.strip().splitlines())
    return (
        f".version 8.7\n.target sm_90a\n.address_size 64\n.extern .shared .align 16 .b8 global_smem[];\n"
        f".visible .entry test(\n{given}\n)\n.reqntid {threads}\n{{\n\t{REGISTERS}\n{loads}\tmov.u32 %r0, %tid.x;\n"
        f"{lines}\tret;\n}}\n"
    )


def aligned(x: Array) -> Array:
    """A copy of an array that begins at a multiple of 256 bytes, as a tensor on a GPU does; some around it are free."""
    room = np.zeros(x.nbytes + 3 * 256, np.uint8)
    start = 256 + -room.ctypes.data % 256
    copy = room[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
    copy[...] = x
    return copy


def run(body: str, *arrays: Array, threads: int = 32, shared: int = 0, programs: int = 1) -> machine.Execution:
    """Run a kernel on arrays, which it may change."""
    held = [aligned(x) for x in arrays]
    regions = [
        Region(x.ctypes.data, x.reshape(-1).view(np.uint8), np.ones(x.nbytes, bool), i) for i, x in enumerate(held)
    ]
    parameters = struct.pack(f"{len(held)}Q", *(x.ctypes.data for x in held))
    try:
        return machine.execute(text(body, len(arrays), threads), (programs, 1, 1), shared, parameters, regions)
    finally:
        for x, copy in zip(arrays, held, strict=True):
            if x.flags.writeable:
                x[...] = copy


def dtype(kind: str) -> Any:
    """NumPy's of a type of PTX."""
    return DTYPES.get(kind) or np.dtype(f"{'i' if kind[0] == 's' else 'u'}{int(kind[1:]) // 8}").type


def elementwise(line: str, result: str, *operands: str) -> str:
    """The body of a kernel: thread t puts `line`, {d} and {a}, {b}, ... filled in, of elements t into element t."""
    body, names = "", dict[str, str]()
    for i, kind in enumerate(operands, 1):
        size, bits = np.dtype(dtype(kind)).itemsize, 8 * np.dtype(dtype(kind)).itemsize
        register = f"{FILES[str(bits)]}{10 + i}"
        body += f"mad.wide.u32 %rd{20 + i}, %r0, {size}, %rd{i};\nld.global.b{bits} {register}, [%rd{20 + i}];\n"
        if kind == "pred":
            body += f"setp.ne.b32 %p{i}, {register}, 0;\n"
            register = f"%p{i}"
        names["abcd"[i - 1] if i < 4 else "e"] = register
    size = np.dtype(dtype(result)).itemsize
    to = "%p0" if result == "pred" else f"{FILES[str(8 * size)]}30"
    body += line.format(d=to, **names) + ";\n"
    if result == "pred":
        body += "selp.b32 %r30, 1, 0, %p0;\n"
    return body + f"mad.wide.u32 %rd20, %r0, {size}, %rd0;\nst.global.b{8 * size} [%rd20], {FILES[str(8 * size)]}30;\n"


def lane_values(bits: int, count: int, seed: int = 0) -> Array:
    """[count, 32] numbers of some bits, no two alike in a row."""
    return np.random.default_rng(seed).integers(0, 1 << bits, (count, 32), np.uint64).astype(f"u{bits // 8}")


def opcodes(body: str) -> set[str]:
    """Those of a body."""
    return {match[1] for match in re.finditer(r"^\s*(?:@!?%\w+\s+)?([a-z][\w.:]+)", body, re.M)}


# -- matrices in shared memory -----------------------------------------------------------------------------------------

LINES = {0: 16, 1: 32, 2: 64, 3: 128}  # bytes of a line, by how many bits of an address change places


def placed(matrix: Array, swizzle: int, turned: bool) -> tuple[Array, int, int]:
    """A matrix [rows, depth] in shared memory, by CUTLASS's canonical layouts, and its leading and stride offsets.

    Pieces of 16 bytes, in lines: piece p of line l lies where p XOR the last bits of l's place in 128 bytes is.

    Args:
        swizzle: bits of a piece's number that change places.
        turned: rows are along memory.
    """
    across, along = (matrix.T, matrix.T.shape) if turned else (matrix, matrix.shape)
    across = np.ascontiguousarray(across)
    pieces = across.view(np.uint8).reshape(along[0], -1, 16)  # [lines, pieces, 16]
    line = LINES[swizzle] // 16  # pieces
    lines, count = pieces.shape[:2]
    held = np.zeros((lines // 8, -(-count // line), 8, line, 16), np.uint8)  # atoms
    for i in range(lines):
        for j in range(count):
            move = (i % 8) * line // 8 % line if swizzle else 0
            held[i // 8, j // line, i % 8, (j % line) ^ move] = pieces[i, j]
    atom, row = 8 * line * 16, held[0].nbytes
    leading, stride = (row, atom) if not swizzle and turned else (atom, row)
    return held.reshape(-1), leading, stride


def descriptor(start: int, leading: int, stride: int, swizzle: int, tensor_cores: bool = False) -> int:
    """That of a matrix for wgmma, or for tcgen05."""
    mode = (
        {0: 0, 1: 6, 2: 4, 3: 2}[swizzle] << 61 | 1 << 46 if tensor_cores else {0: 0, 1: 3, 2: 2, 3: 1}[swizzle] << 62
    )
    return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | mode


def into_shared(size: int, threads: int = 128, pointer: str = "%rd1") -> str:
    """Lines that copy so many bytes into shared memory, each thread 16 at a time."""
    lines = ""
    for start in range(0, size, 16 * threads):
        lines += f"""
        mad.lo.s32 %r300, %r0, 16, {start};
        setp.lt.s32 %p15, %r300, {size};
        cvt.u64.u32 %rd60, %r300;
        add.s64 %rd60, %rd60, {pointer};
        @%p15 ld.global.v4.b32 {{%r301, %r302, %r303, %r304}}, [%rd60];
        @%p15 st.shared.v4.b32 [%r300], {{%r301, %r302, %r303, %r304}};"""
    return lines


def registers(count: int, first: int = 100) -> str:
    return "{" + ", ".join(f"%r{first + i}" for i in range(count)) + "}"


def store_each(count: int, first: int = 100) -> str:
    """Lines that put so many registers of each thread behind each other."""
    body = f"mad.wide.u32 %rd50, %r0, {4 * count}, %rd0;\n"
    return body + "".join(f"st.global.b32 [%rd50+{4 * i}], %r{first + i};\n" for i in range(count))


def load_each(count: int, first: int, pointer: str) -> str:
    """Lines that load so many registers for each thread."""
    body = f"mad.wide.u32 %rd51, %r0, {4 * count}, {pointer};\n"
    return body + "".join(f"ld.global.b32 %r{first + i}, [%rd51+{4 * i}];\n" for i in range(count))


def wgmma(size: int, columns: int, a: str, b: int, kind: str = "f16", turned: str = ", 0, 0", before: str = "") -> str:
    """A product of `columns` columns by 128 threads, stored as registers; `a` is a descriptor or registers."""
    depth = 8 if kind == "tf32" else 16
    operands = f"{registers(columns // 2)}, {'%rd10' if a.isdecimal() else a}, %rd11"
    zero = "".join(f"mov.b32 %r{100 + i}, 0f00000000;\n" for i in range(columns // 2))
    return f"""{into_shared(size)}
        {before}
        mov.b64 %rd10, {a if a.isdecimal() else 0};
        mov.b64 %rd11, {b};
        mov.pred %p1, -1;
        {zero}
        fence.proxy.async;
        bar.sync 0;
        wgmma.fence.sync.aligned;
        wgmma.mma_async.sync.aligned.m64n{columns}k{depth}.f32.{kind}.{kind} {operands}, %p1, 1, 1{turned};
        wgmma.commit_group.sync.aligned;
        wgmma.wait_group.sync.aligned 0;
        {store_each(columns // 2)}
        """


def tcgen05(size: int, columns: int, a: str, b: int, shape: int, kind: str, rows: int, before: str = "") -> str:
    """A product by tensor cores in 64 or 128 rows, loaded by 128 threads and stored as registers.

    Args:
        a: a descriptor, or an address in tensor memory.
        shape: the instruction's descriptor.
        before: what is done once tensor memory is there: its address is %r2.
    """
    count = columns if rows == 128 else columns // 2
    load = (f"tcgen05.ld.sync.aligned.32x32b.x{count}.b32 {registers(count)}, [%r5];" if rows == 128 else
            f"tcgen05.ld.sync.aligned.16x32bx2.x{count}.b32 {registers(count)}, [%r5], {count};")  # fmt: skip
    return f"""
        setp.lt.u32 %p1, %r0, 32;
        setp.eq.u32 %p2, %r0, 0;
        mov.pred %p3, 0;
        mov.b32 %r1, {size};
        mov.b32 %r3, {size + 16};
        mov.b32 %r4, {shape};
        @%p1 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r1], 256;
        @%p1 tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;
        bar.sync 0;
        ld.shared.b32 %r2, [%r1];
        shr.u32 %r6, %r0, 5;
        shl.b32 %r6, %r6, 21;
        add.s32 %r5, %r2, %r6;
        {before}
        {into_shared(size)}
        fence.proxy.async.shared::cta;
        @%p2 mbarrier.init.shared::cta.b64 [%r3], 1;
        bar.sync 0;
        mov.b64 %rd10, {a if a.isdecimal() else 0};
        mov.b64 %rd11, {b};
        mov.b32 %r7, 0;
        @%p2 tcgen05.mma.cta_group::1.kind::{kind} [%r2+0], {"%rd10" if a.isdecimal() else a}, %rd11, %r4, %p3;
        @%p2 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r3];
        {{
        .reg .pred complete;
        waitLoop:
        mbarrier.try_wait.parity.shared::cta.b64 complete, [%r3], %r7;
        @!complete bra.uni waitLoop;
        }}
        bar.sync 0;
        @%p2 mbarrier.inval.shared::cta.b64 [%r3];
        {load}
        tcgen05.wait::ld.sync.aligned;
        {store_each(count)}
        bar.sync 0;
        @%p1 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r2, 256;
        """


def bits_of(kind: str) -> int:
    return int(kind[1:])


def wrapped(value: int, kind: str) -> int:
    """An integer as a type holds it."""
    value %= 1 << bits_of(kind)
    return value - (1 << bits_of(kind)) if kind[0] == "s" and value >> bits_of(kind) - 1 else value


def integers(kind: str, seed: int) -> np.ndarray[Any, Any]:
    """32 of a type: its ends, small ones, and any."""
    if kind == "pred":
        return np.random.default_rng(seed).integers(0, 2, 32).astype(np.uint32)
    if kind == "small":
        return (
            np.random.default_rng(seed)
            .permutation([0, 1, 2, 5, 8, 15, 16, 24, 31, 32, 33, 7, 3, 4, 9, 11] * 2)
            .astype(np.uint32)
        )
    ends = np.iinfo(dtype(kind))
    random = np.random.default_rng(seed)
    some = [ends.min, ends.max, 0, 1, ends.max // 2, 2, 3, 31, 32, 33, 7]
    every = [int.from_bytes(random.bytes(8), "little") >> int(random.integers(0, 64)) for _ in range(21)]
    return np.array([wrapped(x, kind) for x in random.permutation(np.array(some + every, object))], dtype(kind))
