"""What every test runs under: poisoned memory, a fixed seed, no network, a GPU where the test says so."""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

# Both are read once: the hub's switch when huggingface_hub is imported, and the workspace of cuBLAS, which
# deterministic mode demands, when CUDA starts.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

from tests.commands import Command, run_command


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Fail GPU tests, which only `-m gpu` selects, where there is no GPU: a skip would look like a pass."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.fail("needs a CUDA device, and torch sees none", pytrace=False)
    if item.get_closest_marker("multi_gpu") and torch.cuda.device_count() < 2:
        pytest.fail("needs two CUDA devices or more", pytrace=False)


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Fill memory that nobody wrote with NaN, or an integer's largest value.

    Deterministic mode does it inside torch: for empty, empty_like, new_empty, empty_strided and resize_,
    on any device, and for calls from C++ too, which patched Python functions would not see.
    """
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def nondeterministic_torch(_poisoned_memory: None) -> None:
    """Let torch choose its usual algorithms, for tests that the library itself repeats bitwise."""
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """The tensors here are so small that threads only wait for one another, for minutes on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    if torch.cuda.is_available():
        torch.manual_seed(0)
    else:  # without the stack traces that torch would keep for devices that may start later
        torch.default_generator.manual_seed(0)


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of the small checkpoints and adapters that real tools wrote."""
    return Path(__file__).parent / "golden"


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device that a test runs on; cuda only with `-m gpu`."""
    return torch.device(request.param)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run `quant-moelora ARGS` in this process."""
    return partial(run_command, monkeypatch, capsys)
