"""The files of a checkpoint folder: configuration, byte-level tokenizer, safetensors weights."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tiny_model.llama import TinyLlamaConfig

PAD_ID, BOS_ID, EOS_ID, FIRST_BYTE_ID = 0, 1, 2, 3
SPECIAL_TOKENS = {"<|pad|>": PAD_ID, "<|bos|>": BOS_ID, "<|eos|>": EOS_ID}
WEIGHTS = "model.safetensors"
_DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32}


def save(folder: Path, config: TinyLlamaConfig, weights: Mapping[str, torch.Tensor]) -> None:
    """Write everything that an engine needs to serve ``weights``, which are stored as bf16."""
    folder.mkdir(parents=True, exist_ok=True)
    stored = {name: tensor.detach().cpu().bfloat16() for name, tensor in weights.items()}
    write_safetensors(folder / WEIGHTS, stored)
    special_ids = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID}
    write_json(folder / "config.json", _model_config(config) | special_ids)
    write_json(folder / "generation_config.json", special_ids)
    write_json(folder / "tokenizer.json", _tokenizer())
    write_json(folder / "tokenizer_config.json", _tokenizer_config(config))


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_safetensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write bf16 or fp32 tensors: length of the header (8 bytes, little-endian), header, data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    chunks = []
    offset = 0
    names = {dtype: name for name, dtype in _DTYPES.items()}
    for name, tensor in sorted(tensors.items()):
        data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        header[name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + len(data)],
        }
        chunks.append(data)
        offset += len(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format asks that the data start aligned
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(chunks))


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Return the bf16 and fp32 tensors of a file by name."""
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    return {
        name: torch.frombuffer(
            content,
            dtype=_DTYPES[entry["dtype"]],
            count=math.prod(entry["shape"]),
            offset=start + entry["data_offsets"][0],
        ).view(entry["shape"])
        for name, entry in header.items()
    }


def byte_symbols() -> list[str]:
    """Return the printable character that stands for each byte in a byte-level vocabulary.

    Printable Latin-1 bytes stand for themselves; the others take the characters from U+0100 on,
    in order of the byte.
    """
    itself = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    stand_ins = iter(range(0x100, 0x200))
    return [chr(byte if byte in itself else next(stand_ins)) for byte in range(256)]


def _model_config(config: TinyLlamaConfig) -> dict[str, Any]:
    return asdict(config) | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }


def _tokenizer() -> dict[str, Any]:
    """Return ``tokenizer.json``: one token per UTF-8 byte, id ``byte + 3``, ``<|bos|>`` first."""
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    bos = {"SpecialToken": {"id": "<|bos|>", "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    bytes_vocab = {symbol: FIRST_BYTE_ID + byte for byte, symbol in enumerate(byte_symbols())}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": token_id, "content": token, **flags, "special": True}
            for token, token_id in SPECIAL_TOKENS.items()
        ],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, first],
            "pair": [bos, first, second],
            "special_tokens": {
                "<|bos|>": {"id": "<|bos|>", "ids": [BOS_ID], "tokens": ["<|bos|>"]}
            },
        },
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": SPECIAL_TOKENS | bytes_vocab,
            "merges": [],
        },
    }


def _tokenizer_config(config: TinyLlamaConfig) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<|pad|>",
        "bos_token": "<|bos|>",
        "eos_token": "<|eos|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.max_position_embeddings,
    }
