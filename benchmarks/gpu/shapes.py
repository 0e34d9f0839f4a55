"""What the ops are measured on, what is compared with what, and the floor. Plain Python, for the tables need it too."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

Shape = tuple[int, int]
WIDEST_TARGET, TALLEST = 512, 4096  # Q v is to be twice as fast up to the one, a refreshed P 1.5× from the other on

# precision -> that of what it is compared with, where torch has no such thing of its own
REFERENCE = {"highest": "highest", "tf32x3": "highest", "high": "high", "medium": "high"}
COMPILED = {"highest": "highest", "tf32x3": "highest", "high": "high", "medium": "medium"}


def layers(widths: Sequence[int]) -> list[Shape]:
    """The blocks of an autoencoder with biases."""
    sizes = [*widths, *reversed(widths[:-1])]
    return [(m, n + 1) for n, m in itertools.pairwise(sizes)]


def resnet18(width: int = 64, classes: int = 10) -> list[Shape]:
    """The convolutions' and the head's blocks; see models.ResNet18."""
    shapes, last = [(width, 27)], width
    for stage in range(4):
        out = width * 2**stage
        shapes += [(out, 9 * last), (out, 9 * out), *[(out, last)] * (out != last), (out, 9 * out), (out, 9 * out)]
        last = out
    return [*shapes, (classes, last + 1)]


LISTS: dict[str, list[Shape]] = {
    "MNIST autoencoder": layers((784, 1000, 500, 250, 30)),
    "FACES autoencoder": layers((625, 2000, 1000, 500, 30)),
    "ResNet18": resnet18(),
    "3 transformer layers": [(2304, 769), (768, 769), (3072, 769), (768, 3073)] * 3,
    "12×(64, 65)": [(64, 65)] * 12,
    "12×(256, 257)": [(256, 257)] * 12,
}
SQUARES = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
TINY_LISTS: dict[str, list[Shape]] = {"MNIST autoencoder": layers((6, 5, 3))}
TINY_SQUARES = (4,)


# ---- the floor


def cost(op: str, shapes: Sequence[Shape]) -> tuple[int, int]:
    """(FLOPs, bytes) that the op cannot do without: each input read once, each output written once, in float32.

    A symmetric product counts half: P and S have k(k+1)/2 entries to be computed.
    """
    flops = numbers = 0
    for m, n in shapes:
        products, factors, block = 2 * m * n * (m + n), m * m + n * n, m * n
        if op == "qv":
            flops += products
            numbers += factors + 2 * block
        elif op == "refresh":
            flops += m * m * (m + 1) + n * n * (n + 1)
            numbers += 2 * factors
        elif op == "theta_step":  # reads g, m and θ, writes m and θ
            flops += products + 10 * block
            numbers += factors + 5 * block
        elif op == "lambda_step":  # Pw, wS, M, N, R(N+Nᵀ), (M+Mᵀ)L; Adam reads and writes λ and two moments
            flops += 2 * products + 2 * (m**3 + n**3) + 12 * factors
            numbers += 3 * block + factors + 6 * factors
        else:
            raise ValueError(f"op should be qv, refresh, theta_step or lambda_step but is: {op!r}")
    return flops, 4 * numbers
