"""Tiny models with random weights, one per attention feature, written to disk with no network.

Weights are large enough (standard deviation 0.05 and more) that attention decides tokens: with
vLLM's own dummy weights, an engine whose attention returns zeros produces the same text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

__all__ = ["ENCODER_SHAPES", "PLAIN_SHAPES", "SHAPES", "WINDOW", "make_model", "random_prompts"]

PLAIN_SHAPES = ("llama", "qwen3")
SHAPES = ("gemma2", "mistral", "gemma3", "gptoss", "gemma3n", "bloom")
ENCODER_SHAPES = ("bert",)
_ALL_SHAPES = (*PLAIN_SHAPES, *SHAPES, *ENCODER_SHAPES, "mqa")
WINDOW = 64
_VOCAB = 512
_COMMON: dict[str, Any] = {
    "vocab_size": _VOCAB,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LARGER: dict[str, Any] = {
    **{name: value for name, value in _COMMON.items() if name != "head_dim"},
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
}
# Standard deviation of the weights; gains that are far above 1 amplify every rounding in bf16.
_STD = {"bloom": 0.4, "llama": 0.08, "qwen3": 0.08}
_SLIDING, _FULL = "sliding_attention", "full_attention"


def _config(shape: str) -> Any:
    import transformers

    if shape == "gemma2":  # soft cap, and a window in every other layer
        return transformers.Gemma2Config(
            **_COMMON,
            sliding_window=WINDOW,
            attn_logit_softcapping=20.0,
            query_pre_attn_scalar=64,
        )
    if shape == "mistral":  # a window in every layer, three query heads to a key head
        return transformers.MistralConfig(
            **{**_COMMON, "num_attention_heads": 6},
            sliding_window=WINDOW,
            tie_word_embeddings=False,
        )
    if shape == "gemma3":  # windowed and full layers in groups of their own
        return transformers.Gemma3TextConfig(
            **_COMMON,
            sliding_window=WINDOW,
            layer_types=[_SLIDING, _SLIDING, _FULL, _SLIDING],
            query_pre_attn_scalar=64,
        )
    if shape == "gptoss":  # sinks
        return transformers.GptOssConfig(
            **{**_COMMON, "num_attention_heads": 8},
            num_local_experts=2,
            num_experts_per_tok=1,
            sliding_window=WINDOW,
            layer_types=[_SLIDING, _FULL] * 2,
            tie_word_embeddings=False,
        )
    if shape == "gemma3n":  # the last layers read the cache of earlier ones
        return transformers.Gemma3nTextConfig(
            **{**_COMMON, "intermediate_size": [256] * 6, "num_hidden_layers": 6},
            vocab_size_per_layer_input=_VOCAB,
            hidden_size_per_layer_input=32,
            num_kv_shared_layers=2,
            laurel_rank=8,
            altup_num_inputs=2,
            altup_active_idx=0,
            sliding_window=WINDOW,
            layer_types=[_SLIDING, _FULL] * 3,
            activation_sparsity_pattern=[0.0] * 6,
        )
    if shape == "llama":  # heads of 128, four query heads to a key head
        return transformers.LlamaConfig(**_LARGER, head_dim=128, tie_word_embeddings=False)
    if shape == "mqa":  # one key head
        return transformers.LlamaConfig(
            **{**_LARGER, "num_key_value_heads": 1}, head_dim=64, tie_word_embeddings=False
        )
    if shape == "qwen3":  # normalised queries and keys
        return transformers.Qwen3Config(**_LARGER, head_dim=64, tie_word_embeddings=False)
    if shape == "bloom":  # ALiBi
        return transformers.BloomConfig(
            vocab_size=_VOCAB,
            hidden_size=256,
            n_layer=3,
            n_head=4,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    if shape == "bert":  # an encoder: every token sees every other, there is no cache
        return transformers.BertConfig(
            vocab_size=_VOCAB,
            hidden_size=128,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=256,
            max_position_embeddings=512,
        )
    raise ValueError(f"shape must be one of {_ALL_SHAPES}; got {shape}")


def make_model(shape: str, directory: Path) -> Path:
    """Write the model of `shape` under `directory` unless it is there; return its folder."""
    import transformers

    folder = directory / shape
    if (folder / "model.safetensors").exists():
        return folder
    generator = torch.Generator().manual_seed(0)
    is_encoder = shape in ENCODER_SHAPES
    auto = transformers.AutoModel if is_encoder else transformers.AutoModelForCausalLM
    model = auto.from_config(_config(shape))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "embed" in name:
                weight.normal_(0.0, 0.05, generator=generator)
            elif weight.dim() > 1 or "sinks" in name:
                weight.normal_(0.0, _STD.get(shape, 0.15), generator=generator)
            elif "post_" in name:  # Gemma: let a layer outweigh the token it started from
                weight.fill_(2.0)
    model.save_pretrained(folder)
    return folder


def random_prompts(count: int, *, shortest: int, longest: int, seed: int = 0) -> list[list[int]]:
    """Return `count` token lists of different lengths, without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    step = (longest - shortest) / max(count - 1, 1)
    lengths = [round(shortest + step * index) for index in range(count)]
    return [torch.randint(3, _VOCAB, (n,), generator=generator).tolist() for n in lengths]
