import pytest


@pytest.fixture(autouse=True)
def skip_what_a_provider_does_not_serve(request: pytest.FixtureRequest) -> None:
    """For parameters with the mark not_by(providers)."""
    mark = request.node.get_closest_marker("not_by")
    provider = request.node.callspec.params.get("provider") if mark is not None else None
    if mark is not None and provider in mark.args:
        pytest.skip(f"there is nothing of {provider}'s to test in it")
