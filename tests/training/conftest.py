import pytest

from tests.training.runs import config, quiet_run, write_start


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """A start model and data."""
    return write_start(tmp_path_factory.mktemp("training"))


@pytest.fixture(scope="session")
def reference(root, tmp_path_factory):
    """The folder of a run that was never interrupted."""
    out = tmp_path_factory.mktemp("reference") / "out"
    quiet_run(config(root, out))
    return out
