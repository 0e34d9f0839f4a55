"""Every Triton kernel in every pinned configuration, compiled for GPUs that need not be there.

From ptxas's own count: nothing spilled, no local memory; shared memory within the chip's; tensor cores where the
precision has them; copies and stores of 16 bytes where rows are aligned.

What is not copied 16 bytes at a time: a bias's gradient, of which a tile has one element a row; matrices whose rows do
not begin at multiples of 16 bytes (ALIGN 1); and factors that are read across their rows as TF32, L for ∂L and R for P:
tensor cores want the summed index contiguous in shared memory, and nothing but 4 bytes can be turned on the way there.
On sm_100 sizes and addresses of rows are copied too, 8 bytes at a time: they are not taken out of the loop there.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource, CompiledKernel  # noqa: E402

from fishleg_fast.kernels.device import commit, diagonal, factors, inner, lambda_step, polar, products, theta_step  # noqa: E402
from fishleg_fast.kernels.host.configurations import (  # noqa: E402
    BESIDE_PRODUCTS,
    COPY,
    ELEMENTWISE,
    INNER_PRODUCTS,
    TILES,
    Tile,
    stored_twice,
    tile,
)

SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
PRECISIONS = sorted(TILES["small"])
TENSOR_CORES = {80: r"\bmma\.sync", 90: r"wgmma\.mma_async", 100: r"tcgen05\.mma"}
INTEGERS = {"tiles", "slots", "dot_slots", "square_count", "blocks"}
FLOATS = {"kappa", "damping", "beta1", "beta2", "eps", "log2beta1", "log2beta2", "keep", "linear", "quadratic"}
# A thread's copies of a bias's gradient for each stage. Triton 3.6 lays out a row of 32 as the tile it is added to,
# read down columns of which a warp has two; later versions as a row.
BIAS_COPIES = 1 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7) else 4
TABLES = {"rows": "*i64", "schedule": "*i32", "arrived": "*i32", "broken": "*i32", "taken": "*i1"}

GRADIENT = {"G": tl.float32, "GENERAL": False, "ALIGN": 16}
ALIGNED = {**GRADIENT, "ALIGN_X": 16}
WIDE = {"ROWS": ELEMENTWISE[0], "COLS": ELEMENTWISE[1]}
NARROW = {"ROWS": BESIDE_PRODUCTS[0], "COLS": BESIDE_PRODUCTS[1]}
TURNED = {"ROWS": COPY[0], "COLS": COPY[1]}
LOOSE = {"ALIGN": 1, "ALIGN_X": 1}
GENERAL = {"GENERAL": True, "G": tl.bfloat16, **LOOSE}
RIGHT = {"SOURCE": "mg", "SCALED": False, "COUNT": True, "CHECK": False, **ALIGNED}
LEFT = {"SUMS": "rms", "AFTER": False, "SCALED": False, "SQUARED": False, **ALIGNED}
FUSED = {"AFTER": False, "SCALED": False, "W": tl.float32, **ALIGNED}
PRODUCTS = {"RESCALE": True, "PRECONDITION": False, "SOURCE": "residual", "ALIGN_V": 16, **NARROW, **ALIGNED}
UPDATE = {"RULE": "rms", "AFTER": False, "DIAGONAL": True, "W": tl.float32, **WIDE, **ALIGNED}

BOTH, SQUARE, EPILOGUE = ("small", "large"), ("small", "large"), ("epilogue",)
# kernel -> (function, constants, shape classes, whether tiles are square)
GEMMS = {
    "right": (products.right_kernel, RIGHT, BOTH, False),
    "left": (products.left_kernel, LEFT, BOTH, False),
    "fused": (theta_step.fused_kernel, FUSED, EPILOGUE, False),
    "products": (lambda_step.products_kernel, PRODUCTS, BOTH, False),
    "refresh": (factors.refresh_kernel, {"ALIGN": 16}, SQUARE, True),
    "pair": (factors.pair_kernel, {}, SQUARE, True),
    "gradients": (lambda_step.gradients_kernel, {"ALIGN": 16}, EPILOGUE, True),
    "commit": (commit.commit_kernel, NARROW, SQUARE, True),
    "gram": (polar.symmetric_kernel, {"STAGE": "gram"}, SQUARE, True),
    "bound": (polar.symmetric_kernel, {"STAGE": "bound"}, SQUARE, True),
    "combined": (polar.symmetric_kernel, {"STAGE": "combined"}, SQUARE, True),
    "apply first": (polar.apply_kernel, {"FIRST": True}, BOTH, False),
    "apply": (polar.apply_kernel, {"FIRST": False}, BOTH, False),
}
ALIGNED_OPERANDS = {"right", "apply first"}  # so read where others laid them out with aligned rows
ACROSS = {"refresh", "gradients"}  # one of whose operands is read across its rows
OURS = {"left", "pair", "commit", "gram", "bound", "combined", "apply"}  # that read our own aligned matrices alone
TWICE = {"gram", "bound", "combined", "apply", "apply first"}  # that have narrower tiles
ELEMENTWISES = {
    "update": (theta_step.update_kernel, UPDATE),
    "update spectral": (theta_step.update_kernel, {**UPDATE, "RULE": "spectral", "AFTER": True}),
    "unit": (polar.unit_kernel, {"AFTER": False, "DIAGONAL": True, **ALIGNED, **TURNED}),
    "unit after": (polar.unit_kernel, {"AFTER": True, "DIAGONAL": False, **GENERAL, **TURNED}),
    "diagonal": (theta_step.diagonal_kernel, {"SUMS": "trust", "AFTER": False, **GRADIENT, **WIDE}),
    "diagonal sums": (diagonal.diagonal_sums_kernel, {"PRECONDITION": True, **GRADIENT, **WIDE}),
    "diagonal adam": (diagonal.diagonal_adam_kernel, {"RESCALE": True, "PRECONDITION": True, **GRADIENT, **WIDE}),
    "diagonal product": (diagonal.diagonal_product_kernel, {**GRADIENT, **WIDE}),
    "copy": (factors.copy_kernel, {"ALIGN": 16, **TURNED}),
    "inner": (inner.inner_kernel, {"X": tl.float32, "Y": tl.bfloat16, "CHUNK": INNER_PRODUCTS.CHUNK}),
}
BETWEEN_RIGHT, BETWEEN_LEFT = {"SOURCE": "x", "COUNT": False}, {"SUMS": "none", "SCALED": True, "SQUARED": True}
# What else kernels are compiled for at run time, and in which shape class.
VARIANTS = {
    "right after": (products.right_kernel, {**RIGHT, "SOURCE": "g", "CHECK": True, "SCALED": True}, "large"),
    "right loose": (products.right_kernel, {**RIGHT, **LOOSE}, "large"),
    "right general": (products.right_kernel, {**RIGHT, "SCALED": True, **GENERAL}, "epilogue"),
    "left trust": (products.left_kernel, {**LEFT, "SUMS": "trust", "SCALED": True, **LOOSE}, "epilogue"),
    "left scaled": (products.left_kernel, {**LEFT, "SCALED": True, "AFTER": True, **LOOSE}, "epilogue"),
    "left loose": (products.left_kernel, {**LEFT, **LOOSE}, "large"),
    "right between": (products.right_kernel, {**RIGHT, **BETWEEN_RIGHT}, "epilogue"),
    "right between loose": (products.right_kernel, {**RIGHT, **BETWEEN_RIGHT, **LOOSE}, "epilogue"),
    "left between": (products.left_kernel, {**LEFT, **BETWEEN_LEFT}, "epilogue"),
    "left between loose": (products.left_kernel, {**LEFT, **BETWEEN_LEFT, **LOOSE}, "epilogue"),
    "left general": (products.left_kernel, {**LEFT, "SUMS": "trust", "SCALED": True, **GENERAL}, "epilogue"),
    "left after": (products.left_kernel, {**LEFT, "AFTER": True}, "epilogue"),
    "left plain": (products.left_kernel, {**LEFT, "SUMS": "none"}, "large"),
    "fused general": (theta_step.fused_kernel, {**FUSED, **GENERAL, "W": tl.bfloat16, "AFTER": True}, "epilogue"),
    "products loose": (lambda_step.products_kernel, {**PRODUCTS, **LOOSE, "ALIGN_V": 1}, "epilogue"),
    "products again": (lambda_step.products_kernel, {**PRODUCTS, "SOURCE": "x", "RESCALE": False}, "large"),
    "products general": (lambda_step.products_kernel, {**PRODUCTS, "PRECONDITION": True, **GENERAL}, "epilogue"),
}
VARIANTS_OF_ELEMENTWISE = {
    "update general": (theta_step.update_kernel, {**UPDATE, **GENERAL, "W": tl.float16, "RULE": "trust"}),
    **{
        f"diagonal {sums} {after} {g}": (
            theta_step.diagonal_kernel,
            {**WIDE, **GRADIENT, "SUMS": sums, "AFTER": after, "G": g, "ALIGN": align},
        )
        for sums in ("rms", "trust")
        for after in (False, True)
        for g, align in ((tl.float32, 16), (tl.bfloat16, 16), (tl.float16, 1))
    },
}


def source(function, constants: dict) -> ASTSource:
    """What the launcher would compile: pointers to 16 bytes, constants as given."""
    names = function.arg_names
    kinds = {
        n: "constexpr"
        if n in constants
        else "i32"
        if n in INTEGERS
        else "fp32"
        if n in FLOATS
        else TABLES.get(n, "*fp32")
        for n in names
    }
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if kinds[n][0] == "*" and n != "taken"}
    return ASTSource(function, kinds, {(names.index(n),): value for n, value in constants.items()}, aligned)


def compiled(function, constants: dict, target: GPUTarget, num_warps: int, num_stages: int = 1) -> CompiledKernel:
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    return triton.compile(source(function, constants), target=target, options=options)


def compiled_gemm(
    function, constants: dict, square: bool, precision: str, t: Tile, target: GPUTarget
) -> CompiledKernel:
    side = min(t.BM, t.BN)
    sizes = {"BM": side, "BN": side, "BK": t.BK} if square else {"BM": t.BM, "BN": t.BN, "BK": t.BK}
    return compiled(function, {**constants, **sizes, "PRECISION": precision}, target, t.num_warps, t.num_stages)


@cache
def cuobjdump() -> str:
    return triton.knobs.nvidia.cuobjdump.path


def check_resources(kernel: CompiledKernel, arch: int, name: str, folder: Path) -> None:
    """STACK counts spilled registers too."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    said = subprocess.run([cuobjdump(), "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    used = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", said)}
    assert used["REG"] > 0 and used["STACK"] == 0 and used["LOCAL"] == 0, (name, used)
    assert kernel.metadata.shared <= SHARED[arch], (name, kernel.metadata.shared)


def copies(ptx: str) -> Counter[int]:
    """How many asynchronous copies to shared memory there are of so many bytes."""
    sizes = re.findall(r"cp\.async\.c[ag]\.shared\.global [^;]*?, (0x[0-9a-f]+)[,;\s]", ptx)
    return Counter(int(size, 16) for size in sizes)


def check_copies(name: str, ptx: str, t: Tile, side: int, precision: str, arch: int) -> None:
    """Operands reach shared memory by asynchronous copies, of 16 bytes where that is possible."""
    found, case = copies(ptx), (name, precision, arch)
    vectors = (side or t.BM) * t.BK * 4 // 16
    assert found[16] >= 2 * max(vectors // (32 * t.num_warps), 1), (case, found)  # the first operand's, of two stages
    if name in OURS or (name in ALIGNED_OPERANDS and arch < 100):
        assert set(found) == {16}, (case, found)
    elif name in ACROSS and arch < 100:
        assert set(found) <= {4, 16} and (precision != "tf32" or found[4] > 0), (case, found)
    elif name == "products" and arch < 100:  # the bias's gradient
        assert found[4] <= BIAS_COPIES * t.num_stages, (case, found)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("arch", SHARED)
def test_products(arch: int, precision: str, tmp_path: Path) -> None:
    target, seen = GPUTarget("cuda", arch, 32), set()
    for name, (function, constants, classes, square) in GEMMS.items():
        for shape in classes:
            t = tile(shape, precision, arch)
            t = stored_twice(t) if name in TWICE else t
            if (name, t) in seen:
                continue
            seen.add((name, t))
            kernel = compiled_gemm(function, constants, square, precision, t, target)
            case, ptx = f"{name} {shape} {precision} sm_{arch}", kernel.asm["ptx"]
            check_resources(kernel, arch, case, tmp_path)
            cores = re.search(TENSOR_CORES[arch], ptx)
            assert bool(cores) == (precision != "ieee"), case
            if precision != "ieee" or name in OURS:
                check_copies(name, ptx, t, min(t.BM, t.BN) if square else 0, precision, arch)
            assert name not in OURS or "st.global.v4" in ptx, case


@pytest.mark.parametrize("arch", SHARED)
def test_elementwise(arch: int, tmp_path: Path) -> None:
    target, warps = GPUTarget("cuda", arch, 32), dict.fromkeys(("copy", "unit", "unit after"), COPY.num_warps)
    warps["inner"] = INNER_PRODUCTS.num_warps
    for name, (function, constants) in {**ELEMENTWISES, **VARIANTS_OF_ELEMENTWISE}.items():
        kernel = compiled(function, constants, target, warps.get(name, ELEMENTWISE[2]))
        check_resources(kernel, arch, f"{name} sm_{arch}", tmp_path)
        assert name != "update" or "st.global.v4" in kernel.asm["ptx"]


def test_variants(tmp_path: Path) -> None:
    precision, target = "tf32", GPUTarget("cuda", 90, 32)
    for name, (function, constants, shape) in VARIANTS.items():
        kernel = compiled_gemm(function, constants, False, precision, tile(shape, precision, 90), target)
        check_resources(kernel, 90, f"{name} {precision}", tmp_path)


@pytest.mark.parametrize("precision", ["ieee", "bf16"])
def test_amd(precision: str) -> None:
    """gfx942 compiles, with matrix cores and 64 KB of shared memory at most. The backend does not offer itself there:
    nothing has run on one.
    """
    target = GPUTarget("hip", "gfx942", 64)
    for name, (function, constants, classes, square) in GEMMS.items():
        t = tile(classes[0], precision, 80)
        kernel = compiled_gemm(function, constants, square, precision, t._replace(num_stages=2), target)
        assert kernel.metadata.shared <= 64 * 1024, name
        assert "v_mfma" in kernel.asm["amdgcn"], name


def test_the_table_is_complete() -> None:
    for classes in TILES.values():
        assert sorted(classes) == PRECISIONS
        for rows in classes.values():
            assert 80 in rows  # the least that the backend accepts
    assert tile("large", "tf32", 86) == tile("large", "tf32", 80)
    assert tile("large", "tf32", 120) == tile("large", "tf32", 90)
