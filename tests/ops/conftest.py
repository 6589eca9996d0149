import pytest


@pytest.fixture(autouse=True)
def skip_what_a_provider_does_not_serve(request: pytest.FixtureRequest) -> None:
    """For parameters with the mark not_by(provider)."""
    mark = request.node.get_closest_marker("not_by")
    if mark is not None and request.node.callspec.params.get("provider") in mark.args:
        pytest.skip(f"{mark.args[0]} does not serve it")
