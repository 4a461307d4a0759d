"""The attention backends of a draft model, which SGLang makes by name and not through its table."""

from __future__ import annotations

from typing import Any

from fi_backend import Workspace
from fi_backend.errors import UnsupportedError
from fi_backend.integrations.sglang.factory import create_backend, refusal
from fi_backend.integrations.sglang.metadata import DraftStep

__all__ = ["MultiStepDraftBackend", "create_decode", "create_extend"]


def create_decode(factory: Any) -> MultiStepDraftBackend:
    """Make the backends of a draft model's decode steps for SGLang's DraftBackendFactory.

    Raises:
        UnsupportedError: see MultiStepDraftBackend.
    """
    return MultiStepDraftBackend(
        factory.draft_model_runner, factory.topk, factory.speculative_num_steps
    )


def create_extend(factory: Any) -> Any:
    """Make the backend with which a draft model takes in accepted tokens.

    Raises:
        UnsupportedError: we cannot serve the model.
    """
    return create_backend(factory.draft_model_runner)


class MultiStepDraftBackend:
    """The backends of the steps in which a draft model decodes, one after the other.

    Args:
        model_runner: the draft model's ModelRunner.
        topk: branches of each request's tree of drafts.
        num_steps: speculative steps; the last one needs no attention.

    Raises:
        UnsupportedError: branches would share pages, or we cannot serve the model.
    """

    needs_cpu_seq_lens = False

    def __init__(self, model_runner: Any, topk: int, num_steps: int) -> None:
        from fi_backend.integrations.sglang.backend import FIAttnBackend

        if topk > 1 and model_runner.page_size > 1:
            raise UnsupportedError(
                f"fi_backend: the branches of a draft tree need pages of one token; got "
                f"--speculative-eagle-topk {topk} and --page-size {model_runner.page_size}. Start "
                f"with --page-size 1 or --speculative-draft-attention-backend triton"
            )
        reason = refusal(model_runner)
        if reason is not None:
            raise UnsupportedError(f"fi_backend: {reason}")
        self._topk = topk
        # The steps follow one another, so they share their scratch memory.
        workspace = Workspace(model_runner.device)
        self.attn_backends = [
            FIAttnBackend(
                model_runner, workspace=workspace, draft_step=DraftStep(index, topk, num_steps)
            )
            for index in range(num_steps - 1)
        ]

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Plan all steps, which run eagerly."""
        batch = self._as_decode(forward_batch)
        for backend in self.attn_backends:
            backend.init_forward_metadata(batch)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Reserve what the graphs of all steps refer to."""
        for backend in self.attn_backends:
            backend.init_cuda_graph_state(max_bs * self._topk, max_num_tokens)

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Plan all steps of a graph, before its capture and before each of its replays."""
        batch = self._as_decode(forward_batch)
        for backend in self.attn_backends:
            backend.init_forward_metadata_out_graph(batch, in_capture)

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        """Nothing is planned inside a graph; see CapturedSteps.load()."""

    def _as_decode(self, forward_batch: Any) -> Any:
        from sglang.srt.model_executor.forward_batch_info import ForwardMode, build_inner_fb_view

        return build_inner_fb_view(
            forward_batch, bs=forward_batch.batch_size, forward_mode=ForwardMode.DECODE
        )
