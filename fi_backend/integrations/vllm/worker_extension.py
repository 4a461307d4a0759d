"""Counters over RPC: `--worker-extension-cls` of this module's class.

    vllm serve MODEL --attention-backend flashinfer \
        --worker-extension-cls fi_backend.integrations.vllm.worker_extension.WorkerExtension
    curl -d '{"method": "fi_backend_counters"}' HOST:PORT/collective_rpc   # VLLM_SERVER_DEV_MODE=1
"""

from __future__ import annotations

__all__ = ["WorkerExtension"]


class WorkerExtension:
    """Mixed into vLLM's worker class; also loads where another backend serves."""

    def fi_backend_counters(self) -> dict[str, int]:
        """Return this worker's counters; see counters.read()."""
        from fi_backend.integrations.vllm import counters

        return counters.read()
