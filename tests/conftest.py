"""Settings that must hold before any test module is imported."""

import contextlib
import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads would not survive the harness's forks
os.environ["HF_HUB_OFFLINE"] = "1"  # no test needs the network: a missing model is an error at once, not after retries

import pytest
import torch

# Without a GPU, Triton's kernels run in its interpreter. It reads this when it is imported, which any library may do;
# processes that tests start do not inherit it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    with contextlib.suppress(ModuleNotFoundError):  # there is none but for Linux
        import triton  # noqa: F401
    del os.environ["TRITON_INTERPRET"]

# Forked ranks hang if their parent ever ran a multi-threaded operation.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The release of the long run that nothing happens to: path → contents."""
    import runs
    from test_survival import consolidate, long_config

    folder = tmp_path_factory.mktemp("uninterrupted")
    code, output = runs.finish(runs.launch(long_config(folder), 4))
    assert code == 0, output[-3000:]
    return consolidate(folder / "run", folder / "release")
