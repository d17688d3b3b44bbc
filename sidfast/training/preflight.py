"""What must hold before a run writes anything: one list, for training, for every run of a study, and for tests.

    check_config     the configuration alone                                     before a folder is taken
    preflight        the run directory; the teacher; both and the configuration  inside `claimed` (runs/lock.py)
    agree            DeepSpeed, the micro-batch, the checkpoint                  once all processes have joined

The order matters. What is quick comes first, so that no teacher is loaded for a mistyped prompts file. A run directory
is read only while this job holds its lock, so that no other start changes it in between, and before the teacher is
loaded. The teacher is compared with the one that the run began with before it is compared with the configuration: an
exchanged teacher is the reason then, not the keys that it does not fit. Networks of the evaluation, which take seconds,
come last of what a process can check alone; it does so before it joins, so that none waits for one that was refused.
`check_sections` precedes `validate_deepspeed`, which switches off the parts of a section that would write files.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from deepspeed import comm

from sidfast.accel.plan import check_speed
from sidfast.checkpoints.store import check_fits, choose_checkpoint
from sidfast.common.errors import UserError, check_paths, one_line, speaks, tell
from sidfast.config.schema import Config
from sidfast.data.diversity import some_prompts, training_prompts
from sidfast.data.lengths import LOOKED_AT, cut_note
from sidfast.engines.engine import ENGINES, check_batch, engine_section, offloads, zero_stages
from sidfast.engines.validate import check_sections, validate_deepspeed
from sidfast.method.synthetic import capture_blocker
from sidfast.monitoring.trackers import check_tracker
from sidfast.planning.fit import find_micro_batch
from sidfast.publishing.export import is_student
from sidfast.runs.directory import open_run
from sidfast.runs.evaluate import check_measures
from sidfast.runs.identity import check_imports, check_inputs, check_origin, describe_inputs
from sidfast.teachers.base import Teacher
from sidfast.teachers.fit import check_teacher_fits
from sidfast.teachers.load import load_teacher


@dataclass(frozen=True)
class Plan:
    """A run that may start.

    `prompts`: to be indexed with any n >= 0; `teacher`: taken over by training; `inputs`: fingerprints of both;
    `resume`: where to start, as for `open_run`; `checkpoint`: the folder that follows from it, or None, known once
    processes have agreed; `memo`: keeps what runs one after the other have in common, such as the evaluation;
    `imports`: modules of the user's own (`import_modules`).
    """

    config: Config
    out: Path
    prompts: Any
    teacher: Teacher
    inputs: dict
    resume: str = "auto"
    memo: dict = field(default_factory=dict)
    imports: dict = field(default_factory=dict)
    checkpoint: Path | None = None


def check_config(config: Config, processes: int) -> Any:
    """Check a configuration by itself, for a run of so many processes; returns its prompts (`training_prompts`).

    Raises UserError, which names the key.
    """
    check_paths({"model.teacher": config.model.teacher, "data.prompts": config.data.prompts,
                 "evaluation.assets": config.evaluation.assets})
    check_tracker(config.train.tracker)
    _check_teacher(config.model.teacher, Path(config.model.teacher))
    check_batch(config, processes)
    check_sections(config)
    return training_prompts(config.data.prompts, config.train.seed, config.synthetic, config.data.prompts_column,
                            lambda note: tell(one_line(note)))


def preflight(config: Config, out: str | Path, source: str, prompts: Any, *, resume: str = "auto",
              teacher: Teacher | None = None, memo: dict | None = None, imports: dict | None = None) -> Plan:
    """The Plan of a run in the directory `out`, which this job has claimed, with the prompts of `check_config`.

    `source`: names the configuration in messages; `teacher`: the configuration's, where it is loaded already; `resume`,
    `memo` and `imports` as in the Plan. Raises UserError.
    """
    out, memo, imports = Path(out), {} if memo is None else memo, imports or {}
    check_imports(out, imports)
    open_run(out, config, resume)
    teacher = teacher or load_teacher(config.model.teacher, **config.model.loading)
    inputs = describe_inputs(config, teacher)
    check_inputs(out, inputs)
    _check_fit(config, source, teacher)
    if speaks():                                         # (the first process alone measures)
        check_measures(config, teacher, memo)
        _tell_cut(prompts, teacher)
    return Plan(config, out, prompts, teacher, inputs, resume, memo, imports)


def check_runs(configs: dict[str, Config]) -> None:
    """Check runs of one teacher, each in one process, before any of them has a run directory: {source: configuration}.

    Raises UserError.
    """
    for config in configs.values():
        check_config(config, 1)
    model, memo = next(iter(configs.values())).model, {}
    teacher = load_teacher(model.teacher, **model.loading)
    for source, config in configs.items():
        _check_fit(config, source, teacher)
    for config in configs.values():
        check_measures(config, teacher, memo)


def agree(plan: Plan, device: torch.device) -> Plan:
    """The Plan with its checkpoint, and with a number for train.micro_batch; a collective call.

    Raises UserError for what does not work on `device`, and for a checkpoint that is damaged or of another run.
    """
    config, out, processes = plan.config, plan.out, comm.get_world_size()
    if any(offloads(engine_section(config, name)) for name in ENGINES):
        tell("loading DeepSpeed's Adam for the CPU; the first time it is compiled. (If this does not end: remove the "
             "file `lock` that a compilation that was killed has left in ~/.cache/torch_extensions/*/cpu_adam)")
    validate_deepspeed(config, processes, device)
    config = find_micro_batch(config, plan.teacher, processes, device)
    checkpoint = choose_checkpoint(out, plan.resume, tell)
    if checkpoint:
        check_fits(checkpoint, plan.teacher.network, config.optimizer)
        if checkpoint.parent == out / "checkpoints":     # (--resume may name one of any other run)
            check_origin(checkpoint, config, plan.inputs, f"--out {out}: ")
    return dataclasses.replace(plan, config=config, checkpoint=checkpoint)


def _check_teacher(name, folder):
    """UserError for an export of ours."""
    if is_student(folder):
        raise UserError(f"model.teacher: {name} is a student, and a student is not a teacher. Name the teacher it was "
                        "distilled from; to train it further, add --resume CHECKPOINT of its run")


def _check_fit(config, source, teacher):
    """UserError if a teacher does not fit its configuration, or this machine cannot run it so."""
    _check_teacher(config.model.teacher, teacher.folder)             # (that of a hub id is known only now)
    check_teacher_fits(config, teacher, source)
    check_speed(config.speed, teacher, zero_stages(config),
                torch.device("cuda" if torch.cuda.is_available() else "cpu"), capture_blocker(config.synthetic))


def _tell_cut(prompts, teacher):
    """A line if the text encoder does not take all of the prompts, of which it looks at some."""
    limit, (some, total) = teacher.prompt_limit(), some_prompts(prompts, LOOKED_AT)
    note = limit and cut_note(limit[0], some, limit[1], total)
    if note:
        tell(f"data.prompts: {note}")
