"""The model card, filled from the figures of the training run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_CARD = """\
---
license: apache-2.0
language: [en]
pipeline_tag: text-generation
---

# fi-tiny

A byte-level language model of {num_parameters:,} parameters ({weights_mb:.2f} MB, bf16) for demos
and tests of `fi_backend`: small enough for git, trained enough that its text can be read and that
greedy decoding notices a wrong attention. It is good for nothing else: it writes what looks like
Python, and greedy text soon repeats itself.

- **Architecture**: `LlamaForCausalLM`, {layers} layers, hidden size {hidden}, MLP {mlp},
  {q_heads} query heads and {kv_heads} KV heads of {head_dim}, tied embeddings.
- **Vocabulary**: {vocab} tokens: `<|pad|>` 0, `<|bos|>` 1, `<|eos|>` 2, then byte of UTF-8 plus 3.
- **Context**: {context} tokens, as trained. The tokenizer starts a prompt with `<|bos|>`.
- **Training text**: the standard library of Python {python}, {train_bytes:,} bytes: every `*.py`
  (docstrings and tests included) but the tables of `encodings`, and the help topics of
  `pydoc_data` as plain text. No site-packages.
- **Training**: {steps} steps of {batch_size} x {context} tokens, AdamW, peak learning rate
  {learning_rate}, seed {seed}, {seconds:.0f} s on one {device}.
- **Held-out bits per byte**: **{held_out_bpb:.3f}** (on training text {train_bpb:.3f}).
- **Weights**: standard deviation {std_min:.3f} to {std_max:.3f} per matrix.

**How it was measured.** {held_out_bytes:,} bytes of the same library were kept from training: the
documents whose path hashes (SHA-256) to 0 modulo {held_out_one_in}. They are cut into windows of
{context} tokens that do not overlap; each byte is predicted in fp32, with the weights as stored,
from `<|bos|>` and the earlier bytes of its window. The figure on training text is taken the same
way from as many windows, evenly spaced. `training.json` holds all figures of the run.

**Files.** `prompts.json` is a list of 32 prompts that do not occur in the training text.

**Train it again** (needs only PyTorch; takes minutes on a CUDA device, days on a CPU):

```
python scripts/train_tiny_model.py --out models/fi-tiny
```

The text follows the running Python unless `--stdlib` names another standard library. Seeds fix the
order of the data and the initial weights; GPU kernels may still round differently from run to run.

The weights are published under Apache-2.0. The training text is Copyright Python Software
Foundation, under the PSF License.
"""


def render(config: Mapping[str, Any], figures: Mapping[str, Any]) -> str:
    """Return the text of ``README.md``; ``config`` is ``config.json``, ``figures`` the run's."""
    stds = figures["matrix_stds"].values()
    return _CARD.format(
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        mlp=config["intermediate_size"],
        q_heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        vocab=config["vocab_size"],
        std_min=min(stds),
        std_max=max(stds),
        weights_mb=figures["num_parameters"] * 2 / 1e6,
        **figures,
    )
