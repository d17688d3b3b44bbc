"""The families of teachers. A new one is a file beside this one, and a line here (docs/adding-a-teacher.md)."""

from sidfast.teachers.base import Family
from sidfast.teachers.sd import StableDiffusion
from sidfast.teachers.sdxl import StableDiffusionXL

FAMILIES: tuple[Family, ...] = (StableDiffusion(), StableDiffusionXL())
ARCHITECTURES: dict[str, Family] = {name: family for family in FAMILIES for name in family.architectures}


def family_of(index: dict) -> Family:
    """The family of a pipeline by its model_index.json; the first one, whose `check` says what is wrong, for none."""
    return next((family for family in FAMILIES if family.accepts(index)), FAMILIES[0])
