"""The tokenizer: a CLIPTokenizer whose merges make every word of the grammar one token."""

import json
import tempfile
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from fastory.builtin.captions import TOKEN_LIMIT, vocabulary


def build_tokenizer() -> CLIPTokenizer:
    """Byte-level BPE on the vocabulary; a strange word falls into known pieces and letters, never into nothing.

    Start and end are the last two ids; the end also pads, as in Stable Diffusion's tokenizer.
    """
    stock = CLIPTokenizer().backend_tokenizer
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.normalizer, trained.pre_tokenizer = stock.normalizer, stock.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=10_000,
        min_frequency=1,
        end_of_word_suffix="</w>",
        initial_alphabet=alphabet,
        show_progress=False,
    )
    trained.train_from_iterator([" ".join(sorted(vocabulary()))], trainer)
    bpe = json.loads(trained.to_str())["model"]
    ids = dict(sorted(bpe["vocab"].items(), key=lambda item: item[1]))
    for token in (*alphabet, *(letter + "</w>" for letter in alphabet), "<|startoftext|>", "<|endoftext|>"):
        ids.setdefault(token, len(ids))
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        files[0].write_text(json.dumps(ids), encoding="utf-8")
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in bpe["merges"]]
        files[1].write_text("\n".join(["#version: 0.2", *merges]), encoding="utf-8")
        return CLIPTokenizer(vocab=str(files[0]), merges=str(files[1]), model_max_length=TOKEN_LIMIT)
