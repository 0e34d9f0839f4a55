"""What equal structures compute together: the functions of their ``Maths``, over a dimension in front.

One structure by itself takes its own methods, which need no copies put together.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from ..factors import spread
from ..maths import Applications, Aux, no_cache
from ..stacks import together
from .base import LayerStatistics, Structure
from .diagkron import DiagKron
from .diagonal import Diagonal
from .kron import Kron
from .sumkron import SumKron

_CLASSES = {Kron, DiagKron, SumKron, Diagonal}  # nothing in which depends on what is in a tensor


def kind(structure: Structure) -> Hashable | None:
    """Equal where structures can be put together; None where this one cannot."""
    if type(structure) not in _CLASSES:  # others may do as they like
        return None
    layout = tuple((name, t.shape, t.dtype, t.device) for name, t in structure.fishleg_aux.items())
    return id(structure.maths), structure.shape, structure.operand_dtype, layout


def refresh(structures: Sequence[Structure], applications: Applications = None) -> None:
    """Bring all caches up to date, as each structure's ``refresh`` does: in memory that they keep."""
    first = structures[0]
    if first.maths.refresh is no_cache:
        return
    stale = [s for s in structures if s.stale]
    if len(stale) < 2:
        for s in structures:
            s.refresh(applications)
        return
    _refresh(stale, applications)
    for s in structures:
        s.refresh(applications)


@torch.inference_mode(False)  # what is kept is written to later
@torch.no_grad()
def _refresh(structures: Sequence[Structure], applications: Applications) -> None:
    maths = structures[0].maths
    for s in structures:
        s.forget_rounded()
    aux = joined([s._operands() for s in structures])
    found = torch.vmap(lambda aux: maths.refresh(aux, applications, {}, {}))(aux)
    caches: list[Aux] = [{} for _ in structures]
    for name, products in found.items():
        mine = list(products.unbind())
        memory = [s._memory.get(name) for s in structures]
        kept = [old for old in memory if old is not None and old.dtype == products.dtype]
        if len(kept) == len(mine):
            torch._foreach_copy_(kept, mine)
            mine = kept
        for cache, product in zip(caches, mine, strict=True):
            cache[name] = product
    for s, cache in zip(structures, caches, strict=True):
        s.keep(cache, applications)


def product(structures: Sequence[Structure], us: Tensor) -> Tensor:
    """Q u of each u (m, n) of ``us`` (count, m, n), in their dtype."""
    first = structures[0]
    if len(structures) == 1:
        return first.product(us[0])[None]
    cache = _caches(structures)
    # P and S take the place of the factors that they are made of.
    used = [name for name in first._operands() if name.replace("R", "P").replace("L", "S") not in cache]
    aux = joined([{name: s._operands()[name] for name in used} for s in structures])
    return torch.vmap(first.maths.qv)(aux, cache, _narrow(first, us)).to(us.dtype)


def gradients(structures: Sequence[Structure], us: Tensor, ws: Tensor) -> Aux:
    """∂⟨w, Q u⟩/∂λ of each pair of ``us`` and ``ws`` (count, m, n): as λ, with a dimension in front."""
    first = structures[0]
    if len(structures) == 1:
        return {name: grad[None] for name, grad in first.gradients(us[0], ws[0]).items()}
    cache = _caches(structures)
    aux = joined([s._operands() for s in structures])
    return torch.vmap(first.maths.grads)(aux, cache, _narrow(first, us), _narrow(first, ws))


def _caches(structures: Sequence[Structure]) -> Aux:
    """The cached products that all have, up to date."""
    refresh([s for s in structures if s.stale] or structures[:1])
    names = set(structures[0].cache)
    for s in structures:  # what was formed for other uses than the others' is not there for all
        names &= set(s.cache)
    return joined([{n: s.cache[n] for n in names} for s in structures])


def _narrow(structure: Structure, x: Tensor) -> Tensor:
    return x.to(structure.operand_dtype) if structure.keeps_low_rank and structure.operand_dtype else x


def joined(tensors: Sequence[Aux]) -> Aux:
    """Tensors by name of each structure -> of all, with a dimension in front."""
    return {name: together([aux[name] for aux in tensors]) for name in tensors[0]}


def layer_moments(structures: Sequence[Structure], news: Sequence[LayerStatistics]) -> Aux:
    """Second moments from what the layers showed, tensors of the same sizes for all."""
    first, (_, _, terms, positions) = structures[0], news[0]
    make = torch.vmap(lambda a, e: first.layer_moments(a, e, terms, positions))
    return make(together([new.a for new in news]), together([new.e for new in news]))


def mean_eigenvalues(structures: Sequence[Structure], moments: Sequence[Aux], weight: float) -> Tensor:
    """Of the Fisher matrices that moments tell, to be divided by ``weight``: (count,)."""
    first = structures[0]
    if len(structures) == 1:
        return first.mean_eigenvalue(moments[0], weight)[None]
    return torch.vmap(lambda mine: first.mean_eigenvalue(mine, weight))(joined(moments))


@torch.no_grad()
def step_naturally(
    structures: Sequence[Structure], moments: Sequence[Aux], damping: float, rates: Tensor, weights: Tensor
) -> Tensor:
    """λ as by each structure's ``natural_update``, where that is right; whether it is: (count,)."""
    aux = joined([s.fishleg_aux for s in structures])
    found, right = structures[0].natural_update(aux, joined(moments), damping, rates, weights)
    _write(structures, found, right)
    return right


def _write(structures: Sequence[Structure], found: Aux, right: Tensor) -> None:
    """Each structure's share of λ, where it is right."""
    for name, values in found.items():
        olds = [s.fishleg_aux[name] for s in structures]
        torch._foreach_copy_(olds, list(torch.where(spread(right, values), values, together(olds)).unbind()))


@torch.no_grad()
def start_kfac(structures: Sequence[Structure], moments: Sequence[Aux], damping: float, weights: Tensor) -> Tensor:
    """Q₀ as by each structure's ``kfac_start``, where that is right; whether it is: (count,)."""
    start = structures[0].kfac_start(joined(moments), damping, weights)
    if start is None:
        return torch.ones(len(structures), dtype=torch.bool, device=weights.device)
    found, right = start
    _write(structures, found, right)
    return right
