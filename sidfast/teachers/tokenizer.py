"""A CLIP tokenizer for the shapes world: byte-pair encoding whose merges build whole words."""

import json
import tempfile
from pathlib import Path
from typing import Any

from transformers import CLIPTokenizer

from sidfast.data import shapes

MAX_TOKENS = 24                                          # the longest caption takes 22
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
_CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789,.-"
_WORD_END = "</w>"


def words() -> list[str]:
    """Every word that a caption can hold, in a fixed order."""
    links = " ".join(link for pair in shapes.RELATIONS.values() for link in pair).split()
    every = ["a", "on", "background", *links, *shapes.SIZES, *shapes.COLORS, *shapes.SHAPES, *shapes.BACKGROUNDS]
    return list(dict.fromkeys(every))


def build_tokenizer() -> Any:
    """The tokenizer of the shapes world: a word of its captions is one token, other words are spelt out."""
    vocabulary = dict.fromkeys([*_CHARACTERS, *(c + _WORD_END for c in _CHARACTERS)])
    merges = []
    for word in words():
        pieces = [*word[:-1], word[-1] + _WORD_END]
        while len(pieces) > 1:
            pair, pieces = tuple(pieces[-2:]), [*pieces[:-2], pieces[-2] + pieces[-1]]
            vocabulary[pieces[-1]] = None
            if pair not in merges:
                merges.append(pair)
    tokens = [*vocabulary, BOS, EOS]                     # the end token last, as in CLIP: its id is never 2
    with tempfile.TemporaryDirectory() as folder:
        vocab_file, merges_file = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocab_file.write_text(json.dumps({token: i for i, token in enumerate(tokens)}), encoding="utf-8")
        lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
        merges_file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return CLIPTokenizer(str(vocab_file), str(merges_file), bos_token=BOS, eos_token=EOS, pad_token=EOS,
                             unk_token=EOS, model_max_length=MAX_TOKENS)
