import pytest

from dspnet_fast.capability import executes
from dspnet_fast.ops import cpp


@pytest.fixture(autouse=True)
def skip_providers_excluded_by_a_mark(request: pytest.FixtureRequest) -> None:
    """Skip parameters with the mark not_by(providers)."""
    mark = request.node.get_closest_marker("not_by")
    provider = request.node.callspec.params.get("provider") if mark is not None else None
    if mark is not None and provider in mark.args:
        pytest.skip(f"not a case of the provider {provider}")


@pytest.fixture(params=["DEFAULT", "AVX2", "AVX512"])
def capability(request: pytest.FixtureRequest) -> str:
    """A CPU capability. The test is skipped if the CPU cannot execute it or the compiled library lacks its build."""
    loaded, reason = cpp.load()
    if not executes(request.param):
        reason = f"this CPU cannot execute {request.param}"
    elif loaded and request.param not in cpp.builds():
        reason = f"this library was built for {', '.join(cpp.builds())} alone: DSPNET_CAPABILITY=all builds all"
    if reason:
        pytest.skip(reason)
    return request.param
