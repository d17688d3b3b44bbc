"""The shapes world: 64 x 64 images of one to three coloured shapes, with captions that say all there is to see.

    "a small red circle above a large blue square on a white background"

The world is drawn by code, so its true distribution can be sampled without end, and every attribute of an image can be
checked against its caption. Scenes are tensors, and drawing runs on the device in plain torch operations without
host synchronisation, so that a training step that draws its own data can be captured as one CUDA graph.
"""

import dataclasses
import functools
from dataclasses import dataclass

import torch

from sidfast.common.errors import UserError

IMAGE_SIZE = 64
MAX_OBJECTS = 3
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = ("small", "large")
COLORS = ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "pink")
BACKGROUNDS = ("white", "black", "gray", "brown")
LAYOUTS = ("single", "row", "column")
RELATIONS = {"row": ("left of", "right of"), "column": ("above", "below")}    # (as drawn, told from the far end)
SPLITS = ("train", "held_out", "all")

_COLOR_RGB = ((0.86, 0.12, 0.12), (0.13, 0.60, 0.20), (0.15, 0.30, 0.88), (0.95, 0.88, 0.15),
              (0.55, 0.20, 0.72), (0.98, 0.55, 0.10), (0.20, 0.82, 0.88), (0.98, 0.60, 0.78))
_BACKGROUND_RGB = ((0.97, 0.97, 0.97), (0.04, 0.04, 0.04), (0.55, 0.55, 0.55), (0.42, 0.28, 0.17))
_RADII = ((6.3, 7.1), (9.2, 9.9))                       # pixels, by size
_COUNT_SHARES = (0.25, 0.35, 0.40)                      # one, two, three objects

# By number of objects, along the axis of the layout: slot centres, and how far the objects move around them. Across
# the axis they move together (_SHIFT) and each on its own (_WOBBLE). Objects never overlap and never leave the image.
_SLOTS = ((32.0, 0.0, 0.0), (20.0, 44.0, 0.0), (11.0, 32.0, 53.0))
_ALONG = (20.0, 2.0, 0.5)
_SHIFT = (20.0, 15.0, 17.0)
_WOBBLE = (0.0, 3.0, 3.0)


@dataclass
class Scenes:
    """N scenes, every field an integer tensor. Objects are stored left to right or top to bottom.

    count, layout, background, told_from_end: [N]; size, color, shape: [N, 3], of which the first `count + 1` are
    objects. `count` is the number of objects less one; all others index the word lists above. `told_from_end` only
    changes the caption ("B right of A" for "A left of B").
    """

    count: torch.Tensor
    layout: torch.Tensor
    background: torch.Tensor
    told_from_end: torch.Tensor
    size: torch.Tensor
    color: torch.Tensor
    shape: torch.Tensor

    def __len__(self):
        return self.count.shape[0]

    def __getitem__(self, index):
        return self.map(lambda field: field[index])

    def map(self, function):
        """Scenes of function(field) for every field."""
        return Scenes(**{f.name: function(getattr(self, f.name)) for f in dataclasses.fields(self)})

    def to(self, device):
        """The same scenes on another device."""
        return self.map(lambda field: field.to(device))

    @property
    def present(self):
        """[N, 3] bool: which object slots are taken."""
        return torch.arange(MAX_OBJECTS, device=self.count.device) <= self.count[:, None]


def concatenate(scenes):
    """One Scenes out of a list of them."""
    return Scenes(**{f.name: torch.cat([getattr(s, f.name) for s in scenes]) for f in dataclasses.fields(Scenes)})


def sample_scenes(n, split="train", generator=None, device="cpu"):
    """Draw n scenes of a split: "train", "held_out" or "all". Raises ValueError for any other.

    A scene is held out if and only if its first object has the one colour in eight that a hash of everything else
    assigns to it. The hash ignores from which end the caption is told, so both wordings of a held-out arrangement
    are held out, and no combination of arrangement and words occurs in both splits.
    """
    if split not in SPLITS:
        raise ValueError(f"sample_scenes: unknown split {split!r}; choose from {', '.join(SPLITS)}")

    def integers(high, *shape):
        return torch.randint(high, shape, generator=generator, device=device)

    u = torch.rand(n, generator=generator, device=device)
    count = (u > _COUNT_SHARES[0]).long() + (u > _COUNT_SHARES[0] + _COUNT_SHARES[1]).long()
    several = (count > 0).long()
    scenes = Scenes(count=count, layout=several * (1 + integers(2, n)), background=integers(len(BACKGROUNDS), n),
                    told_from_end=several * integers(2, n), size=integers(len(SIZES), n, MAX_OBJECTS),
                    color=integers(len(COLORS), n, MAX_OBJECTS), shape=integers(len(SHAPES), n, MAX_OBJECTS))
    absent = ~scenes.present
    for field in (scenes.size, scenes.color, scenes.shape):
        field.masked_fill_(absent, 0)
    reserved = _reserved_color(scenes)
    others = (reserved + 1 + integers(len(COLORS) - 1, n)) % len(COLORS)
    if split != "all":
        scenes.color[:, 0] = reserved if split == "held_out" else others
    return scenes


def is_held_out(scenes):
    """[N] bool: scenes that training must never show."""
    return scenes.color[:, 0] == _reserved_color(scenes)


def _reserved_color(scenes):
    """[N]: the first object's colour that is held out, from a hash of all other attributes."""
    fields = [scenes.count, scenes.layout, scenes.background]
    fields += [*scenes.size.T, *scenes.shape.T, *scenes.color.T[1:]]
    h = torch.full_like(scenes.count, 0x2545F491)
    for field in fields:
        h = ((h ^ (field + 1)) * 0x9E3779B1) & 0x7FFFFFFF
        h = h ^ (h >> 15)
    return (h >> 7) % len(COLORS)


def draw(scenes, generator=None):
    """Draw scenes at random positions: float images [N, 3, 64, 64] in [-1, 1], edges antialiased over one pixel."""
    device, n = scenes.count.device, len(scenes)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(shape, generator=generator, device=device)

    def table(values):
        return _table(values, device)

    x, y = _centres(scenes, uniform, table)
    low, high = table(_RADII).unbind(1)
    radius = low[scenes.size] + (high - low)[scenes.size] * uniform(0, 1, n, MAX_OBJECTS)
    rgb = (table(_COLOR_RGB)[scenes.color] + uniform(-0.04, 0.04, n, MAX_OBJECTS, 3)).clamp(0, 1)
    background = (table(_BACKGROUND_RGB)[scenes.background] + uniform(-0.03, 0.03, n, 3)).clamp(0, 1)

    pixel = torch.arange(IMAGE_SIZE, device=device) + 0.5
    image = background[:, :, None, None].expand(n, 3, IMAGE_SIZE, IMAGE_SIZE)
    for k in range(MAX_OBJECTS):
        dx = pixel[None, None, :] - x[:, k, None, None]
        dy = pixel[None, :, None] - y[:, k, None, None]
        distance = _signed_distance(dx, dy, radius[:, k, None, None], scenes.shape[:, k, None, None])
        coverage = (0.5 - distance).clamp(0, 1) * scenes.present[:, k, None, None]
        image = image + coverage[:, None] * (rgb[:, k, :, None, None] - image)
    return image * 2 - 1


@functools.cache
def _table(values, device):
    """A constant on its device, made once: a copy from the host cannot be captured in a CUDA graph."""
    return torch.tensor(values, device=device)


def _centres(scenes, uniform, table):
    """Pixel coordinates (x, y) of the object centres, [N, 3] each."""
    n, count = len(scenes), scenes.count
    along = table(_SLOTS)[count] + uniform(-1, 1, n, MAX_OBJECTS) * table(_ALONG)[count][:, None]
    shift = uniform(-1, 1, n, 1) * table(_SHIFT)[count][:, None]
    wobble = uniform(-1, 1, n, MAX_OBJECTS) * table(_WOBBLE)[count][:, None]
    across = IMAGE_SIZE / 2 + shift + wobble
    column = (scenes.layout == LAYOUTS.index("column"))[:, None]
    return torch.where(column, across, along), torch.where(column, along, across)


def _signed_distance(dx, dy, r, shape):
    """Distance in pixels to the edge of a shape of radius r, negative inside. `shape` selects from SHAPES."""
    ax, ay = dx.abs(), dy.abs()
    circle = (dx * dx + dy * dy).sqrt() - r
    square = torch.maximum(ax, ay) - 0.88 * r
    triangle = torch.maximum(dy - 0.8 * r, (1.8 * ax - dy - r) / 2.06)
    cross = torch.minimum(torch.maximum(ax - r, ay - 0.35 * r), torch.maximum(ax - 0.35 * r, ay - r))
    return torch.where(shape == 0, circle, torch.where(shape == 1, square, torch.where(shape == 2, triangle, cross)))


def captions(scenes):
    """The N captions, as strings."""
    rows = zip(*(getattr(scenes, f.name).tolist() for f in dataclasses.fields(scenes)), strict=True)
    return [_caption(*row) for row in rows]


def _caption(count, layout, background, told_from_end, size, color, shape):
    objects = [f"a {SIZES[size[k]]} {COLORS[color[k]]} {SHAPES[shape[k]]}" for k in range(count + 1)]
    if count > 0 and layout == 0:
        raise ValueError("several objects need a row or a column")
    link = ""
    if count:
        link = f" {RELATIONS[LAYOUTS[layout]][told_from_end]} "
    if told_from_end:
        objects.reverse()
    return f"{link.join(objects)} on a {BACKGROUNDS[background]} background"


def parse_captions(texts):
    """The scenes that captions describe: the inverse of `captions`.

    Raises UserError for a text that is not a caption of the shapes world.
    """
    rows = [_parse(text) for text in texts]
    columns = zip(*rows, strict=True)
    return Scenes(*(torch.tensor(column, dtype=torch.long) for column in columns))


def _parse(text):
    try:
        body, ground = text.strip().rsplit(" on a ", 1)
        background = BACKGROUNDS.index(ground.removesuffix(" background"))
        layout, told_from_end, parts = 0, 0, [body]
        for name, links in RELATIONS.items():
            for end, link in enumerate(links):
                if f" {link} " in body:
                    layout, told_from_end, parts = LAYOUTS.index(name), end, body.split(f" {link} ")
        if told_from_end:
            parts.reverse()
        objects = [part.removeprefix("a ").split(" ") for part in parts]
        size = [SIZES.index(o[0]) for o in objects]
        color = [COLORS.index(o[1]) for o in objects]
        shape = [SHAPES.index(o[2]) for o in objects]
        scene = (len(objects) - 1, layout, background, told_from_end)
        if len(objects) > MAX_OBJECTS or _caption(*scene, size, color, shape) != text.strip():
            raise ValueError
    except (ValueError, IndexError):
        example = "a small red circle above a large blue square on a white background"
        raise UserError(f"not a caption of the shapes world: {text!r} (an example: {example!r})") from None
    pad = [0] * (MAX_OBJECTS - len(objects))
    return *scene, size + pad, color + pad, shape + pad

