#!/usr/bin/env python3
"""Train the small byte-level Llama of ``models/fi-tiny`` on a Python standard library.

Needs PyTorch only, on a CUDA device or a CPU. Writes the weights, the tokenizer, the configuration,
``training.json`` (every figure of the run) and the model card into ``--out``.
"""

from __future__ import annotations

import argparse
import math
import platform
import sysconfig
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tiny_model import card, checkpoint, corpus, measure
from tiny_model.llama import TinyLlama, TinyLlamaConfig
from torch.nn import functional as F

WARMUP_FRACTION = 0.03
FINAL_LEARNING_RATE = 0.02  # of the peak
NEWLINE_ID = checkpoint.FIRST_BYTE_ID + ord("\n")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=Path("models/fi-tiny"))
    parser.add_argument("--stdlib", type=Path, default=Path(sysconfig.get_path("stdlib")))
    parser.add_argument(
        "--python", default=platform.python_version(), help="version of --stdlib, for the card"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=12000)
    parser.add_argument("--batch-size", type=int, default=32, help="sequences in a step")
    parser.add_argument("--context", type=int, default=2048, help="tokens in a sequence")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-every", type=int, default=500)
    parser.add_argument("--compile", action="store_true", help="train through torch.compile")
    return parser.parse_args()


def batches(
    stream: torch.Tensor, *, num_steps: int, batch_size: int, context: int, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (tokens, targets), int64 ``[batch_size, context]``, on the device of ``stream``.

    A sequence is a beginning of sequence followed by text from the start of a random line, so that
    a prompt looks to the model as its training data did.
    """
    line_starts = F.pad((stream == NEWLINE_ID).nonzero().flatten() + 1, (1, 0))
    window = torch.arange(context, device=stream.device)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_steps):
        positions = torch.randint(stream.numel() - context, (batch_size,), generator=generator)
        lines = torch.bucketize(positions.to(stream.device), line_starts, right=True) - 1
        targets = stream[line_starts[lines].unsqueeze(1) + window].long()
        yield F.pad(targets[:, :-1], (1, 0), value=checkpoint.BOS_ID), targets


def learning_rate_scale(progress: float) -> float:
    """Return the share of the peak rate at ``progress`` in [0, 1]: linear rise, cosine fall."""
    if progress < WARMUP_FRACTION:
        return progress / WARMUP_FRACTION
    falling = (progress - WARMUP_FRACTION) / (1 - WARMUP_FRACTION)
    return FINAL_LEARNING_RATE + (1 - FINAL_LEARNING_RATE) * (1 + math.cos(math.pi * falling)) / 2


def train(model: TinyLlama, stream: torch.Tensor, args: argparse.Namespace) -> None:
    """Fit ``model`` to ``stream`` (int16 token ids, on the model's device) in place."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    norms = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        fused=stream.is_cuda,
    )
    forward = torch.compile(model) if args.compile else model
    mixed = torch.autocast("cuda", torch.bfloat16) if stream.is_cuda else nullcontext()
    data = batches(
        stream,
        num_steps=args.steps,
        batch_size=args.batch_size,
        context=args.context,
        seed=args.seed,
    )
    start = time.monotonic()
    for step, (tokens, targets) in enumerate(data, start=1):
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * learning_rate_scale(step / args.steps)
        with mixed:
            logits = forward(tokens)
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % args.log_every == 0:
            bits = loss.item() / math.log(2)
            elapsed = time.monotonic() - start
            print(f"step {step}: {bits:.3f} bits per token, {elapsed:.1f} s", flush=True)


def main() -> None:
    args = parse_args()
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    config = TinyLlamaConfig()
    train_texts, held_out_texts = corpus.split(args.stdlib)
    train_stream = corpus.token_stream(train_texts)
    held_out_stream = corpus.token_stream(held_out_texts)
    print(f"{len(train_texts)} documents, {train_stream.numel()} tokens to train on", flush=True)

    model = TinyLlama(config).to(args.device)
    start = time.monotonic()
    train(model, train_stream.to(args.device, torch.int16), args)
    seconds = time.monotonic() - start
    checkpoint.save(args.out, config, model.state_dict())

    # Measure what was stored, not the fp32 weights that it was rounded from.
    torch.set_float32_matmul_precision("highest")
    stored = checkpoint.read_safetensors(args.out / checkpoint.WEIGHTS)
    model.load_state_dict(stored)

    # As much training text as was held out, taken evenly, for comparison.
    windows = train_stream[: train_stream.numel() // args.context * args.context]
    windows = windows.view(-1, args.context)[:: train_stream.numel() // held_out_stream.numel()]

    def bits_per_byte(stream: torch.Tensor) -> float:
        bits = measure.bits_per_byte(
            model, stream, context=args.context, batch_size=args.batch_size, device=args.device
        )
        return round(bits, 4)

    on_gpu = torch.device(args.device).type == "cuda"
    figures: dict[str, Any] = {
        "held_out_bpb": bits_per_byte(held_out_stream),
        "train_bpb": bits_per_byte(windows.flatten()),
        "held_out_bytes": sum(len(text.encode()) for text in held_out_texts),
        "held_out_documents": len(held_out_texts),
        "held_out_one_in": corpus.HELD_OUT_ONE_IN,
        "train_bytes": sum(len(text.encode()) for text in train_texts),
        "train_documents": len(train_texts),
        "python": args.python,
        "steps": args.steps,
        "batch_size": args.batch_size,
        "context": args.context,
        "learning_rate": args.learning_rate,
        "seed": args.seed,
        "seconds": round(seconds, 1),
        "device": torch.cuda.get_device_name() if on_gpu else "CPU",
        "torch": torch.__version__,
        "num_parameters": sum(tensor.numel() for tensor in stored.values()),
        "matrix_stds": measure.matrix_stds(stored),
    }
    checkpoint.write_json(args.out / "training.json", figures)
    (args.out / "README.md").write_text(card.render(asdict(config), figures), encoding="utf-8")
    print(f"held-out bits per byte: {figures['held_out_bpb']}, {seconds:.0f} s of training")


if __name__ == "__main__":
    main()
