"""Batches: prompts to text embeddings, with their noise.

Everything random about update k of a network follows from (seed, k, network) and is drawn for the whole global batch;
a process takes its rows. So training is the same on any number of processes and with any micro-batch, and resumes
exactly from a step count.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from sidfast.accel.graphs import GraphedStep
from sidfast.data.diversity import fixed_z
from sidfast.data.lines import PromptsChanged
from sidfast.method.conditions import split
from sidfast.method.updates import Batch
from sidfast.teachers.fit import UPDATES

_AHEAD = 4                                               # global batches whose prompts are tokenised ahead, at once


class TextEncoder:
    """Prompts to Conditions, with a teacher's frozen text encoders.

    `capture`: Graphs.capture, for example, makes a graph of them, for the shape of the first call. `uncond`: the
    Conditions of the empty prompt, one sample.
    """

    def __init__(self, teacher, dtype, capture=None, size=None):
        """`dtype`: of the Conditions; `size`: (height, width) of the images in pixels, the teacher's own by default."""
        self.teacher, self.dtype, self.size = teacher, dtype, size or teacher.image_size()
        with torch.no_grad():
            self.uncond = self._cast(teacher.family.encode_empty(teacher, self.size))
        self._capture, self._step = capture if teacher.family.capturable(teacher) else None, None

    def tokenize(self, prompts):
        """N prompts -> token ids [N, ...] on the CPU, from where a GPU can fetch them by itself."""
        ids = self.teacher.tokenize(prompts)
        return ids.pin_memory() if self.teacher.device.type == "cuda" else ids

    def __call__(self, ids):
        """What `tokenize` gives -> Conditions of N samples, new tensors. A captured encoder takes the first call's
        shape alone."""
        ids = ids.to(self.teacher.device, non_blocking=True)
        if self._capture is None:
            return self._encode(ids)
        if self._step is None:
            self._step = GraphedStep(self._encode, ids.device, [ids], 2, self._capture)
        return {name: value.clone() for name, value in self._step(ids).items()}

    @torch.no_grad()
    def _encode(self, ids):
        return self._cast(self.teacher.encode(ids, self.size))

    def _cast(self, cond):
        return {name: value.to(self.dtype) if value.is_floating_point() else value for name, value in cond.items()}


class Batches:
    """The micro-batches of this process, for any step and either update."""

    def __init__(self, prompts, encoder, levels, latent_shape, train, dropout, synthetic, num_extra_noise, device,
                 rank=0, processes=1, shared=False):
        """`levels`: {update: NoiseLevels}; `latent_shape`: (C, H, W); `train`, `synthetic`: the configuration's
        sections; `dropout`: share of empty prompts; `num_extra_noise`: tensors of further noise that the source of
        the fake score's images takes for each; `rank`, `processes`: this process among how many, whose number divides
        the global batch; `shared`: whether both updates of a step have the same prompts."""
        self.prompts, self.encoder, self.levels, self.latent_shape = prompts, encoder, levels, latent_shape
        self.size, self.seed, self.dropout, self.device = train.batch_size, train.seed, dropout, device
        self.at_once = {update: train.images_at_once(update) for update in UPDATES}
        self.temperature, self.z_per_prompt = synthetic.temperature, synthetic.z_per_prompt
        self.teacher_share = synthetic.teacher_share
        self.num_extra_noise = {"fake_score": num_extra_noise, "generator": 0}
        share = self.size // processes
        self.rows = range(rank * share, (rank + 1) * share)
        self.shared = shared
        self._workers, self._ahead, self._last = ThreadPoolExecutor(_AHEAD), {}, (None, None, None)

    def __call__(self, step, update):
        """The list of this process's Batches for one update of step 0, 1, 2, ...."""
        k = UPDATES.index(update)
        (prompts, cond), mine = self._text(self._number(step, update)), slice(self.rows.start, self.rows.stop)
        generator = self._generator(step, k)
        z, eps = (self._normal(generator) for _ in range(2))
        t = self.levels[update].sample(self.size, generator)
        dropped = self._uniform(generator) < self.dropout
        extra_noise = [self._normal(generator) for _ in range(self.num_extra_noise[update])]
        noise = torch.stack(extra_noise, 1) if extra_noise else z[:, None][:, :0]
        teacher_draw, which = self._even(generator, self.teacher_share), self._uniform(generator)
        z, eps, t, dropped, noise, teacher_draw = (v[mine] for v in (z, eps, t, dropped, noise, teacher_draw))
        if self.z_per_prompt is not None:
            which = (which[mine] * self.z_per_prompt).long().tolist()
            z = fixed_z(prompts, which, self.seed, self.latent_shape).to(self.device)
        if self.temperature != 1:
            z = self.temperature * z
        size = self.at_once[update]
        pieces = zip(*(v.split(size) for v in (z, eps, t, dropped, noise, teacher_draw)), strict=True)
        return [Batch(part, self.encoder.uncond, *rest) for part, rest in zip(split(cond, size), pieces, strict=True)]

    def prompt(self, step, update, row):
        """The text of this process's sample `row` in an update; empty if its file is no longer the same."""
        try:
            return self.prompts[self._number(step, update) * self.size + self.rows[row]]
        except PromptsChanged:
            return ""

    def fault(self):
        """The PromptsChanged that coming steps will meet, or None. The prompts of two steps are read ahead, so that the
        run can still end in order."""
        errors = [future.exception() for future in self._ahead.values()]
        return next((error for error in errors if isinstance(error, PromptsChanged)), None)

    def _number(self, step, update):
        """Which global batch of prompts an update has."""
        return step if self.shared else len(UPDATES) * step + UPDATES.index(update)

    def _text(self, number):
        """Prompts number `number` and their embeddings; the next ones' token ids are made meanwhile by threads: the
        tokenizer works outside Python's lock, one core for each batch."""
        if self._last[0] != number:
            waiting = self._ahead.get(number) or self._workers.submit(self._tokenize, number)
            coming = range(number + 1, number + 1 + _AHEAD)
            self._ahead = {n: self._ahead.get(n) or self._workers.submit(self._tokenize, n) for n in coming}
            prompts, ids = waiting.result()
            self._last = number, prompts, self.encoder(ids)
        return self._last[1:]

    def _tokenize(self, number):
        prompts = [self.prompts[number * self.size + row] for row in self.rows]
        return prompts, self.encoder.tokenize(prompts)

    def _generator(self, step, k):
        seed = np.random.SeedSequence([self.seed, step, k]).generate_state(1, np.uint64)[0]
        return torch.Generator(self.device).manual_seed(int(seed >> np.uint64(1)))

    def _normal(self, generator):
        return torch.randn(self.size, *self.latent_shape, generator=generator, device=self.device)

    def _uniform(self, generator):
        return torch.rand(self.size, generator=generator, device=self.device)

    def _even(self, generator, share):
        """[size] (fp64), each uniform in [0, 1), all from one draw: of any N consecutive ones, `share` N are below
        `share`, rounded up or down (systematic sampling)."""
        start = self._uniform(generator)[0].double() + 2**-25                    # (of multiples of 2^-24: none is met)
        return (start - share * torch.arange(self.size, device=self.device, dtype=torch.float64)) % 1
