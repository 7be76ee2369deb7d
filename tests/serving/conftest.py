"""Shared by the tests in vLLM's environment."""

import os

os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",  # the engine in this process; workers, if several, not
    VLLM_LOGGING_LEVEL="ERROR",
)
