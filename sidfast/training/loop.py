"""The training loop: fake score and generator take turns; between steps come logs, samples, measures, checkpoints."""

import time
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from deepspeed import comm
from tqdm import tqdm

from sidfast.accel.plan import Speed
from sidfast.averages.ema import Ema
from sidfast.checkpoints.saver import Saver
from sidfast.common.errors import NothingFinite
from sidfast.engines.engine import ENGINES, set_learning_rate
from sidfast.monitoring.observe import Monitor, Profiler
from sidfast.monitoring.shutdown import Stop
from sidfast.monitoring.spikes import Spikes
from sidfast.monitoring.watchdog import Watchdog
from sidfast.runs.directory import RunDirectory
from sidfast.runs.preview import Preview
from sidfast.training.batches import Batches
from sidfast.training.progress import Progress, diverged


@dataclass
class State:
    """What a run trains, what changes it, and how far it is.

    `engines`: {network: engine}; `copies`: of the generator (averages/lagged.py); `speed`: how the networks run;
    `updates`: {network: Update}, in the order they take turns.
    """

    engines: dict
    ema: Ema
    copies: list
    speed: Speed
    batches: Batches
    updates: dict
    progress: Progress


@dataclass
class Services:
    """Services alongside training: against faults, to measure it, and to show what comes of it. `run` and `preview` are
    None on all processes but the first."""

    stop: Stop
    watch: Watchdog
    saver: Saver
    spikes: Spikes
    monitor: Monitor
    profiler: Profiler
    run: RunDirectory | None
    preview: Preview | None


class Loop:
    """Steps of a run until its end, or until a signal; all processes run it alike."""

    def __init__(self, plan, state, services):
        self.config, self.out, self.state, self.services = plan.config, plan.out, state, services
        self.progress, self.watch, self.phase = state.progress, services.watch, services.monitor.clock
        self.run, self.preview = services.run, services.preview
        size, total = self.config.train.batch_size, self.config.train.total_steps
        self.bar = tqdm(total=total * size, initial=self.progress.images, unit="img", unit_scale=True, desc="distil",
                        disable=self.run is None, mininterval=1, smoothing=0.1)
        self._clock, self._timed = time.perf_counter(), self.progress.step
        self._warm, self._saved = not self.config.train.saves, time.monotonic()

    def __call__(self):
        """Train. Returns the name of the signal that ended the run early, or None. Raises Diverged."""
        with self.bar:
            return self._run()

    def _run(self):
        train, progress, stopped = self.config.train, self.progress, None
        if progress.step:
            self._show(saving=False, again=False)        # a run killed after its checkpoint may lack what belongs to it
        while progress.step < train.total_steps and not stopped:
            self._step()
            last = progress.step == train.total_steps
            if is_due(progress.step, train.log_every) or last:
                self._log()
            stop = self.services.stop
            stopped = stop.should_stop(self.state.batches.fault() is not None, self._asks_to_save())
            stopped = None if last else stopped
            saving = train.saves and (is_due(progress.step, train.save_every) or stop.save_due or last)
            if saving or (stopped and train.saves):
                self._save()
            self._show(saving, looking=not stopped)
            self.services.profiler.step()
        return stopped

    def _step(self):
        """One update of each network, and of the averages."""
        config, progress, sums = self.config, self.progress, {}
        for name in ENGINES:
            set_learning_rate(self.state.engines[name], getattr(config.optimizer, name), progress.step,
                              config.train.total_steps)
        for one in self.state.copies:
            one.follow(progress.step)
            self.state.speed.refresh(one.network)
        for name, update in self.state.updates.items():
            self.watch.mark(f"step {progress.step + 1}, data of the {name} update")
            with self.phase("data"):
                batch = self.state.batches(progress.step, name)
                if self.state.speed.share_generator_forward and name == "fake_score":
                    batch = with_images(batch, sums["generator"].images)
            self.watch.mark(f"step {progress.step + 1}, {name} update")
            before = self.state.engines[name].skipped_steps
            with self.phase(name):
                sums[name] = self._update(update, batch)
                self.state.speed.refresh(self.state.engines[name].module.network)
            progress.count_skipped(name, self.state.engines[name].skipped_steps - before, config.train.max_skipped,
                                   self.services.saver)
        self.watch.mark(f"step {progress.step + 1}, average")
        self.services.spikes.add(progress.step, {name: (s.losses, s.t) for name, s in sums.items()})
        progress.step += 1
        progress.images += config.train.batch_size
        with self.phase("average"):
            self.state.ema.update(config.train.batch_size, progress.images)
        progress.add(sums["fake_score"], sums["generator"])
        self.bar.update(config.train.batch_size)
        if not self._warm:                               # (after the first step: capturing graphs gives it back)
            self._warm = True
            self.watch.mark(f"step {progress.step}, memory for checkpoints")
            with self._apart(), self.phase("checkpoint"):
                self.services.saver.warm_up(self.state.engines, self.state.ema, self._extra_state())

    def _update(self, update, batch):
        try:
            return update(batch)
        except NothingFinite as error:
            raise diverged(error, self.progress.step + 1, self.services.saver) from None

    @contextmanager
    def _apart(self):
        """What the speed, which is that of training alone, leaves out."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()                     # (what the GPU still has to do is training)
        start = time.perf_counter()
        yield
        self._clock += time.perf_counter() - start

    def _log(self):
        step = self.progress.step
        self.watch.mark(f"step {step}, log")
        values = self.progress.reduce(self.config.train.batch_size, self.services.saver)
        spikes = self.services.spikes.take()
        seconds, self._clock = time.perf_counter() - self._clock, time.perf_counter()
        values |= self.services.monitor.read(step - self._timed, seconds)
        self._timed = step
        if self.run:
            self.run.spikes(spikes)
            self.run.log(step, values | {"images": self.progress.images})
            self.bar.set_postfix(fake=f"{values['fake_score_loss']:.4g}", gen=f"{values['generator_loss']:.4g}",
                                 refresh=False)

    def _asks_to_save(self):
        """Whether train.save_minutes have passed; by the first process's clock, once each time."""
        now, minutes = time.monotonic(), self.config.train.save_minutes
        due = self.run is not None and minutes > 0 and now - self._saved >= 60 * minutes
        self._saved = now if due else self._saved
        return due

    def _save(self):
        """Begin to save a checkpoint."""
        self._saved = time.monotonic()
        self.watch.mark(f"step {self.progress.step}, checkpoint")
        with self._apart(), self.phase("checkpoint"):
            self.services.saver.save(
                self.progress.step, self.state.engines, self.state.ema,
                self.progress.describe(self.config.train.batch_size, self.services.saver), self._extra_state())

    def _extra_state(self):
        """What checkpoints hold besides engines and average."""
        return {"generator": {kind: tensors for one in self.state.copies for kind, tensors in one.state().items()}}

    def _show(self, saving, looking=True, again=True):
        """The export that goes with a checkpoint, and if `looking` samples and measures, if it is time for them; unless
        `again`, only those samples and measures that are not there. After a stop the next start makes them."""
        train, step, every = self.config.train, self.progress.step, self.config.evaluation.every
        last = step == train.total_steps
        sampling = looking and bool(train.samples) and (is_due(step, train.sample_every) or last)
        measuring = looking and is_measured(step, every, train.total_steps)
        if not (sampling or saving or measuring):
            return
        with self._apart(), self.watch.paused(f"step {step}, samples, measures and export"):
            with self.phase("checkpoint" if saving else "sampling"):
                weights = self.state.ema.gather(lambda name: self.run is not None)
                if saving and self.run:
                    self.preview.export(weights, f"{self.out}/export", step)
            if self.run and (sampling or measuring):
                self._look(self.preview.student(weights), sampling and (again or not self.run.has_sample(step)),
                           measuring, again or not self.run.has_measures(step))
            comm.barrier()

    def _look(self, student, sampling, measuring, again):
        step = self.progress.step
        if sampling:
            with self.phase("sampling"):
                self.preview.sample(step, student)
        if measuring:
            with self.phase("evaluation"):
                self.preview.evaluate(f"step {step}", student, step, again)


def is_due(step, every):
    """Whether something that is done every `every` steps (0: never) is due after a step."""
    return bool(every) and step % every == 0


def is_measured(step, every, total):
    """Whether an evaluation is made after a step other than the last: every `every` steps (0: never), but not within a
    tenth of that before the end, which is measured anyway."""
    return is_due(step, every) and step < total and 10 * (total - step) >= every


def with_images(batches, images):
    """Micro-batches of the fake score's update on images that are there already (method/synthetic.py, Shared)."""
    images = torch.cat(images).split(len(batches[0].t))  # (the generator's micro-batches may be smaller)
    return [b._replace(noise=torch.cat((x[:, None], b.noise[:, 1:]), 1)) for b, x in zip(batches, images, strict=True)]
