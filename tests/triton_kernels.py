# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Triton kernels that are not ours, compiled and executed: ``python -m tests.triton_kernels TARGET ...``.

Each is compared with NumPy, or PyTorch in fp64; a line says what was executed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from bench.ptx_machine.driver import installed


@triton.jit
def matmul_kernel(
    a, b, c, M, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        inside = start + k < K
        left = tl.load(a + m[:, None] * K + (start + k)[None, :], (m < M)[:, None] & inside[None, :], other=0.0)
        right = tl.load(b + (start + k)[:, None] * N + n[None, :], inside[:, None] & (n < N)[None, :], other=0.0)
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
    tl.store(c + m[:, None] * N + n[None, :], acc.to(c.dtype.element_ty), (m < M)[:, None] & (n < N)[None, :])


@triton.jit
def softmax_kernel(x, y, columns, BLOCK: tl.constexpr):
    row, n = tl.program_id(0), tl.arange(0, BLOCK)
    values = tl.load(x + row * columns + n, n < columns, other=float("-inf"))
    weights = tl.exp(values - tl.max(values, 0))
    tl.store(y + row * columns + n, weights / tl.sum(weights, 0), n < columns)


@triton.jit
def reduce_kernel(x, sums, most, where, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    m, n = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    values = tl.load(x + m[:, None] * COLUMNS + n[None, :])
    tl.store(sums + n, tl.sum(values, 0))
    tl.store(most + m, tl.max(values, 1))
    tl.store(where + m, tl.argmax(values, 1))


@triton.jit
def transpose_kernel(x, y, M, N, BLOCK: tl.constexpr):
    m, n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + m[:, None] * N + n[None, :], (m < M)[:, None] & (n < N)[None, :])
    tl.store(y + n[:, None] * M + m[None, :], values.T, (n < N)[:, None] & (m < M)[None, :])


@triton.jit
def layer_norm_kernel(x, weight, bias, y, columns, eps, BLOCK: tl.constexpr):
    row, n = tl.program_id(0), tl.arange(0, BLOCK)
    inside = n < columns
    values = tl.load(x + row * columns + n, inside, other=0.0).to(tl.float32)
    mean = tl.sum(values, 0) / columns
    centred = tl.where(inside, values - mean, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 0) / columns + eps)
    result = centred * scale * tl.load(weight + n, inside) + tl.load(bias + n, inside)
    tl.store(y + row * columns + n, result.to(y.dtype.element_ty), inside)


@triton.jit
def gather_kernel(x, index, y, count, columns, BLOCK: tl.constexpr):
    i, n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCK)
    rows = tl.load(index + i, i < count, other=0)
    values = tl.load(x + rows[:, None] * columns + n[None, :], (i < count)[:, None] & (n < columns)[None, :])
    tl.store(y + i[:, None] * columns + n[None, :], values, (i < count)[:, None] & (n < columns)[None, :])


def matmul(dtype: torch.dtype, stages: int, warps: int = 4, precision: str = "ieee", block: int = 64) -> None:
    M, N, K = 72, 112, 160
    a, b, c = torch.randn(M, K).to(dtype), torch.randn(K, N).to(dtype), torch.full((M, N), float("nan"))
    grid = triton.cdiv(M, block), triton.cdiv(N, block)
    matmul_kernel[grid](a, b, c, M, N, K, block, block, 32, precision, num_stages=stages, num_warps=warps)
    tolerance = 2e-2 if precision == "tf32" else 1e-4
    torch.testing.assert_close(c.double(), a.double() @ b.double(), rtol=tolerance, atol=4 * tolerance)


def softmax() -> None:
    x = 9 * torch.randn(5, 200)
    y = torch.full_like(x, float("nan"))
    softmax_kernel[(5,)](x, y, 200, 256)
    torch.testing.assert_close(y.double(), torch.softmax(x.double(), 1), rtol=1e-5, atol=1e-7)


def reduction() -> None:
    x = torch.randn(32, 64)
    sums, most, where = torch.empty(64), torch.empty(32), torch.empty(32, dtype=torch.int32)
    reduce_kernel[(1,)](x, sums, most, where, 32, 64)
    torch.testing.assert_close(sums.double(), x.double().sum(0), rtol=1e-5, atol=1e-5)
    assert bool((most == x.amax(1)).all())
    assert bool((where == x.argmax(1)).all())


def transposition(dtype: torch.dtype) -> None:
    x = torch.randn(50, 70).to(dtype)
    y = torch.empty(70, 50, dtype=dtype)
    transpose_kernel[(2, 3)](x, y, 50, 70, 32)
    assert bool((y == x.T).all())


def layer_norm() -> None:
    x, weight, bias = torch.randn(6, 150).half(), torch.randn(150), torch.randn(150)
    y = torch.empty(6, 150)
    layer_norm_kernel[(6,)](x, weight, bias, y, 150, 1e-5, 256)
    wanted = torch.nn.functional.layer_norm(x.double(), (150,), weight.double(), bias.double())
    torch.testing.assert_close(y.double(), wanted, rtol=1e-4, atol=1e-4)


def gathering() -> None:
    x, index = torch.randn(100, 20), torch.randint(100, (45,))
    y = torch.empty(45, 20)
    gather_kernel[(2,)](x, index, y, 45, 20, 32)
    assert bool((y == x[index]).all())


KERNELS: dict[str, Callable[[], Any]] = {
    "matmul fp16": lambda: matmul(torch.float16, 1),
    "matmul fp16, pipelined": lambda: matmul(torch.float16, 3),
    "matmul bf16, pipelined, 8 warps": lambda: matmul(torch.bfloat16, 4, 8, block=128),
    "matmul tf32, pipelined": lambda: matmul(torch.float32, 3, precision="tf32"),
    "matmul fp32": lambda: matmul(torch.float32, 2, block=32),
    "softmax": softmax,
    "reduction": reduction,
    "transpose fp32": lambda: transposition(torch.float32),
    "transpose fp16": lambda: transposition(torch.float16),
    "layer norm": layer_norm,
    "gather": gathering,
}


def main(targets: list[str]) -> None:
    compiled: Any = matmul_kernel, softmax_kernel, reduce_kernel, transpose_kernel, layer_norm_kernel, gather_kernel
    for target in targets:
        with installed(target) as device:
            for name, run in KERNELS.items():
                torch.manual_seed(0)
                device.executions.clear()
                run()
                (done,) = device.executions
                units = sorted({part for opcode in done.instructions for part in UNITS if opcode.startswith(part)})
                print(target, name, sum(done.instructions.values()), *units, flush=True)
        for kernel in compiled:
            kernel.device_caches.clear()


UNITS = ("mma.sync", "wgmma.mma_async", "tcgen05.mma", "cp.async", "ldmatrix", "stmatrix", "shfl", "redux")

if __name__ == "__main__":
    main(sys.argv[1:])
