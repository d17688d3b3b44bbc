"""The shapes world: captions, splits, drawings, its tokenizer."""

import dataclasses

import pytest
import torch
from helpers_evaluate import ASSETS
from transformers import AutoTokenizer

from sidfast.common.errors import UserError
from sidfast.data import shapes
from sidfast.evaluation.features import tokenize
from sidfast.teachers.tokenizer import MAX_TOKENS, build_tokenizer, words

EXAMPLES = {
    "a large pink cross on a brown background": (0, "single", 0, "brown", [("large", "pink", "cross")]),
    "a small red circle above a large blue square on a white background":
        (1, "column", 0, "white", [("small", "red", "circle"), ("large", "blue", "square")]),
    "a large blue square below a small red circle on a white background":
        (1, "column", 1, "white", [("small", "red", "circle"), ("large", "blue", "square")]),
    "a small cyan triangle right of a large red cross right of a small green circle on a gray background":
        (2, "row", 1, "gray", [("small", "green", "circle"), ("large", "red", "cross"), ("small", "cyan", "triangle")]),
}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def scenes_of(n, split="all", seed=0):
    return shapes.sample_scenes(n, split, seeded(seed))


def fields(scenes):
    """{name: tensor} of Scenes."""
    return {f.name: getattr(scenes, f.name) for f in dataclasses.fields(scenes)}


def arrangements(scenes):
    """What is to be seen, whatever the wording: a set of tuples."""
    columns = [v.reshape(len(scenes), -1) for name, v in fields(scenes).items() if name != "told_from_end"]
    return set(map(tuple, torch.cat(columns, 1).tolist()))


def share(mask):
    return mask.double().mean().item()


# Captions


@pytest.mark.parametrize("text", EXAMPLES, ids=("one", "above", "below", "right of"))
def test_caption_means_what_it_says(text):
    count, layout, told_from_end, background, objects = EXAMPLES[text]
    scene = shapes.parse_captions([text])
    assert (scene.count.item(), scene.told_from_end.item()) == (count, told_from_end)
    assert shapes.LAYOUTS[scene.layout] == layout and shapes.BACKGROUNDS[scene.background] == background
    shown = [(shapes.SIZES[a], shapes.COLORS[b], shapes.SHAPES[c])
             for a, b, c in zip(scene.size[0], scene.color[0], scene.shape[0], strict=True)]
    assert shown[:count + 1] == objects
    assert scene.present.sum() == count + 1
    assert shapes.captions(scene) == [text]


@pytest.mark.parametrize("split", shapes.SPLITS)
def test_captions_parse_back(split):
    scenes = scenes_of(5000, split)
    back = shapes.parse_captions(shapes.captions(scenes))
    for name, value in fields(scenes).items():
        assert torch.equal(fields(back)[name], value), name


@pytest.mark.parametrize("text", [
    "", "a photo of a cat", "a small red circle", "a small red hexagon on a white background",
    "a small red circle on a pink background", "A small red circle on a white background",
    "a red circle on a white background", "a small red circle next to a small red circle on a white background",
    "a small red circle left of a small red circle left of a small red circle left of a small red circle on a white "
    "background",
    "a small red circle and more on a white background",
    "small red circle on a white",
    "a small red circle left of a large blue square above a large blue square on a white background",
    "a small red circle left of a large blue square right of a small red cross on a white background",
], ids=("empty", "cat", "no background", "shape", "background", "capital", "no size", "relation", "four objects",
        "more words", "words missing", "row and column", "both directions"))
def test_not_a_caption(text):
    with pytest.raises(UserError, match="not a caption of the shapes world") as caught:
        shapes.parse_captions(["a large pink cross on a brown background", text])
    assert repr(text) in str(caught.value) and len(str(caught.value).splitlines()) == 1


# Splits


def test_splits_never_overlap():
    train, held_out = scenes_of(60_000, "train"), scenes_of(20_000, "held_out", seed=1)
    assert not arrangements(train) & arrangements(held_out)
    assert not set(shapes.captions(train)) & set(shapes.captions(held_out))
    assert shapes.is_held_out(held_out).all() and not shapes.is_held_out(train).any()


def test_splits_ignore_the_direction_of_the_wording():
    scenes = scenes_of(5000)
    turned = dataclasses.replace(scenes, told_from_end=1 - scenes.told_from_end)
    assert torch.equal(shapes.is_held_out(turned), shapes.is_held_out(scenes))


def test_one_scene_in_eight_is_held_out():
    scenes = scenes_of(100_000)
    held_out = shapes.is_held_out(scenes)
    assert abs(share(held_out) - 1 / 8) < 0.005
    for count in range(shapes.MAX_OBJECTS):              # and of each kind
        assert abs(share(held_out[scenes.count == count]) - 1 / 8) < 0.02, count
    colors = torch.bincount(scenes.color[held_out & (scenes.count == 2), 0], minlength=8)
    assert colors.min() > 0.5 * colors.double().mean()   # of three objects, every colour


def test_single_objects_are_held_out_in_one_color_each():
    """Every combination of the other attributes misses exactly one colour in training."""
    texts = [f"a {size} {color} {shape} on a {background} background" for size in shapes.SIZES
             for shape in shapes.SHAPES for background in shapes.BACKGROUNDS for color in shapes.COLORS]
    held_out = shapes.is_held_out(shapes.parse_captions(texts)).reshape(-1, len(shapes.COLORS))
    assert held_out.sum(1).tolist() == [1] * 32
    assert held_out.sum(0).gt(0).sum() >= 5              # not always the same colour


@pytest.mark.parametrize("split", shapes.SPLITS)
def test_shares(split):
    scenes = scenes_of(100_000, split)

    def shares(values, k):
        return (torch.bincount(values, minlength=k) / len(values)).tolist()

    assert shares(scenes.count, 3) == pytest.approx([0.25, 0.35, 0.40], abs=0.01)
    several = scenes.count > 0
    assert not scenes.layout[~several].any() and not scenes.told_from_end[~several].any()
    assert shares(scenes.layout[several], 3) == pytest.approx([0, 0.5, 0.5], abs=0.01)
    assert shares(scenes.told_from_end[several], 2) == pytest.approx([0.5, 0.5], abs=0.01)
    assert shares(scenes.background, 4) == pytest.approx([0.25] * 4, abs=0.01)
    for name, k in (("size", 2), ("shape", 4)):
        assert shares(getattr(scenes, name)[scenes.present], k) == pytest.approx([1 / k] * k, abs=0.01), name
    for slot in range(1 if split == "held_out" else 0, 3):
        here = scenes.color[scenes.present[:, slot], slot]
        assert shares(here, 8) == pytest.approx([1 / 8] * 8, abs=0.025), slot
    for name in ("size", "color", "shape"):
        assert not getattr(scenes, name)[~scenes.present].any()                          # absent slots hold zeros


def test_scenes_follow_the_generator():
    first, again, other = (fields(scenes_of(50, seed=s)) for s in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_unknown_split():
    with pytest.raises(ValueError, match="'test'"):
        shapes.sample_scenes(1, "test")


def test_concatenating_and_selecting():
    scenes = scenes_of(20)
    parts = shapes.concatenate([scenes[:5], scenes[5:6], scenes[6:]])
    assert all(torch.equal(fields(parts)[name], value) for name, value in fields(scenes).items())
    assert shapes.captions(scenes[torch.tensor([3, 1])]) == [shapes.captions(scenes)[i] for i in (3, 1)]


# Drawings. Of object k: two drawings with the same seed, in which only its colour differs, show how far it covers each
# pixel. A cross of radius r reaches r in all four directions, so its longest row and column are 2 r long.


def recolored(scenes, k, color):
    colors = scenes.color.clone()
    colors[:, k] = shapes.COLORS.index(color)
    return dataclasses.replace(scenes, color=colors)


def reshaped(scenes, shape):
    """The scenes with every object of one shape."""
    return dataclasses.replace(scenes, shape=torch.full_like(scenes.shape, shapes.SHAPES.index(shape)))


def coverage(scenes, k, seed=0):
    """[N, 64, 64]: the share of each pixel that object k covers, from images of it in red and in blue."""
    red, blue = (shapes.draw(recolored(scenes, k, c), seeded(seed)) for c in ("red", "blue"))
    cover = (red - blue)[:, 0] / (2 * (0.86 - 0.15))     # by the red channel
    full = cover.flatten(1).amax(1)[scenes.present[:, k]]
    assert torch.allclose(full, torch.ones_like(full), atol=1e-4)
    return cover


def lengths(scenes, cover):
    """How long crosses are along their scene's layout (a single object's counts as a row), and across, in pixels."""
    width, height = (cover.sum(axis).amax(1) for axis in (2, 1))
    column = scenes.layout == shapes.LAYOUTS.index("column")
    return torch.where(column, height, width), torch.where(column, width, height)


def centres(cover):
    """(x, y) in pixels of what is covered."""
    position = torch.arange(64) + 0.5
    return [(cover.sum(axis) * position).sum(1) / cover.sum((1, 2)) for axis in (1, 2)]


@pytest.fixture(scope="module", params=("anywhere", "extreme"))
def crosses(request):
    """500 scenes of crosses, and the coverage of each slot, [3, N, 64, 64] (zero where a slot is empty).

    In the extreme all that is random about a drawing (positions, radii, tones) lies at an end of its range.
    """
    scenes = reshaped(scenes_of(500), "cross")
    cover = torch.zeros(3, len(scenes), 64, 64)
    rand = torch.rand
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "extreme":
            patch.setattr(torch, "rand", lambda *args, **options: rand(*args, **options).round())
        for k in range(3):
            here = scenes.present[:, k]
            cover[k, here] = coverage(scenes, k)[here]
    return scenes, cover


def test_images():
    scenes = scenes_of(300)
    images = shapes.draw(scenes, seeded(0))
    assert images.shape == (300, 3, 64, 64) and images.dtype == torch.float32
    assert images.min() >= -1 and images.max() <= 1
    assert torch.equal(images, shapes.draw(scenes, seeded(0)))
    assert (images != shapes.draw(scenes, seeded(1))).flatten(1).any(1).all()            # another seed, another image
    assert len({tuple(c) for c in images[:, :, 0, 0].tolist()}) > 290                    # backgrounds vary a little


def test_drawing_shows_the_caption_whatever_the_wording():
    scenes = scenes_of(200)
    turned = dataclasses.replace(scenes, told_from_end=1 - scenes.told_from_end)
    assert torch.equal(shapes.draw(scenes, seeded(0)), shapes.draw(turned, seeded(0)))


def test_objects_lie_inside_the_image(crosses):
    """A cross that the border cut would be shorter in one direction. (The next object may hide some of an object.)"""
    scenes, cover = crosses
    for k in range(3):
        last = scenes.count == k
        along, across = lengths(scenes[last], cover[k, last])
        assert (along - across).abs().max() < 1e-3, k
        others = scenes.count > k
        along, across = lengths(scenes[others], cover[k, others])
        if len(along):
            assert (along - across).max() < 1e-3, k
        for centre in centres(cover[k, scenes.present[:, k]]):
            radius = lengths(scenes, cover[k])[1][scenes.present[:, k]] / 2
            assert (centre - radius).min() >= 0 and (centre + radius).max() <= 64, k


def test_objects_never_overlap_and_keep_their_order(crosses):
    """Of two crosses that just touch, the soft edge of the second hides up to 0.5 x 0.5 pixels of the first."""
    scenes, cover = crosses
    for layout in ("row", "column"):
        for k in (0, 1):
            both = (scenes.layout == shapes.LAYOUTS.index(layout)) & scenes.present[:, k + 1]
            assert both.sum() > 70
            along, across = lengths(scenes[both], cover[k, both])
            assert (across - along).max() <= 0.25, (layout, k)
            axis = {"row": 0, "column": 1}[layout]
            assert (centres(cover[k, both])[axis] < centres(cover[k + 1, both])[axis]).all(), (layout, k)


def test_sizes_are_told_apart(crosses):
    scenes, cover = crosses
    radius = {size: torch.cat([cover[k].sum(2).amax(1)[scenes.present[:, k] & (scenes.size[:, k] == i)] / 2
                               for k in range(3)]) for i, size in enumerate(shapes.SIZES)}
    assert radius["small"].max() + 1 < radius["large"].min()
    assert radius["small"].std() > 0.1 and radius["large"].std() > 0.1                   # and vary a little


@pytest.mark.parametrize("shape", ("circle", "square", "triangle"))
def test_every_shape_stays_in_the_box_of_the_cross(shape):
    """So what holds for crosses, no overlap and no border, holds for all."""
    scenes = scenes_of(200)
    scenes = dataclasses.replace(scenes, count=torch.zeros_like(scenes.count), layout=torch.zeros_like(scenes.layout))
    cross, other = (coverage(reshaped(scenes, s), 0) for s in ("cross", shape))
    for axis in (1, 2):
        inside, box = (v.amax(axis) for v in (other, cross))     # 0.5 where the edge runs through a pixel's centre
        assert not ((inside > 0.501) & (box < 0.5)).any()
    area = other.sum((1, 2)) / (cross.sum(2).amax(1) / 2) ** 2
    assert area.std() < 0.02 and area.min() > 1.5        # of one form, whatever the size; a cross has 2.3 r^2


def test_circles_are_round():
    scenes = shapes.parse_captions(["a large red circle on a black background"] * 50)
    cover = coverage(scenes, 0)
    radius = cover.sum(2).amax(1) / 2
    assert torch.allclose(cover.sum((1, 2)), torch.pi * radius**2, rtol=0.02)


@pytest.mark.parametrize("kind", ("color", "background"))
def test_colors_are_far_apart(kind):
    names = {"color": shapes.COLORS, "background": shapes.BACKGROUNDS}[kind]
    text = {"color": "a large {} square on a white background",
            "background": "a small red circle on a {} background"}[kind]
    images = [shapes.draw(shapes.parse_captions([text.format(name)] * 64), seeded(0)) for name in names]
    if kind == "color":                                  # the pixel that differs most from the corner's
        flat = [i.flatten(2) for i in images]
        index = [(f - f[:, :, :1]).abs().sum(1).argmax(1) for f in flat]
        tones = [f[torch.arange(64), :, i] for f, i in zip(flat, index, strict=True)]
    else:
        tones = [i[:, :, 0, 0] for i in images]
    for a in range(len(names)):
        for b in range(a):
            assert torch.cdist(tones[a], tones[b]).min() > 0.2, (names[a], names[b])


# The tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ASSETS / "teacher" / "tokenizer")


def test_a_word_is_a_token(tokenizer):
    used = {w for text in shapes.captions(scenes_of(5000)) for w in text.split()}
    assert used == set(words())
    ids = {word: tokenizer(word, add_special_tokens=False).input_ids for word in sorted(used)}
    assert {word: len(i) for word, i in ids.items()} == dict.fromkeys(ids, 1)
    assert len({i[0] for i in ids.values()}) == len(ids)


def test_longest_caption_fits(tokenizer):
    texts = shapes.captions(scenes_of(5000))
    ids = tokenizer(texts).input_ids
    assert max(map(len, ids)) == 22 <= MAX_TOKENS == tokenizer.model_max_length
    assert [len(i) for i in ids] == [len(t.split()) + 2 for t in texts]
    assert all(i[0] == tokenizer.bos_token_id and i[-1] == tokenizer.eos_token_id for i in ids)
    assert tokenizer.batch_decode(ids, skip_special_tokens=True) == texts


def test_end_token_is_not_2(tokenizer):
    """transformers pools CLIP's text by another rule where the end token's id is 2."""
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == len(tokenizer) - 1 != 2
    assert tokenizer.bos_token_id != tokenizer.eos_token_id


def test_other_words_are_spelt_out(tokenizer):
    ids = tokenizer("a photo of a cat, 3.5", add_special_tokens=False).input_ids
    assert tokenizer.eos_token_id not in ids and " ".join(tokenizer.decode(ids).split()) == "a photo of a cat , 3 . 5"


def test_tokenize_pads_and_cuts(tokenizer):
    ids = tokenize(tokenizer, ["", "a " * 100, "a small red circle on a white background"])
    assert ids.shape == (3, MAX_TOKENS)
    assert ids[0, 1:].eq(tokenizer.eos_token_id).all() and ids[1, -1] == tokenizer.eos_token_id


@pytest.mark.parametrize("folder", ("teacher/tokenizer", "clip"))
def test_committed_tokenizer_is_the_one_that_is_built(folder):
    built, committed = build_tokenizer(), AutoTokenizer.from_pretrained(ASSETS / folder)
    texts = [*shapes.captions(scenes_of(200)), "something else, 42"]
    assert committed.get_vocab() == built.get_vocab()
    assert torch.equal(tokenize(committed, texts), tokenize(built, texts))
    assert committed.model_max_length == built.model_max_length
