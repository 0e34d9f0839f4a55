"""What the CUDA backend's tests have, on the CPU and on a device."""

from __future__ import annotations

import pytest

from fishleg_fast.backends.cuda import prepare

pytest.register_assert_rewrite("cuda_cases", "cuda_cases_lambda", "cuda_cases_polar")


@pytest.fixture
def poisoned_workspaces(monkeypatch: pytest.MonkeyPatch, no_grad: None) -> None:
    """As an optimizer calls its ops, on workspaces that hold nothing but NaN before each op."""
    for name in ("_recent", "_exact"):
        find = getattr(prepare, name)

        def poisoned(*arguments: object, find=find) -> prepare.Prepared | None:
            prepared = find(*arguments)
            if prepared is not None:
                prepared.plan.workspace.fill_(255)
            return prepared

        monkeypatch.setattr(prepare, name, poisoned)
