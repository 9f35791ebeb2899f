"""United and extended tokenizers: transformers reads them back, and they cut text as the first."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import AutoTokenizer

from evomerge.errors import ConfigError
from evomerge.merge import tokenizer as ours
from evomerge.merge.tokenizer import (
    files_of,
    read_tokenizer,
    united,
    with_tokens,
    write_tokenizer,
)

SPECIALS = ("<s>", "</s>", "<unk>")


def save(folder: Path, tokenizer: Tokenizer, **settings: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def numbered(*pieces: str) -> dict[str, int]:
    return {piece: index for index, piece in enumerate(dict.fromkeys([*SPECIALS, *pieces]))}


def byte_level(folder: Path, letters: str, merges: str, *, bos: bool = False) -> Path:
    """BPE with GPT-2's spelling; `merges` such as "a b, ab c"."""
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges.split(", "))]
    vocabulary = numbered(*letters, *(left + right for left, right in pairs))
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIALS))
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    return save(folder, tokenizer)


def sentencepiece(folder: Path, letters: str, merges: str) -> Path:
    """BPE with Llama's spelling: ▁ for a blank, unknown characters as bytes."""
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges.split(", "))]
    in_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = numbered(*in_bytes, "▁", *letters, *(left + right for left, right in pairs))
    model = models.BPE(vocabulary, pairs, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(list(SPECIALS))
    return save(folder, tokenizer, unk_token="<unk>")


def unigram(folder: Path, **pieces: float) -> Path:
    scores = [*((token, 0.0) for token in SPECIALS), ("▁", -2.0), *pieces.items()]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(list(SPECIALS))
    return save(folder, tokenizer, unk_token="<unk>")


def word_level(folder: Path, words: str) -> Path:
    tokenizer = Tokenizer(models.WordLevel(numbered(*words.split()), unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(SPECIALS))
    return save(folder, tokenizer, unk_token="<unk>")


def word_piece(folder: Path, pieces: str) -> Path:
    tokenizer = Tokenizer(models.WordPiece(numbered(*pieces.split()), unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(list(SPECIALS))
    return save(folder, tokenizer, unk_token="<unk>")


def read(folder: Path, rows: int | None = None) -> ours.Tokenizer:
    return read_tokenizer(folder.name, folder, rows)


def loaded(own: ours.Tokenizer, folder: Path) -> Any:
    """What transformers reads of `own`, written to `folder`."""
    folder.mkdir()
    write_tokenizer(folder, own.folder, files_of(own) if own.edited else None, None)
    return AutoTokenizer.from_pretrained(folder)


KINDS: dict[str, tuple[Callable[[Path], Path], Callable[[Path], Path], str, str, list[str]]] = {
    # how to make both, a text of the first's pieces, one of the second's, and the latter's pieces
    "byte-level BPE": (
        lambda folder: byte_level(folder, "abcĠ", "a b, ab c"),
        lambda folder: byte_level(folder, "cdeabĠ", "d e, Ġ de, a b"),
        "abc cab",
        "ab de",
        ["ab", "Ġde"],
    ),
    "sentencepiece BPE": (
        lambda folder: sentencepiece(folder, "abc", "a b, ▁ ab"),
        lambda folder: sentencepiece(folder, "deab", "a b, d e, ▁ de"),
        "ab cé",
        "ab de",
        ["▁ab", "▁de"],
    ),
    "Unigram": (
        lambda folder: unigram(folder, a=-3.0, b=-3.0, ab=-4.0),
        lambda folder: unigram(folder, b=-1.0, c=-3.0, d=-3.0, cd=-3.5),
        "ab ba",
        "ab cd",
        ["▁", "ab", "▁", "cd"],
    ),
    "WordLevel": (
        lambda folder: word_level(folder, "one two"),
        lambda folder: word_level(folder, "three two"),
        "two one",
        "three one",
        ["three", "one"],
    ),
    "WordPiece": (
        lambda folder: word_piece(folder, "do ##ing"),
        lambda folder: word_piece(folder, "##ed do go"),
        "doing do",
        "goed doing",
        ["go", "##ed", "do", "##ing"],
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_union_cuts_the_firsts_text_as_the_first_does_and_has_the_others_pieces(
    kind: str, tmp_path: Path
) -> None:
    make_first, make_second, old_text, new_text, pieces = KINDS[kind]
    first, second = make_first(tmp_path / "first"), make_second(tmp_path / "second")
    own, other = read(first), read(second)
    union = united(own, [other])
    tokenizer = loaded(union, tmp_path / "union")
    assert tokenizer.get_vocab() == union.ids
    assert union.ids.keys() == own.ids.keys() | other.ids.keys()
    before = AutoTokenizer.from_pretrained(first)
    assert tokenizer(old_text)["input_ids"] == before(old_text)["input_ids"]
    assert tokenizer.decode(tokenizer(old_text)["input_ids"]) == old_text
    assert tokenizer.tokenize(new_text) == pieces
    assert tokenizer.decode(tokenizer(new_text)["input_ids"]).replace(" ##", "") == new_text


def test_a_union_with_itself_is_itself(tmp_path: Path) -> None:
    own = read(byte_level(tmp_path / "first", "abc", "a b"))
    assert united(own, [read(byte_level(tmp_path / "second", "abc", "a b"))]) is own


def test_the_other_tokenizers_own_special_tokens_stay_special(tmp_path: Path) -> None:
    first = byte_level(tmp_path / "first", "abc", "a b", bos=True)
    second = byte_level(tmp_path / "second", "abc", "a b")
    tokenizer = Tokenizer.from_file(str(second / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.add_tokens([AddedToken("bc", normalized=False)])
    save(second, tokenizer, pad_token="<|end|>")
    union = loaded(united(read(first), [read(second)]), tmp_path / "union")
    # bos comes from the first one's post-processor.
    assert union.tokenize("abc<|end|>", add_special_tokens=True) == ["<s>", "a", "bc", "<|end|>"]
    ids = union("abc<|end|>")["input_ids"]
    assert ids == [0, 3, 8, 7]
    assert union.decode(ids, skip_special_tokens=True) == "abc"
    assert union.pad_token is None


def test_tokens_without_a_row_are_cut_off(tmp_path: Path) -> None:
    folder = byte_level(tmp_path / "first", "abcd", "a b, ab c, c d")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<pad>"])
    save(folder, tokenizer, pad_token="<pad>")
    own = read(folder, 8)
    assert list(own.ids) == [*SPECIALS, "a", "b", "c", "d", "ab"]
    cut = loaded(own, tmp_path / "cut")
    assert cut.get_vocab() == own.ids
    assert cut.pad_token is None
    assert cut.tokenize("abcd") == ["ab", "c", "d"]


def test_special_tokens_that_only_the_configuration_names_count(tmp_path: Path) -> None:
    folder = byte_level(tmp_path / "first", "ab", "a b")
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    own = read(folder)
    assert own.ids["<pad>"] == 6
    assert own.roles["pad_token"] == "<pad>"
    assert "<pad>" not in read(folder, 6).ids


def test_a_tokenizer_that_builds_its_own_pipeline_is_written_as_it_was_read(
    tmp_path: Path,
) -> None:
    folder = sentencepiece(tmp_path / "llama", "abc", "a b, ▁ ab")
    settings = {"tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    before = AutoTokenizer.from_pretrained(folder)
    own = with_tokens(read(folder), ["<|end|>"], [])
    after = loaded(own, tmp_path / "out")
    text = "ab c é\n ab"
    assert after(text)["input_ids"] == before(text)["input_ids"]
    assert after(text + "<|end|>")["input_ids"][-1] == len(before)


def test_tokenizers_of_other_kinds_cannot_be_united(tmp_path: Path) -> None:
    first = read(byte_level(tmp_path / "one", "abc", "a b"))
    others = [
        sentencepiece(tmp_path / "two", "abc", "a b"),
        unigram(tmp_path / "three", a=-1.0),
        word_piece(tmp_path / "four", "a"),
    ]
    for folder, style in zip(
        others, ("sentencepiece-style BPE", "sentencepiece-style Unigram", "WordPiece"), strict=True
    ):
        with pytest.raises(ConfigError, match="cannot be united") as caught:
            united(first, [read(folder)])
        assert "one (byte-level BPE)" in str(caught.value)
        assert f"{folder.name} ({style}" in str(caught.value)
        assert "use 'base' or one of the models" in str(caught.value)


def test_a_broken_or_missing_tokenizer_is_named(tmp_path: Path) -> None:
    folder = byte_level(tmp_path / "broken", "ab", "a b")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match="broken: its tokenizer cannot be read"):
        read(folder)
    with pytest.raises(ConfigError, match="none: has no tokenizer to take"):
        read(tmp_path / "none")


def test_what_is_written_reads_back_with_the_sources_other_settings(tmp_path: Path) -> None:
    folder = byte_level(tmp_path / "first", "abc", "a b")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    save(folder, tokenizer, model_max_length=77, padding_side="left", chat_template="{{ 1 }}")
    (folder / "special_tokens_map.json").write_text('{"eos_token": "</s>", "sep_token": "<sep>"}')
    own = with_tokens(read(folder, 7), ["<new>"], [])
    assert own.ids["<new>"] == 7
    out = loaded(own, tmp_path / "out")
    assert (out.model_max_length, out.padding_side, out.eos_token) == (77, "left", "</s>")
    assert out.chat_template == "{{ 1 }}"
    assert "sep_token" not in json.loads((tmp_path / "out/special_tokens_map.json").read_text())


def test_a_new_template_replaces_all_that_the_source_has(tmp_path: Path) -> None:
    folder = byte_level(tmp_path / "first", "abc", "a b")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    save(folder, tokenizer, chat_template="old")
    (folder / "chat_template.json").write_text('{"chat_template": "older"}')
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("oldest")
    (tmp_path / "out").mkdir()
    write_tokenizer(tmp_path / "out", folder, None, "{{ 'new' }}")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == "{{ 'new' }}"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert "chat_template" not in json.loads((tmp_path / "out/tokenizer_config.json").read_text())
