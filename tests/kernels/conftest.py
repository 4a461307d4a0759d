"""The CUDA modules under test, compiled for this GPU and for the oldest one supported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from cuda_modules import all_specs

from fi_backend import jit


@pytest.fixture(scope="module", params=["native", "compute_80"])
def cuda_module(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Return a function that loads a spec builder's module, ``cuda_module(merge_spec, dtypes)``.

    "compute_80" is PTX that the driver compiles for the GPU present: the portable path.
    """
    tag = "" if request.param == "native" else "_portable"
    with pytest.MonkeyPatch.context() as patch:
        if tag:
            patch.setenv("FI_BACKEND_CUDA_ARCH_LIST", request.param)
        jit.build(all_specs(tag))  # one parallel graph, before the first of them is loaded

    def load(spec: Callable[..., jit.KernelSpec], dtypes: tuple[Any, Any]) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            if tag:
                patch.setenv("FI_BACKEND_CUDA_ARCH_LIST", request.param)
            return jit.load(spec(dtypes, tag))

    return load
