"""report.html: one page about a study, self-contained."""

import base64

from sidfast.evaluation.charts import inline
from sidfast.studies.record import STRIP
from sidfast.studies.table import notes, rows


def page(study, out, results, costs, figures):
    """The page as text. `out`: the study's folder, for the images that its runs left; `figures`: from `plots`."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(loader=PackageLoader("sidfast.studies"), autoescape=True, trim_blocks=True,
                              lstrip_blocks=True)
    header, body, marks = rows(results, costs)
    return environment.get_template("study.html").render(
        results=results, header=header, rows=[list(zip(*row, strict=True)) for row in zip(body, marks, strict=True)],
        notes=notes(results, costs), figures=[inline(figure, name) for name, figure in figures.items()],
        strips=_strips(study, out), prompts=_prompts(study), settings=study.file.settings, base=study.file.base)


def _strips(study, out):
    """[(variant, seed, image)] of the runs that have one, variant by variant."""
    found = []
    for variant in study.file.variants:
        for run in study.runs:
            path = out / run.folder / STRIP
            if run.variant == variant and path.is_file():
                found.append((run.variant, run.seed, _data(path.read_bytes())))
    return found


def _prompts(study):
    from sidfast.studies.worker import sample_prompts

    return sample_prompts(study)


def _data(png):
    return "data:image/png;base64," + base64.b64encode(png).decode()
