"""Prompts that are longer than a text encoder takes: what is beyond its length has no effect on the image."""

LOOKED_AT = 10_000                                       # prompts of a run, which may have millions
_TOGETHER = 1000


def count_cut(tokenizer, prompts, most):
    """How many of the prompts have more than `most` tokens."""
    cut = 0
    for start in range(0, len(prompts), _TOGETHER):
        ids = tokenizer(prompts[start:start + _TOGETHER], truncation=False, return_attention_mask=False).input_ids
        cut += sum(len(row) > most for row in ids)
    return cut


def cut_note(tokenizer, prompts, most, total=None):
    """A line for the user if any of the prompts have more than `most` tokens, or None. `total`: how many prompts there
    are, if these are drawn from more."""
    cut = count_cut(tokenizer, prompts, most)
    if not cut:
        return None
    of = f"{len(prompts):,} prompts" if total in (None, len(prompts)) else (
        f"{len(prompts):,} prompts drawn from {total:,}")
    return (f"{cut:,} of {of} {'is' if cut == 1 else 'are'} longer than the {most} tokens that the text encoder takes; "
            "the rest of the text is cut off")
