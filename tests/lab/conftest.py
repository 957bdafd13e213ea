import pytest


@pytest.fixture
def own_cache(tmp_path_factory, monkeypatch):
    """The `datasets` library keeps its copies with the test's files, not with the user's."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()
