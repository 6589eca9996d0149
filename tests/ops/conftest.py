import pytest


@pytest.fixture(autouse=True)
def skip_providers_excluded_by_a_mark(request: pytest.FixtureRequest) -> None:
    """Skip parameters with the mark not_by(providers)."""
    mark = request.node.get_closest_marker("not_by")
    provider = request.node.callspec.params.get("provider") if mark is not None else None
    if mark is not None and provider in mark.args:
        pytest.skip(f"not a case of the provider {provider}")
