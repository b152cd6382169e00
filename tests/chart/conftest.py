"""The chart's tests need helm and its companions: `make test-chart` installs them."""

import pytest

from tests.chart.charts import CI, Objects, render, render_ci


@pytest.fixture(params=CI, ids=lambda path: path.stem)
def installation(request: pytest.FixtureRequest) -> Objects:
    """Each of the ci/ files."""
    return render_ci(request.param)


@pytest.fixture
def trial() -> Objects:
    """Everything inside, the embedded engine."""
    return render()


@pytest.fixture
def gpu() -> Objects:
    return render_ci(next(path for path in CI if path.stem == "gpu-values"))


@pytest.fixture
def outside() -> Objects:
    """PostgreSQL, Redis and object store of somebody else."""
    return render_ci(next(path for path in CI if path.stem == "external-services-values"))
