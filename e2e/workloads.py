"""What the throughput run asks of an engine: models, and batches of requests."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from e2e.conftest import FI_TINY, fi_tiny_prompts
from e2e.shapes import make_model, random_prompts

__all__ = ["CPU", "GPU", "Model", "Request", "Workload", "find"]

Request = tuple[list[int], int]  # prompt, and how many tokens to generate
# Room of a GPU engine beside its weights and its cache: activations, CUDA graphs, the context.
_GPU_OVERHEAD = 6 << 30


@dataclass(frozen=True)
class Model:
    """A model, and the arguments of its engines.

    Attributes:
        name: of the model, as rows show it.
        dtype: of weights and activations.
        shape: Llama's config values, for a model of dummy weights; None for a model on disk.
        weight_bytes: what the weights take on a GPU.
        engine: arguments of vllm.LLM.
    """

    name: str
    dtype: str
    shape: dict[str, int] | None = None
    weight_bytes: int = 0
    engine: dict[str, Any] = field(default_factory=dict)

    def folder(self, directory: Path) -> Path:
        """Return the model's folder; one that does not exist is made in `directory`."""
        if self.shape is None:
            return FI_TINY if self.name == "fi-tiny" else make_model(self.name, directory)
        folder = directory / self.name
        folder.mkdir(exist_ok=True)
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "torch_dtype": self.dtype,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "max_position_embeddings": 131072,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **self.shape,
        }
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    def arguments(self, num_engines: int, gpu_bytes: int) -> dict[str, Any]:
        """Arguments of one of `num_engines` engines that share a GPU of `gpu_bytes`, or none."""
        if self.shape is None:
            return self.engine
        share = int(0.95 * gpu_bytes) // num_engines
        cache = share - self.weight_bytes - _GPU_OVERHEAD
        if cache <= 0:
            raise ValueError(
                f"{num_engines} engines of {self.name} do not fit in {gpu_bytes >> 30} GiB; "
                f"choose fewer with --backends"
            )
        return {**self.engine, "kv_cache_memory_bytes": cache}


@dataclass(frozen=True)
class Workload:
    """One batch of requests; rounds of it differ, since prefix caching would remember the last.

    Attributes:
        model: who serves it.
        label: what it is.
        requests: the requests of a round.
        prefixes: prompts whose tokens are in the cache before a round begins, in the order in which
            an engine has seen them, one at a time.
    """

    model: Model
    label: str
    requests: Callable[[int], list[Request]]
    prefixes: Callable[[int], list[list[int]]] | None = None

    @property
    def name(self) -> str:
        """The name used in results."""
        return f"{self.model.name} {self.label}"


def find(name: str) -> Workload:
    """Return the workload of this name."""
    return next(workload for workload in (*CPU, *GPU) if workload.name == name)


def _on_cpu() -> Iterable[Workload]:
    """All 32 prompts of a small model at a time, the same ones every round."""
    engine = {
        "enforce_eager": True,
        "max_model_len": 1024,
        "max_num_seqs": 32,
        "enable_prefix_caching": False,
    }
    for name in ("fi-tiny", "mistral", "gemma2"):
        for dtype in ("float32", "bfloat16"):

            def requests(_: int, name: str = name) -> list[Request]:
                random = random_prompts(32, shortest=8, longest=160)
                prompts = fi_tiny_prompts() if name == "fi-tiny" else random
                return [(prompt, 256) for prompt in prompts]

            yield Workload(Model(name, dtype, engine=engine), f"{dtype} 32 prompts x 256", requests)


_LLAMA = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}
_LLAMA_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
_LLAMA_1B = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
_GPU_ENGINE: dict[str, Any] = {
    "load_format": "dummy",
    "max_model_len": 16384,
    "max_num_seqs": 256,
    "max_num_batched_tokens": 8192,
    "gpu_memory_utilization": 0.02,  # of no effect: kv_cache_memory_bytes says the size
    "disable_log_stats": True,
    "enable_flashinfer_autotune": False,  # of MoE and fp4 kernels, which no model here has
}


def _llama(name: str, shape: dict[str, int], head_dim: int, **engine: Any) -> Model:
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    layer = hidden * head_dim * 2 * (32 + 8) + 3 * hidden * inner
    weights = 2 * (layer * shape["num_hidden_layers"] + 2 * hidden * _LLAMA["vocab_size"])
    dims = {**_LLAMA, **shape, "head_dim": head_dim}
    return Model(name, "bfloat16", dims, weights, {**_GPU_ENGINE, **engine})


def _tokens(source: random.Random, count: int) -> list[int]:
    return [source.randrange(3, _LLAMA["vocab_size"] - 10) for _ in range(count)]


def _random(
    model: Model, kind: str, count: int, prompt: tuple[int, int], output: tuple[int, int]
) -> Workload:
    """`count` requests whose lengths are drawn from ranges, once for all rounds."""
    source = random.Random(kind)
    lengths = [(source.randint(*prompt), source.randint(*output)) for _ in range(count)]

    def requests(round_: int) -> list[Request]:
        source = random.Random(round_)
        return [(_tokens(source, before), after) for before, after in lengths]

    texts = ["-".join(str(end) for end in dict.fromkeys(ends)) for ends in (prompt, output)]
    return Workload(model, f"{kind} {count}x({','.join(texts)})", requests)


def _behind(
    prefixes: Callable[[int], list[list[int]]], count: int, own: int, output: int
) -> Callable[[int], list[Request]]:
    """`count` requests with tokens of their own behind prefixes in the cache, which take turns."""

    def requests(round_: int) -> list[Request]:
        source = random.Random(round_)
        heads = itertools.cycle(prefixes(round_))
        return [(next(heads) + _tokens(source, own), output) for _ in range(count)]

    return requests


def _shared(model: Model, count: int, shared: int, own: int, output: int) -> Workload:
    """`count` requests that begin alike, with tokens that are in the cache."""

    def prefixes(round_: int) -> list[list[int]]:
        return [_tokens(random.Random(f"prefix {round_}"), shared)]

    label = f"shared prefix {count}x({shared}+{own},{output})"
    return Workload(model, label, _behind(prefixes, count, own, output), prefixes)


def _tree(
    model: Model, count: int, roots: tuple[int, int], branches: tuple[int, int], own: int, out: int
) -> Workload:
    """System prompts with few-shot variants below each, all in the cache.

    Args:
        model: who serves it.
        count: requests, in turn of the variants, those of one system prompt one after the other.
        roots: system prompts, and the tokens of each.
        branches: variants of each of them, and their tokens.
        own: tokens of a request behind its variant.
        out: tokens to generate.
    """

    def prefixes(round_: int) -> list[list[int]]:
        source = random.Random(f"prefix {round_}")
        heads = [_tokens(source, roots[1]) for _ in range(roots[0])]
        return [head + _tokens(source, branches[1]) for head in heads for _ in range(branches[0])]

    label = f"prefix tree {count}x({roots[1]}+{branches[1]}+{own},{out}) {roots[0]}x{branches[0]}"
    return Workload(model, label, _behind(prefixes, count, own, out), prefixes)


def _on_gpu() -> Iterable[Workload]:
    """Dummy weights in the shapes of Llama-3.1-8B and Llama-3.2-1B."""
    large = _llama("Llama-3.1-8B bf16", _LLAMA_8B, 128, enable_prefix_caching=False)
    yield _random(large, "short", 256, (1024, 1024), (128, 128))
    yield _random(large, "decode-heavy", 256, (128, 128), (512, 512))
    yield _random(large, "long", 48, (8192, 8192), (128, 128))
    yield _random(large, "mixed", 256, (64, 4096), (16, 512))
    yield _random(large, "single", 1, (512, 512), (256, 256))
    for cache, dtype in (("bf16", "auto"), ("bf16, fp8 KV cache", "fp8")):
        options = {"enable_prefix_caching": True, "kv_cache_dtype": dtype}
        small = _llama(f"Llama-3.2-1B {cache}", _LLAMA_1B, 64, **options)
        yield _random(small, "short", 256, (1024, 1024), (128, 128))
        yield _random(small, "long decode", 128, (8192, 8192), (512, 512))
        yield _random(small, "very long", 8, (15000, 15000), (512, 512))
        yield _shared(small, 256, 12000, 64, 256)
        yield _tree(small, 240, (3, 6000), (4, 3000), 64, 256)
        yield _random(small, "mixed", 256, (64, 4096), (16, 512))


CPU = tuple(_on_cpu())
GPU = tuple(_on_gpu())
