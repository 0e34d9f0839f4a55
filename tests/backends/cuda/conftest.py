"""What the CUDA backend's tests have, on the CPU and on a device."""

from __future__ import annotations

import pytest

from fishleg_fast.backends.cuda import plans, products, state

pytest.register_assert_rewrite("cuda_cases", "cuda_cases_lambda", "cuda_cases_polar")


@pytest.fixture
def poisoned_workspaces(monkeypatch: pytest.MonkeyPatch, no_grad: None) -> None:
    """As an optimizer calls its ops, on workspaces that hold nothing but NaN before each op."""
    plan_of = state.plan_of

    def poisoned(*arguments: object) -> plans.Plan:
        plan = plan_of(*arguments)  # type: ignore[arg-type]
        plan.workspace.fill_(255)
        return plan

    monkeypatch.setattr(products, "plan_of", poisoned)
