"""Independent truth for the tests: dense matrices by torch.kron, explicit Jacobians row by row.

Nothing here calls the library's formulas. Row-major vec throughout: vec(X u Y) = (X ⊗ Yᵀ) vec(u).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fishleg_fast.algebra.structures.base import Structure
from fishleg_fast.algebra.structures.diagkron import DiagKron
from fishleg_fast.algebra.structures.diagonal import Diagonal
from fishleg_fast.algebra.structures.kron import Kron
from fishleg_fast.algebra.structures.sumkron import SumKron


def full(factor: Tensor, k: int) -> Tensor:
    """A factor of any layout, dense (k,), (k, k) or (c, b, b), as a dense (k, k) matrix. Differentiable."""
    if factor.ndim == 1:
        return torch.diag(factor)
    if factor.ndim == 2:
        return factor
    return torch.block_diag(*factor)[:k, :k]


def laid_out(matrix: Tensor, like: Tensor) -> Tensor:
    """The entries of a dense (k, k) matrix that a factor laid out as ``like`` holds; zero padding."""
    if like.ndim == 1:
        return matrix.diagonal().clone()
    if like.ndim == 2:
        return matrix.clone()
    c, b, _ = like.shape
    k = matrix.shape[0]
    padded = matrix.new_zeros(c * b, c * b)
    padded[:k, :k] = matrix
    return torch.stack([padded[i * b : (i + 1) * b, i * b : (i + 1) * b] for i in range(c)])


def dense_q(structure: Structure, aux: dict[str, Tensor]) -> Tensor:
    """Q(λ) (m·n, m·n) from λ = ``aux``, written down from the structure's definition. Differentiable."""
    if isinstance(structure, Diagonal):
        return torch.diag(aux["d"].reshape(-1) ** 2)
    m, n = structure.shape
    if isinstance(structure, SumKron):
        pairs = [(full(aux[f"R{k}"], m), full(aux[f"L{k}"], n)) for k in range(1, structure.terms + 1)]
        return sum(torch.kron(R.T @ R, L @ L.T) for R, L in pairs)
    R, L = full(aux["R"], m), full(aux["L"], n)
    ones = torch.ones(m * n, dtype=R.dtype)
    A = aux["A"].reshape(-1) if "A" in aux else ones
    if isinstance(structure, DiagKron):
        root = torch.kron(R, L.T.contiguous())
        return A[:, None] * (root.T @ ((aux["B"].reshape(-1) ** 2)[:, None] * root)) * A
    assert isinstance(structure, Kron)
    return A[:, None] * torch.kron(R.T @ R, L @ L.T) * A


def randomise(structure: Structure, seed: int = 0) -> None:
    """Random λ of order one. Padding of block-diagonal factors stays uncoupled, as every start leaves it."""
    generator = torch.Generator().manual_seed(seed)
    for name, t in structure.fishleg_aux.items():
        t.copy_(torch.randn(t.shape, generator=generator, dtype=torch.float64))
        if t.ndim == 3 and name[0] in "RL":
            k = structure.shape[0] if name[0] == "R" else structure.shape[1]
            t.copy_(laid_out(full(t, k), t))


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def relative(got: Tensor, want: Tensor) -> float:
    """‖got − want‖/‖want‖ in float64; the absolute norm where want is zero."""
    assert got.shape == want.shape, (got.shape, want.shape)
    want = want.double()
    error, size = (got.double() - want).norm().item(), want.norm().item()
    return error / size if size else error


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def split_like(vector: Tensor, like: list[Tensor]) -> list[Tensor]:
    pieces = vector.split([t.numel() for t in like])
    return [p.reshape(t.shape).to(t.dtype) for p, t in zip(pieces, like, strict=True)]


def jacobian(model: nn.Module, x: Tensor) -> Tensor:
    """∂ vec(model(x)) / ∂ vec(parameters): (outputs, parameters), one backward pass a row.

    Each parameter once. No functional_call: torch's loses the weights of a module that has two names.
    """
    params = list(model.parameters())
    options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    return torch.stack([flat(torch.autograd.grad(f, params, **options)) for f in model(x).reshape(-1)])


def output_fisher(kind: str, outputs: Tensor, sigma: float = 1.0) -> Tensor:
    """The textbook Fisher matrix of the mean nll over vec(outputs). Classes: "categorical" dim 1; "lm" -1."""
    batch = outputs.shape[0]
    if kind == "gaussian":
        return torch.eye(outputs.numel(), dtype=outputs.dtype) / (sigma**2 * batch)
    if kind == "bernoulli":
        p = 1 / (1 + torch.exp(-outputs.reshape(-1)))
        return torch.diag(p * (1 - p)) / batch
    dim = 1 if kind == "categorical" else -1
    index = torch.arange(outputs.numel()).reshape(outputs.shape).movedim(dim, -1).flatten(0, -2)
    H = torch.zeros(outputs.numel(), outputs.numel(), dtype=outputs.dtype)
    for row in index:  # each position's classes
        e = torch.exp(outputs.reshape(-1)[row])
        p = e / e.sum()
        H[row[:, None], row] = (torch.diag(p) - torch.outer(p, p)) / len(index)
    return H


def explicit_fisher(model: nn.Module, x: Tensor, kind: str, sigma: float = 1.0) -> Tensor:
    """Jᵀ H_out J over the model's parameters, each once."""
    J = jacobian(model, x)
    return J.T @ output_fisher(kind, model(x).detach(), sigma) @ J
