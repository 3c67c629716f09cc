import jaxtyping
import pytest


@pytest.fixture
def as_users_run_it(monkeypatch) -> None:
    """Without the types that every other test run checks: what a wrong one leads to is ours."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
