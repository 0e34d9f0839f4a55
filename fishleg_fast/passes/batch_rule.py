"""What of a model's inputs runs over the batch, so that a part of a batch can be had. It is never guessed.

A tensor, array or sequence runs over the batch where two calls of different batch sizes prove it, or where everything
in the inputs has the size that the outputs have. And then a pass over a part has to show outputs of a part. Otherwise,
and where it makes a difference whether one of several is cut, the batch stays whole.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .attempts import Attempts
from .inputs import Inputs, Shapes, is_array, output_shapes, output_tensors, shape_of

MOST = 32  # samples of a part to look at, where it is not known how many will be wanted


@dataclass(frozen=True)
class Leaf:
    """What a tensor, an array, a sequence or anything else in the inputs looks like; ``rows``: None if it has none."""

    kind: str
    shape: tuple[int, ...] | None
    rows: int | None

    @classmethod
    def of(cls, x: Any) -> Leaf:
        if isinstance(x, Tensor) and not x.is_nested:
            return cls("tensor", shape_of(x), x.shape[0] if x.ndim and x.layout is torch.strided else None)
        if is_array(x):
            return cls("array", tuple(x.shape), x.shape[0] if x.shape else None)
        if isinstance(x, (list, tuple)) and not isinstance(x, PackedSequence):
            return cls("sequence", (len(x),), len(x))
        return cls(type(x).__qualname__, None, None)


@dataclass(frozen=True)
class Call:
    """How many samples a call of the model had, None if that is not known, and what it was given."""

    samples: int | None
    leaves: tuple[Leaf, ...]

    @classmethod
    def of(cls, inputs: Inputs) -> Call:
        lead = next((shape[0] for shape in inputs.outputs or () if shape), None)
        if lead is not None:
            leaves = tuple(map(Leaf.of, inputs.leaves(lead)))
            if any(leaf.rows == lead for leaf in leaves):
                return cls(lead, leaves)
        leaves = tuple(map(Leaf.of, inputs.leaves()))
        sizes = {leaf.rows for leaf in leaves if leaf.rows is not None and leaf.kind != "sequence"}
        if inputs.outputs is not None:  # positions of a sample may be outputs by themselves
            sizes = {size for size in sizes if size > 1 and lead and lead % size == 0}
        if len(sizes) != 1:
            return cls(None, leaves)
        (size,) = sizes
        return cls(size, tuple(map(Leaf.of, inputs.leaves(size))))

    @classmethod
    def again(cls, state: tuple[Any, ...] | None) -> Call | None:
        """From the ``astuple`` of one, or of none."""
        return None if state is None else cls(state[0], tuple(Leaf(*leaf) for leaf in state[1]))

    def structure(self) -> Hashable:
        """What two calls have in common that differ in the batch alone."""
        return tuple((leaf.kind, len(leaf.shape or ())) for leaf in self.leaves)

    def over_batch(self, earlier: Call | None) -> tuple[int, ...]:
        """Which of its leaves run over the batch, () where that cannot be told."""
        there = [k for k, leaf in enumerate(self.leaves) if leaf.rows == self.samples and leaf.rows is not None]
        fixed = {k for k, leaf in enumerate(self.leaves) if leaf.shape == () or leaf.kind == "sequence"}
        fixed.difference_update(there)
        if self.proved_by(earlier):
            assert earlier is not None
            there = [k for k in there if earlier.leaves[k].rows == earlier.samples]
            pairs = enumerate(zip(self.leaves, earlier.leaves, strict=True))
            fixed |= {k for k, (now, then) in pairs if now.shape is not None and now.shape == then.shape}
        return tuple(there) if len(fixed.union(there)) == len(self.leaves) else ()

    def proved_by(self, earlier: Call | None) -> bool:
        """Whether that had another batch size, and what this has."""
        return (
            earlier is not None
            and None not in (earlier.samples, self.samples)
            and earlier.samples != self.samples
            and earlier.structure() == self.structure()
        )


def shrunk(whole: Shapes, part: Shapes, samples: int, rows: int) -> bool:
    """Whether outputs of ``rows`` samples have the shapes that the outputs of all let expect."""
    if len(whole) != len(part):
        return False
    lead = next((k for k, shape in enumerate(whole) if shape), None)
    for k, (before, after) in enumerate(zip(whole, part, strict=True)):
        if len(before) != len(after):
            return False
        if not before:
            continue
        scaled = before[0] % samples == 0 and after[0] == before[0] // samples * rows
        if not scaled and (k == lead or after[0] != before[0]):
            return False
        # Sequences may be padded to the longest of the part. What had the batch's size by chance keeps it.
        if any(n > m or (n < m and m == samples) for m, n in zip(before[1:], after[1:], strict=True)):
            return False
    return lead is not None


class _Reads(TorchDispatchMode):
    """Watches whether any operation is given a tensor. Of what else a model is given nothing is known: it may be."""

    def __init__(self, watched: Any) -> None:
        super().__init__()
        self.watched, self.any = watched, not isinstance(watched, Tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        self.any = self.any or any(x is self.watched for x in tree_leaves((args, kwargs)))
        return func(*args, **kwargs)


class BatchRule:
    """Tells what of a batch runs over its samples; ``run(inputs)`` gives the outputs of a pass, and may write to them.

    ``may_cut``: False keeps every batch whole. ``fatal``: an index that is out of range ends the process, as on a GPU;
    on a CPU it is an error, and says that the batch is to stay whole.
    """

    def __init__(self, run: Callable[[Inputs], Any], may_cut: bool, fatal: bool = False) -> None:
        self.may_cut, self._run, self._fatal = may_cut, run, fatal
        self.agreed: Callable[[Sequence[bool]], list[bool]] | None = None  # which of these hold on all ranks
        self._earlier: dict[Hashable, Call] = {}  # by structure: the latest call before one of another size
        self._latest: dict[Hashable, Call] = {}
        self._right: set[Hashable] = set()
        self._wrong: dict[Hashable, Attempts] = {}

    def state(self) -> tuple[Any, ...]:
        """What is known from earlier batches, plain data."""
        calls = (tuple(map(astuple, known.values())) for known in (self._earlier, self._latest))
        wrong = tuple((key, attempts.state()) for key, attempts in self._wrong.items())
        return *calls, sorted(self._right, key=repr), wrong

    def load(self, state: tuple[Any, ...]) -> None:
        """Know that again."""
        earlier, latest, right, wrong = state
        for known, calls in ((self._earlier, earlier), (self._latest, latest)):
            known.clear()
            known.update({call.structure(): call for call in map(Call.again, calls) if call is not None})
        self._right = set(right)
        self._wrong = {key: Attempts().load(attempts) for key, attempts in wrong}

    def resolved(self, inputs: Inputs, earlier: Call | None, rows: int | None) -> Inputs:
        """``inputs``, which know their ``samples`` and what runs ``over_batch``; ``rows``: how many will be wanted."""
        call = Call.of(inputs)
        inputs = replace(inputs, samples=call.samples, over_batch=())
        earlier = self._note(call, earlier)
        samples, chosen = call.samples, call.over_batch(earlier)
        leaves = () if samples is None else inputs.leaves(samples)
        cuttable = self.may_cut and samples is not None and samples >= 2 and len(leaves) == len(call.leaves)
        if not cuttable or not chosen or samples is None:
            self.abstain()
            return inputs
        inputs_in_parts = replace(inputs, over_batch=tuple(leaves[k] for k in chosen))
        key = call.structure(), chosen, len(inputs.outputs or ())
        if self.agreed is not None:
            return self._agree(inputs, inputs_in_parts, key, rows, call.proved_by(earlier))
        if key not in self._right:
            attempts = self._wrong.setdefault(key, Attempts())
            if not attempts.due():
                return inputs
            rows = min(max(rows or min(samples // 4, MOST), 2), samples - 1)
            if not self._holds(inputs_in_parts, samples, rows, call.proved_by(earlier)):
                attempts.failed()
                return inputs
            self._right.add(key)
        return inputs_in_parts

    def abstain(self) -> None:
        """There is no batch here that might be cut; those of other ranks are not either then."""
        if self.agreed is not None and self.may_cut:  # which is so on all ranks or on none
            self.agreed((False, False, False))

    def _agree(self, whole: Inputs, cut: Inputs, key: Hashable, rows: int | None, proven: bool) -> Inputs:
        """Cut where that holds on all ranks, which take the same passes: one, or none."""
        assert self.agreed is not None and cut.samples is not None
        known, attempts = key in self._right, self._wrong.setdefault(key, Attempts())
        tells = bool(cut.outputs) and (proven or len(cut.over_batch) == 1)
        possible, known, due = self.agreed((known or tells, known, known or attempts.due()))
        if known or not (possible and due):
            return cut if known else whole
        rows = min(max(rows or min(cut.samples // 4, MOST), 2), cut.samples - 1)
        (holds,) = self.agreed((self._holds(cut, cut.samples, rows, True),))
        if holds:
            self._right.add(key)
        else:
            attempts.failed()
        return cut if holds else whole

    def _note(self, call: Call, earlier: Call | None) -> Call | None:
        """A call of another size and the same structure, if there was any."""
        structure = call.structure()
        for other in (earlier, self._latest.get(structure)):
            if other is not None and call.proved_by(other):
                self._earlier[structure] = other
        self._latest[structure] = call
        found = self._earlier.get(structure)
        return found if call.proved_by(found) else None

    def _holds(self, inputs: Inputs, samples: int, rows: int, proven: bool) -> bool:
        """Whether passes over a part show that its outputs are those of a part, and that all of it has to be cut."""
        if self._fatal and _may_index(inputs, samples, rows):
            return False
        try:
            whole = inputs.outputs or output_shapes(self._run(inputs.copied()))
            outputs = self._run(inputs.rows(0, rows).copied())
        except torch.OutOfMemoryError:
            raise
        except Exception:  # whatever the model raises: it takes whole batches only
            return False
        if not shrunk(whole, output_shapes(outputs), samples, rows):
            return False
        others = [] if proven or len(inputs.over_batch) == 1 else range(len(inputs.over_batch))
        return all(self._needed(inputs, k, whole, output_tensors(outputs), rows) for k in others)

    def _needed(self, inputs: Inputs, left_out: int, whole: Shapes, outputs: Sequence[Tensor], rows: int) -> bool:
        """Whether a pass over a part fails, or makes no difference to outputs of that part, where one leaf is whole."""
        rest = tuple(x for k, x in enumerate(inputs.over_batch) if k != left_out)
        try:
            found = self._run(replace(inputs, over_batch=rest).rows(0, rows).copied())
        except torch.OutOfMemoryError:
            raise
        except Exception:
            return True
        assert inputs.samples is not None
        if not shrunk(whole, output_shapes(found), inputs.samples, rows):
            return True
        return _same(outputs, output_tensors(found)) and self._can_tell(inputs, left_out, outputs, rows)

    def _can_tell(self, inputs: Inputs, k: int, outputs: Sequence[Tensor], rows: int) -> bool:
        """Whether outputs of a part tell anything of its k-th leaf, or have nothing to do with it. A last layer of
        zeros, to begin with, hides what is before it.
        """
        assert inputs.samples is not None
        part, last = inputs.rows(0, rows), inputs.rows(inputs.samples - rows, inputs.samples)
        mixed = part.map(lambda t: t, {id(part.over_batch[k]): (part.over_batch[k], last.over_batch[k])}).copied()
        try:
            with _Reads(mixed.over_batch[k]) as reads:
                found = output_tensors(self._run(mixed))
        except torch.OutOfMemoryError:
            raise
        except Exception:
            return False
        return not reads.any or (len(found) == len(outputs) and not _same(outputs, found))


def _same(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether those of the same shapes are the same."""
    pairs = zip(some, others, strict=True)
    return all(torch.equal(a, b) for a, b in pairs if shape_of(a) == shape_of(b))


def _may_index(inputs: Inputs, samples: int, rows: int) -> bool:
    """Whether something in the inputs may hold indices into what is cut, beyond a part of it."""
    cut = {id(x) for x in inputs.over_batch}
    entries = max((x.numel() for x in inputs.over_batch if isinstance(x, Tensor)), default=samples)
    for leaf in inputs.leaves(samples):
        least, most = _extremes(leaf)
        if id(leaf) in cut:  # tokens and lengths are seldom such numbers
            found = rows <= most < samples
        else:  # those into several dimensions as one, too
            found = rows <= most < entries or -entries <= least < -rows
        if found:
            return True
    return False


def _extremes(x: Any) -> tuple[int, int]:
    """The least and the greatest whole number in a tensor, an array, or sequences of them and of numbers; or 0."""
    if isinstance(x, Tensor):
        dense = not x.is_nested and x.layout is torch.strided
        whole = dense and not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)
        return (int(x.min()), int(x.max())) if whole and x.numel() else (0, 0)
    if is_array(x):
        return (int(x.min()), int(x.max())) if x.dtype.kind in "iu" and x.size else (0, 0)
    if isinstance(x, int):
        return x, x
    if isinstance(x, (list, tuple)) and not isinstance(x, PackedSequence):
        pairs = [_extremes(item) for item in x]
        return min((least for least, _ in pairs), default=0), max((most for _, most in pairs), default=0)
    return 0, 0
