"""Tiny tokenizers of the kinds that llama.cpp knows, trained on a few lines of text."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

TEXT = (
    "The quick brown fox jumps over the lazy dog. Don't panic, it's 1234 o'clock!",
    "こんにちは世界。これは日本語のテストです。東京 東京都 です ます",
    "hello hello world, the merge of models; we merge models, they're merged\n\nagain",
) * 3
SPECIAL_TOKENS = ["<pad>", "<s>", "</s>", "<unk>", "<|user|>"]
CHAT_TEMPLATE = "{% for m in messages %}<|user|>{{ m['content'] }}</s>{% endfor %}"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level(
    directory: Path,
    words: pre_tokenizers.PreTokenizer | None = None,
    *,
    ignore_merges: bool = False,
) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as GPT-2's; `words` cuts into words in another way before the bytes."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    bytes_of_words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words is None)
    steps = [bytes_of_words] if words is None else [words, bytes_of_words]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=390,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return _save(tokenizer, directory, unk_token=None)


def sentencepiece(directory: Path, *, adds_space: bool = True) -> PreTrainedTokenizerFast:
    """BPE with byte fallback, as SentencePiece's of Llama 2; without the first space Gemma's."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    spaces = [normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), *spaces] if adds_space else spaces
    )
    trainer = trainers.BpeTrainer(
        vocab_size=405,
        special_tokens=[*SPECIAL_TOKENS, *BYTES],
        show_progress=False,
        max_token_length=8,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer = _with_plain_bytes(tokenizer)
    strip = [decoders.Strip(" ", 1, 0)] if adds_space else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_tokens([AddedToken("東京タワー", normalized=False)])
    return _save(tokenizer, directory, unk_token="<unk>")


def unigram(directory: Path) -> PreTrainedTokenizerFast:
    """Unigram without byte fallback, as T5's."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.UnigramTrainer(
        vocab_size=160, special_tokens=SPECIAL_TOKENS, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return _save(tokenizer, directory, unk_token="<unk>")


def _with_plain_bytes(tokenizer: Tokenizer) -> Tokenizer:
    """Bytes as pieces of the vocabulary only, not as special tokens to be found in a text."""
    described = json.loads(tokenizer.to_str())
    described["added_tokens"] = [
        added for added in described["added_tokens"] if added["content"] not in BYTES
    ]
    return Tokenizer.from_str(json.dumps(described))


def _save(tokenizer: Tokenizer, directory: Path, unk_token: str | None) -> PreTrainedTokenizerFast:
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token=unk_token,
        chat_template=CHAT_TEMPLATE,
    )
    wrapped.save_pretrained(directory)
    return wrapped
