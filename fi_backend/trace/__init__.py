"""Kernel traces: JSON definitions of what public calls compute, with references in torch.

``fi-backend trace --output DIR`` writes them for a model; with ``FI_BACKEND_TRACE_DIR`` set, every
call writes its own the first time that its constant axes and dtypes are seen.
"""

from fi_backend.trace.definitions import TEMPLATES, model_definitions, template_of, write
from fi_backend.trace.template import Scalar, Tensor, TraceTemplate

__all__ = [
    "TEMPLATES",
    "Scalar",
    "Tensor",
    "TraceTemplate",
    "model_definitions",
    "template_of",
    "write",
]
