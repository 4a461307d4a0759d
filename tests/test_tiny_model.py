"""The committed checkpoint ``models/fi-tiny`` and the script that trained it."""

from __future__ import annotations

import json
import math
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import train_tiny_model  # noqa: E402
from tiny_model import card, checkpoint, corpus, measure  # noqa: E402
from tiny_model.llama import TinyLlama, TinyLlamaConfig  # noqa: E402

MODEL = ROOT / "models" / "fi-tiny"
MAX_BYTES = 8_000_000
MAX_BITS_PER_BYTE = 2.5
TEXT = "def rotate(tile, *, turns=1):\n\t# Grüße, 文字 and 🧭 are bytes too  .\n"


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return checkpoint.read_safetensors(MODEL / checkpoint.WEIGHTS)


@pytest.fixture(scope="module")
def model(weights: dict[str, torch.Tensor]) -> TinyLlama:
    model = TinyLlama(TinyLlamaConfig())
    model.load_state_dict(weights)
    return model.eval()


@pytest.fixture(scope="module")
def documents() -> list[tuple[str, str]]:
    return list(corpus.documents(Path(sysconfig.get_path("stdlib"))))


@pytest.fixture(scope="module")
def held_out(documents: list[tuple[str, str]]) -> torch.Tensor:
    """32 windows of 512 tokens, evenly spaced over what no training run has seen."""
    stream = corpus.token_stream(text for name, text in documents if corpus.is_held_out(name))
    windows = stream[: stream.numel() // 512 * 512].view(-1, 512)
    return windows[:: len(windows) // 32][:32].flatten()


@pytest.fixture(scope="module")
def transformers_model():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    transformers.utils.logging.disable_progress_bar()
    model, report = transformers.LlamaForCausalLM.from_pretrained(
        MODEL, torch_dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return model


def tokens_of(text: str) -> torch.Tensor:
    stream = corpus.token_stream([text])[:-1]
    return torch.cat((torch.tensor([checkpoint.BOS_ID]), stream)).unsqueeze(0)


def test_files_are_complete_and_small():
    sizes = {path.name: path.stat().st_size for path in MODEL.iterdir()}
    assert sizes.keys() == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "prompts.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.json",
    }
    assert sum(sizes.values()) <= MAX_BYTES


def test_card_states_the_figures_of_the_run(weights: dict[str, torch.Tensor]):
    figures = json.loads((MODEL / "training.json").read_text())
    config = json.loads((MODEL / "config.json").read_text())
    assert (MODEL / "README.md").read_text() == card.render(config, figures)
    assert figures["held_out_bpb"] <= MAX_BITS_PER_BYTE
    assert figures["matrix_stds"] == pytest.approx(measure.matrix_stds(weights), abs=2e-4)


def test_files_are_what_the_script_writes(tmp_path: Path, weights: dict[str, torch.Tensor]):
    checkpoint.save(tmp_path, TinyLlamaConfig(), weights)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (MODEL / path.name).read_bytes(), path.name


def test_safetensors_reads_what_we_write(weights: dict[str, torch.Tensor]):
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    loaded = safetensors.load_file(MODEL / checkpoint.WEIGHTS)
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], weight) for name, weight in weights.items())


def test_tokenizer_maps_bytes_both_ways():
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    tokenizer = tokenizers.Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == TinyLlamaConfig.vocab_size
    assert tokenizer.encode(TEXT).ids == tokens_of(TEXT)[0].tolist()
    assert tokenizer.decode(tokenizer.encode(TEXT).ids) == TEXT


def test_transformers_tokenizer_agrees():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    ids = tokenizer(TEXT)["input_ids"]
    assert ids == tokens_of(TEXT)[0].tolist()
    assert tokenizer.decode(ids, skip_special_tokens=True) == TEXT
    special = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id]
    assert special == [checkpoint.PAD_ID, checkpoint.BOS_ID, checkpoint.EOS_ID]


def test_logits_equal_transformers(model: TinyLlama, transformers_model, held_out: torch.Tensor):
    tokens = held_out[:1024].view(2, 512)
    with torch.inference_mode():
        torch.testing.assert_close(
            model(tokens), transformers_model(tokens).logits, atol=1e-3, rtol=1e-4
        )


def test_unseen_text_is_predicted(model: TinyLlama, held_out: torch.Tensor):
    assert measure.bits_per_byte(model, held_out, context=512) <= MAX_BITS_PER_BYTE


def test_prediction_rests_on_attention(weights: dict[str, torch.Tensor], held_out: torch.Tensor):
    """A wrong attention must show: without any, the model is worse than the bound."""
    blind = TinyLlama(TinyLlamaConfig())
    blind.load_state_dict(
        {name: w * 0 if "o_proj" in name else w for name, w in weights.items()},
    )
    assert measure.bits_per_byte(blind, held_out, context=512) > MAX_BITS_PER_BYTE


def test_greedy_text_is_printable(transformers_model):
    prompt = tokens_of("def flatten_playlist(playlist):\n")
    tokens = transformers_model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=64, do_sample=False
    )
    ids = tokens[0, prompt.shape[1] :] - checkpoint.FIRST_BYTE_ID
    text = bytes(ids[ids >= 0].tolist()).decode()
    assert len(text) > 16
    assert all(char.isprintable() or char in "\n\t" for char in text), text


def test_prompts_are_not_from_the_training_text(documents: list[tuple[str, str]]):
    prompts = json.loads((MODEL / "prompts.json").read_text())
    assert len(set(prompts)) == 32
    found = [prompt for prompt in prompts for _, text in documents if prompt in text]
    assert not found


def test_bits_per_byte_of_a_uniform_guess():
    stream = corpus.token_stream(["abc" * 30, "def" * 30])
    bits = measure.bits_per_byte(lambda x: torch.zeros(*x.shape, 259), stream, context=32)
    assert bits == pytest.approx(math.log2(259))
    with pytest.raises(ValueError, match="context must be at most 182"):
        measure.bits_per_byte(lambda x: x, stream, context=1000)


def test_script_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    library, out = tmp_path / "lib", tmp_path / "out"
    (library / "site-packages").mkdir(parents=True)
    (library / "site-packages" / "foreign.py").write_text("never = 'read'\n")
    (library / "latin.py").write_bytes(b"# caf\xe9\n")
    for i in range(100):
        (library / f"module{i}.py").write_text(f"value = {i}\n" * 5)
    names = [name for name, _ in corpus.documents(library)]
    assert names == sorted(f"module{i}.py" for i in range(100))

    options = ["--device", "cpu", "--steps", "2", "--batch-size", "2", "--context", "32"]
    monkeypatch.setattr(
        sys, "argv", ["train_tiny_model.py", "--stdlib", str(library), "--out", str(out), *options]
    )
    train_tiny_model.main()
    figures = json.loads((out / "training.json").read_text())
    assert figures["held_out_documents"] == sum(map(corpus.is_held_out, names)) > 0
    assert figures["train_documents"] + figures["held_out_documents"] == 100
    # Two steps learn little, and a byte costs about log2(259) = 8.0 bits before the first.
    assert figures["held_out_bpb"] < 8.0
