"""What the tests of the Triton kernels in Triton's interpreter have; for these alone is Triton imported."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def interpreter_of_numpy_2_4() -> None:
    """NumPy 2.4 refuses int(array of one element), which Triton 3.6's interpreter asks for the ends of ranges."""
    import triton.runtime.interpreter as interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


@pytest.fixture
def launches() -> Iterator[list[str]]:
    """The names of kernels, as they are launched."""
    from fishleg_fast.kernels.host import launch

    names: list[str] = []
    launch.observers.append(names.append)
    yield names
    launch.observers.remove(names.append)
