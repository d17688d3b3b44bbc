"""`sidfast prompts`: from captions as people have them to a file of prompts: some of them, each once.

What passes is spooled to a temporary file, and 8 bytes of each prompt stay in memory, so there may be many millions.
"""

import hashlib
import itertools
import tempfile
from array import array
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from sidfast.common.errors import UserError
from sidfast.common.files import check_file, check_writable, replacing, sweep
from sidfast.data.tables import fault_of

_TOGETHER = 1000                                         # prompts, for a tokenizer
_MOST_SEED = 2**63


@dataclass(frozen=True)
class Bounds:
    """How long a prompt may be at least and at most, ends included; None for no bound."""

    min_words: int | None = None
    max_words: int | None = None
    min_characters: int | None = None
    max_characters: int | None = None

    def check(self):
        """Raise UserError for bounds that no prompt keeps."""
        for unit in ("words", "characters"):
            low, high = getattr(self, f"min_{unit}"), getattr(self, f"max_{unit}")
            for name, value in (("min", low), ("max", high)):
                if value is not None and value < 1:
                    raise UserError(f"--{name}-{unit} must be at least 1, not {value}")
            if None not in (low, high) and low > high:
                raise UserError(f"--min-{unit} ({low}) must be at most --max-{unit} ({high})")

    def fault(self, prompt):
        """Which bound a prompt breaks, in words, or None."""
        for unit, length in (("words", len(prompt.split())), ("characters", len(prompt))):
            low, high = getattr(self, f"min_{unit}"), getattr(self, f"max_{unit}")
            if low is not None and length < low:
                return f"fewer than {low:,} {unit}"
            if high is not None and length > high:
                return f"more than {high:,} {unit}"
        return None


class TokenLimit:
    """The most tokens that a prompt may have, start and end included, by a transformers tokenizer."""

    def __init__(self, tokenizer, most):
        self._tokenizer, self.most = tokenizer, most

    def keeps(self, prompts):
        """For each of a list of prompts, whether it is short enough."""
        ids = self._tokenizer(prompts, truncation=False, return_attention_mask=False, verbose=False).input_ids
        return [len(row) <= self.most for row in ids]


@dataclass
class Selected:
    """What became of the captions: how many were read, dropped for each reason, and written."""

    read: int
    dropped: Counter
    written: int

    def text(self, out):
        """For the user: lines."""
        lines = [f"{out}: {self.written:,} prompts of {self.read:,} captions"]
        return "\n".join(lines + [f"  dropped: {count:,} {reason}" for reason, count in self.dropped.items() if count])


def select_prompts(captions, out, bounds=None, tokens=None, sample=None, seed=0):
    """Write the prompts of an iterable of captions to `out`, one a line, in their order, and return a Selected.

    A prompt is written once: those that differ only in white space or case are the same. `bounds`: Bounds; `tokens`: a
    TokenLimit; `sample`: how many to draw at random, by `seed`, of those that are left. Raises UserError for an `out`
    that cannot be written, before a caption is read, and where no prompt is left; `out` then stays as it was.
    """
    out = _check(Path(out), bounds, sample, seed)
    dropped = Counter()
    try:
        with tempfile.TemporaryFile(dir=out.parent) as spool:
            read, digests = _spool(captions, spool, bounds or Bounds(), tokens, dropped)
            chosen = _choose(digests, sample, seed, dropped)
            if not chosen.any():
                reasons = ", ".join(f"{count:,} {reason}" for reason, count in dropped.items())
                raise UserError(f"--out {out}: none of the {read:,} captions is left ({reasons or 'there are none'})")
            spool.seek(0)
            with replacing(out) as file:
                file.writelines(itertools.compress(spool, chosen.tobytes()))
    except OSError as error:                             # (of sources it is a UserError already)
        raise UserError(f"--out {out}: cannot be written ({error.strerror})") from None
    return Selected(read, dropped, int(chosen.sum()))


def _check(out, bounds, sample, seed):
    check_file(out, ".txt")
    check_writable(out.parent, f"--out {out}")
    sweep(out.parent)
    if bounds:
        bounds.check()
    if sample is not None and sample < 1:
        raise UserError(f"--sample must be at least 1, not {sample}")
    if not 0 <= seed < _MOST_SEED:
        raise UserError(f"--seed must be at least 0 and below 2^63, not {seed}")
    return out


def _spool(captions, spool, bounds, tokens, dropped):
    """Write what passes the bounds to a file. Returns (the number of captions, a digest of each that passed [N])."""
    digests, read = array("Q"), 0
    rows = iter(tqdm(captions, "captions", unit="", mininterval=2, disable=None))
    while batch := list(itertools.islice(rows, _TOGETHER)):
        read += len(batch)
        prompts = []
        for prompt in batch:
            reason = _fault(prompt, bounds)
            if reason is None:
                prompts.append(prompt)
            else:
                dropped[reason] += 1
        if tokens and prompts:
            kept = list(itertools.compress(prompts, tokens.keeps(prompts)))
            dropped[f"more than {tokens.most} tokens"] += len(prompts) - len(kept)
            prompts = kept
        for prompt in prompts:
            digests.append(_digest(prompt))
        spool.writelines(prompt.encode() + b"\n" for prompt in prompts)
    return read, np.frombuffer(digests, np.uint64)


def _fault(prompt, bounds):
    """Why a caption is dropped by itself, or None."""
    if not prompt:
        return "without text"
    return "with broken text" if fault_of(prompt) else bounds.fault(prompt)


def _digest(prompt):
    """64 bits of a prompt, the same for those that differ in white space or case alone."""
    same = " ".join(prompt.casefold().split()).encode()
    return int.from_bytes(hashlib.blake2b(same, digest_size=8).digest(), "little")


def _choose(digests, sample, seed, dropped):
    """Which of the prompts are written [N], bool: the first of each digest, and of those a random sample."""
    first = np.sort(np.unique(digests, return_index=True)[1])
    dropped["repeated"] += len(digests) - len(first)
    if sample is not None and sample < len(first):
        dropped["not drawn"] += len(first) - sample
        first = np.random.default_rng(seed).choice(first, sample, replace=False, shuffle=False)
    chosen = np.zeros(len(digests), bool)
    chosen[first] = True
    return chosen
