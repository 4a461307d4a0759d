"""Custom attention variants, as the templates of the attention kernels take them."""

from __future__ import annotations

__all__ = ["Variant", "name_suffix", "parameters"]

# The C++ type of a variant and the text that defines it; None for the built-in attention.
Variant = tuple[str, str] | None


def parameters(variant: Variant) -> dict[str, str]:
    """Return the template parameters of a variant."""
    type_name, definition = variant or ("fi::NoVariant", "")
    return {"variant_type": type_name, "variant_definition": definition}


def name_suffix(variant: Variant) -> str:
    """Return what a variant adds to the names of modules."""
    return "" if variant is None else "_" + variant[0].rpartition(":")[2]
