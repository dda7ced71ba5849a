"""`fastory words`: what the built-in model can be told."""

from __future__ import annotations

from fastory.cli.reporting import reported, say


def words() -> None:
    """Print the words that the built-in model knows, and sentences it draws; other models take any English."""
    with reported():
        from tokenizers import Tokenizer

        from fastory.builtin import WEIGHTS
        from fastory.builtin.words import known_to, vocabulary_lines

        shipped = Tokenizer.from_file(str(WEIGHTS / "tokenizer" / "tokenizer.json"))
        shipped.no_padding()
        known = known_to(lambda word: shipped.encode(word, add_special_tokens=False).tokens)
        say("\n".join(vocabulary_lines(known)))
