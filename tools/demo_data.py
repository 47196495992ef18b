"""Tokenizer and token files of the demonstration model, made once from its corpus."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from demo_corpus import Corpus, Document, build_corpus
from demo_overlap import window_hashes, without_runs_of
from safetensors.numpy import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 2048
MAX_POSITIONS = 2048
END_OF_TEXT, TURN_START, TURN_END = SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] "
    "+ '<|im_end|>' + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TOKENIZER_CHARS_PER_DOMAIN = 2_000_000
HELD_OUT_SEQUENCES, HELD_OUT_LENGTH = 16, 256
CALIBRATION_SEQUENCES, CALIBRATION_LENGTH = 128, 512


@dataclass
class TokenData:
    """Token streams to train on, one per domain, and the versions of the packages they came from."""

    streams: dict[str, np.ndarray]
    sources: dict[str, str]


def train_tokenizer(corpus: Corpus, seed: int, more: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """A byte-level BPE of exactly ``VOCABULARY`` tokens, split as Qwen2 splits, from training text only. ``more``:
    special tokens that a converter looks for, beside the usual ones."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[*SPECIAL_TOKENS, *more],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts: list[str] = []
    for domain in corpus.domains:
        taken = 0
        for document in _shuffled(corpus.documents(domain, held_out=False), seed):
            if taken > TOKENIZER_CHARS_PER_DOMAIN:
                break
            texts.append(document.text)
            taken += len(document.text)
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != VOCABULARY:
        raise ValueError(f"the tokenizer has {tokenizer.get_vocab_size()} tokens, not {VOCABULARY}")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[TURN_START, *more],
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def _shuffled(documents: list[Document], seed: int) -> list[Document]:
    ordered = list(documents)
    random.Random(seed).shuffle(ordered)
    return ordered


def _stream(tokenizer: PreTrainedTokenizerFast, documents: list[Document], seed: int) -> np.ndarray:
    """All documents as one array of tokens in a seeded order, each closed by the end-of-text token."""
    end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    texts = [document.text for document in _shuffled(documents, seed)]
    pieces = [[*encoding.ids, end] for encoding in tokenizer.backend_tokenizer.encode_batch_fast(texts)]
    return np.concatenate([np.array(piece, dtype=np.int16) for piece in pieces])


def _spread_rows(stream: np.ndarray, count: int, length: int) -> np.ndarray:
    """``count`` rows of ``length`` tokens taken at even distances over the stream."""
    available = len(stream) // length
    if available < count:
        raise ValueError(f"only {available} sequences of {length} tokens where {count} are needed")
    starts = np.linspace(0, available - 1, count).astype(int) * length
    return np.stack([stream[start : start + length] for start in starts])


def write_sequences(path: Path, rows: dict[str, np.ndarray]) -> None:
    """One file of token sequences: ``input_ids``, the ``domain`` of each row, and the domain names."""
    domains = np.concatenate([np.full(len(part), index) for index, part in enumerate(rows.values())])
    tensors = {
        "input_ids": np.concatenate(list(rows.values())).astype(np.int32),
        "domain": domains.astype(np.int32),
    }
    save_file(tensors, path, metadata={"domains": json.dumps(list(rows))})


def prepare(
    out: Path, work: Path, seed: int, say: Callable[[str], None] = print, special_tokens: tuple[str, ...] = ()
) -> TokenData:
    """Write the tokenizer, held-out and calibration files to ``out``; keep the training streams in ``work``."""
    streams_path, sources_path = work / "streams.npz", work / "sources.json"
    if streams_path.exists() and sources_path.exists():
        with np.load(streams_path) as stored:
            return TokenData(dict(stored), json.loads(sources_path.read_text()))
    corpus = build_corpus(say)
    tokenizer = train_tokenizer(corpus, seed, special_tokens)
    say(f"tokenizer: {len(tokenizer)} tokens")
    end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    held_out = {}
    for domain in corpus.domains:
        unseen = _stream(tokenizer, corpus.documents(domain, held_out=True), seed)
        held_out[domain] = _spread_rows(unseen, HELD_OUT_SEQUENCES, HELD_OUT_LENGTH)
    hashes = window_hashes(np.concatenate(list(held_out.values())))
    streams, calibration = {}, {}
    share = -(-CALIBRATION_SEQUENCES // len(corpus.domains))
    for domain in corpus.domains:
        whole = _stream(tokenizer, corpus.documents(domain, held_out=False), seed)
        streams[domain] = without_runs_of(whole, hashes, end)
        left = CALIBRATION_SEQUENCES - sum(map(len, calibration.values()))
        calibration[domain] = _spread_rows(streams[domain], min(share, left), CALIBRATION_LENGTH)
        cut = len(whole) - len(streams[domain])
        say(f"{domain}: {len(streams[domain])} tokens to train on ({cut} cut: they are held out)")
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(out / "model")
    write_sequences(out / "held_out.safetensors", held_out)
    write_sequences(out / "calibration.safetensors", calibration)
    np.savez(streams_path, **streams)
    sources_path.write_text(json.dumps(corpus.sources))
    return TokenData(streams, corpus.sources)
