"""The tokenizer: a CLIPTokenizer whose merges make every word of the grammar one token."""

import json
import tempfile
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer

from fastory.builtin.words import vocabulary
from fastory.builtin.world.captions import TOKEN_LIMIT

Pair = tuple[str, str]


def build_tokenizer() -> CLIPTokenizer:
    """Byte-level BPE on the vocabulary; a strange word falls into known pieces and letters, never into nothing.

    Start and end are the last two ids; the end also pads, as in Stable Diffusion's tokenizer. The same every time.
    """
    merges = learn_merges(vocabulary())
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    tokens = [*letters, *(first + second for first, second in merges), "<|startoftext|>", "<|endoftext|>"]
    ids: dict[str, int] = {}
    for token in tokens:
        ids.setdefault(token, len(ids))
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        files[0].write_text(json.dumps(ids), encoding="utf-8")
        lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
        files[1].write_text("\n".join(lines), encoding="utf-8")
        return CLIPTokenizer(vocab=str(files[0]), merges=str(files[1]), model_max_length=TOKEN_LIMIT)


def learn_merges(words: Iterable[str]) -> list[Pair]:
    """Byte-pair merges until every word is one token: the most frequent pair first, the first by name among equals.

    The trainer of the tokenizers package breaks ties by the order of a hash map, another one in every process: then two
    training processes would read the same caption differently.
    """
    return _merges_of([[*word[:-1], word[-1] + "</w>"] for word in sorted(words)])


def grown_tokenizer(tokenizer: CLIPTokenizer) -> CLIPTokenizer:
    """The tokenizer with every word of the grammar whole: new tokens get ids behind its own, which stay as they are.

    New merges come after all old ones, so that a word it has whole is still the same token.
    """
    strange = sorted(word for word in vocabulary() if len(tokenizer.tokenize(word)) > 1)
    merges = _merges_of([tokenizer.tokenize(word) for word in strange])
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        file = Path(folder, "tokenizer.json")
        content = json.loads(file.read_text(encoding="utf-8"))
        ids = content["model"]["vocab"]
        for first, second in merges:
            ids.setdefault(first + second, len(ids))
        content["model"]["merges"] += [list(pair) for pair in merges]
        file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def _merges_of(tokens: list[list[str]]) -> list[Pair]:
    merges: list[Pair] = []
    while counts := Counter(pair for word in tokens for pair in pairwise(word)):
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        tokens = [_merged(word, best) for word in tokens]
    return merges


def _merged(word: list[str], pair: Pair) -> list[str]:
    """The pieces of a word with every occurrence of `pair` joined."""
    out: list[str] = []
    for token in word:
        if out and (out[-1], token) == pair:
            out[-1] += token
        else:
            out.append(token)
    return out
