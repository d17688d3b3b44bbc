"""Numbers over seeds: means, intervals, and differences to the variant that a study compares with."""

from sidfast.evaluation.intervals import of_repeats
from sidfast.studies.record import COST, is_final, read_record


def interval(values):
    """{"mean", "low", "high", "n"} of numbers: their mean, and the 95 % interval of the mean by Student's t (null for a
    single number: it says nothing about the spread)."""
    mean, ends = of_repeats(values)
    low, high = ends or (None, None)
    return {"mean": mean, "low": low, "high": high, "n": len(values)}


def collect(study, out):
    """Everything in results.json: what does not depend on when, where in time, or in how many pieces it was computed.

    {"study", "reference", "images", "seeds", "teacher", "variants": {name: {"settings", "runs": {seed: {"status",
    "message", "metrics", "curve"}}, "summary": {metric: interval, "difference": {metric: interval}}}}}; runs that are
    not finished are missing. A difference is the mean over seeds of this variant's number less the reference's with the
    same seed: same prompts, same noise.
    """
    runs = {name: {} for name in study.file.variants}
    for run in study.runs:
        record = read_record(out, run)
        if record is not None:
            runs[run.variant][str(run.seed)] = {key: record[key] for key in ("status", "message", "metrics", "curve")}
    reference = _numbers(runs[study.reference])
    variants = {}
    for name, settings in study.file.variants.items():
        own = _numbers(runs[name])
        difference = {} if name == study.reference else {
            metric: interval([values[seed] - reference[metric][seed] for seed in values if seed in reference[metric]])
            for metric, values in own.items() if set(values) & set(reference.get(metric, {}))}
        variants[name] = {"settings": settings, "runs": runs[name], "summary": {
            metric: interval(list(values.values())) for metric, values in own.items()}, "difference": difference}
    return {"study": study.name, "question": study.file.question, "reference": study.reference,
            "images": study.file.images, "seeds": study.file.seeds, "evaluation": study.file.evaluation.model_dump(),
            "variants": variants, "teacher": _of_teacher(study, out)}


def _of_teacher(study, out):
    """[{"guidance", "summary": {metric: interval over sets of noise}}, ...] of the points that are measured."""
    found = []
    for point in sorted(study.teacher, key=lambda point: point.guidance):
        record = read_record(out, point)
        if is_final(record):
            sets = record["repeats"]
            found.append({"guidance": point.guidance, "summary": {
                metric: interval([s[metric] for s in sets]) for metric in sets[0]
                if all(s.get(metric) is not None for s in sets)}})
    return found


def costs(study, out):
    """{variant: {seed: cost}}: time and memory of each finished run."""
    found = {name: {} for name in study.file.variants}
    for run in study.runs:
        cost = read_record(out, run, COST)
        if cost is not None and is_final(read_record(out, run)):
            found[run.variant][str(run.seed)] = cost | {"device_s": round(cost["training_s"] / cost["runs_at_once"], 3)}
    return found


def metric_names(results):
    """The metrics of a study that tables and plots show, in their order."""
    names = dict.fromkeys(metric for variant in results["variants"].values() for metric in variant["summary"])
    order = ("fid", "clip_score", "accuracy", "kid", "precision", "recall", "diversity")
    kept = [name for name in names if not name.startswith("accuracy_") and name != "kid_std"]
    return sorted(kept, key=lambda name: next((i for i, o in enumerate(order) if name.startswith(o)), len(order)))


def _numbers(runs):
    """{metric: {seed: value}} of the runs that came to an end."""
    found = {}
    for seed, run in runs.items():
        for metric, value in run["metrics"].items() if run["status"] == "done" else ():
            if value is not None:
                found.setdefault(metric, {})[seed] = value
    return found
