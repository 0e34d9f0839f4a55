"""The Triton backend in Triton's interpreter (TRITON_INTERPRET=1), for a process that has no conftest.py."""

from __future__ import annotations

from triton.runtime import interpreter

from fishleg_fast.kernels import backend

_patch = interpreter._patch_lang_tensor


def _patched(tensor, scope):
    """NumPy 2.4 refuses int(array of one element), which Triton 3.6's interpreter asks for the ends of ranges."""
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patched
OPS = backend
