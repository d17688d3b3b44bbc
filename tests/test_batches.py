"""Batches: what is random in them, noise levels, prompts and their diversity (method.md, sections 6 and 7)."""

import numpy as np
import pytest
import torch
from helpers_method import TEXT, objective_of

from sidfast.common.errors import UserError
from sidfast.config.schema import Synthetic, build_config
from sidfast.data.diversity import fixed_z, some_prompts, training_prompts
from sidfast.data.lengths import count_cut, cut_note
from sidfast.data.prompts import open_prompts
from sidfast.teachers.fit import noise_levels
from sidfast.teachers.load import load_teacher
from sidfast.training.batches import Batches, TextEncoder


class Words:
    """Stands in for the text encoder: an embedding is the prompt's length."""

    def __init__(self):
        self.uncond = {TEXT: torch.zeros(1, 1, 1)}

    def tokenize(self, prompts):
        return torch.tensor([[len(p)] for p in prompts])

    def __call__(self, ids):
        return {TEXT: ids[..., None].float()}


def test_text_is_encoded_by_a_graph(tiny_teacher):
    """With a stand-in for capture, whose replay computes in place, as a graph does."""
    teacher, captured = load_teacher(tiny_teacher), []

    def capture(function):
        result = function()
        captured.append(result[TEXT].shape)
        return lambda: result[TEXT].copy_(function()[TEXT]), result

    plain, graphed = (TextEncoder(teacher, torch.bfloat16, *options)
                      for options in ((), (capture,)))
    ids = [plain.tokenize([f"a {color} circle", "a cross"]) for color in ("red", "green", "blue")]
    got = [graphed(i)[TEXT] for i in ids]
    for embeddings, i in zip(got, ids, strict=True):     # each of its own memory: all three are still there
        assert embeddings.dtype == torch.bfloat16 and torch.equal(embeddings, plain(i)[TEXT])
    assert captured == [got[0].shape] and torch.equal(graphed.uncond[TEXT], plain.uncond[TEXT])


def batches(prompts="shapes:train", micro=4, num_extra_noise=0, rank=0, processes=1, noise=None, shared=False,
            **synthetic):
    config = build_config({"model": {"teacher": "x"}, "data": {"prompts": prompts}, "noise": noise or {},
                           "train": {"steps": 1, "batch_size": 8, "micro_batch": micro, "seed": 5},
                           "synthetic": synthetic}, "test")
    return Batches(training_prompts(prompts, 5, config.synthetic), Words(),
                   noise_levels(objective_of().schedule, config.noise), (4, 3, 2), config.train, 0.1, config.synthetic,
                   num_extra_noise, torch.device("cpu"), rank, processes, shared)


def joined(pieces):
    return {"text": torch.cat([p.cond[TEXT] for p in pieces])} | {
        name: torch.cat([getattr(p, name) for p in pieces]) for name in pieces[0]._fields[2:]}


def test_shared_images_come_with_their_prompts():
    shared, usual = batches(shared=True), batches()
    for step in range(3):
        first, second = (joined(shared(step, update)) for update in ("generator", "fake_score"))
        assert torch.equal(first["text"], second["text"]) and not torch.equal(first["t"], second["t"])
        assert torch.equal(joined(usual(step, "fake_score"))["t"], second["t"])
        assert shared.prompt(step, "generator", 1) == shared.prompt(step, "fake_score", 1)
    assert not torch.equal(first["text"], joined(shared(3, "generator"))["text"])


@pytest.mark.parametrize("k, update", enumerate(("fake_score", "generator")))
def test_base_draws_what_it_always_drew(k, update):
    """z, eps, t, dropped in this order from one generator: whatever sources take comes after."""
    got = joined(batches(num_extra_noise=3)(7, update))
    seed = np.random.SeedSequence([5, 7, k]).generate_state(1, np.uint64)[0]
    g = torch.Generator().manual_seed(int(seed >> np.uint64(1)))
    assert torch.equal(got["z"], torch.randn(8, 4, 3, 2, generator=g))
    assert torch.equal(got["eps"], torch.randn(8, 4, 3, 2, generator=g))
    t = 20 + (torch.rand(8, generator=g, dtype=torch.float64) * 960).floor()
    torch.testing.assert_close(got["t"], t, rtol=0, atol=1e-6)
    assert torch.equal(got["dropped"], torch.rand(8, generator=g) < 0.1)
    plain = joined(batches()(7, update))
    assert all(torch.equal(plain[name], got[name]) for name in ("text", "z", "eps", "t", "dropped"))
    assert got["noise"].shape == (8, 3 if update == "fake_score" else 0, 4, 3, 2) and plain["noise"].shape[1] == 0


@pytest.mark.parametrize("options", [{}, {"z_per_prompt": 2, "unique_prompts": 3, "prompt_repeats": 2},
                                     {"temperature": 0.6}], ids=str)
def test_data_do_not_depend_on_micro_batches_or_processes(options):
    want = joined(batches(num_extra_noise=2, **options)(3, "fake_score"))
    split = joined(batches(num_extra_noise=2, micro=2, **options)(3, "fake_score"))
    shares = [joined(batches(num_extra_noise=2, rank=r, processes=2, **options)(3, "fake_score")) for r in (0, 1)]
    for name, value in want.items():
        assert torch.equal(split[name], value), name
        assert torch.equal(torch.cat([s[name] for s in shares]), value), name


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 1.0])
def test_the_teacher_s_rows_are_dealt_out_evenly(share):
    """No micro-batch has more than are drawn for it, and over many steps each row has its share."""
    stream = batches(teacher_share=share)
    chances = torch.stack([joined(stream(step, "fake_score"))["teacher_draw"] for step in range(300)])
    assert (chances >= 0).all() and (chances < 1).all()
    for size in (1, 2, 4, 8):
        counts = (chances < share).unfold(1, size, 1).sum(-1)
        assert (counts >= np.floor(share * size)).all() and (counts <= np.ceil(share * size)).all()
    assert (chances < share).double().mean(0).sub(share).abs().max() < 0.1
    assert chances.mean(0).sub(0.5).abs().max() < 0.1 and chances.std(0).sub(12 ** -0.5).abs().max() < 0.05


def test_temperature_scales_z():
    hot, cold = (joined(batches(temperature=t)(0, "generator")) for t in (1.0, 0.6))
    torch.testing.assert_close(cold["z"], 0.6 * hot["z"])
    assert torch.equal(cold["eps"], hot["eps"])


def test_levels_of_each_update():
    both = batches(noise={"density": "laplace", "generator": {"density": "ddpm", "t_min": 900}})
    plain = batches(noise={"density": "laplace"})
    fake, gen = (joined(both(0, u))["t"] for u in ("fake_score", "generator"))
    assert torch.equal(fake, joined(plain(0, "fake_score"))["t"]) and (gen >= 900).all()
    assert torch.equal(gen, gen.round()) and not torch.equal(fake, fake.round())


@pytest.mark.parametrize("noise, words", [
    ({"fake_score": {"t_min": 980}}, ["noise.fake_score", "980", "979"]),
    ({"generator": {"density": "edn"}}, ["noise.generator.density", "'edn'", "'edm'"]),
    ({"density": "edm", "std": 1.0, "generator": {"density": "edm", "shift": 2.0}}, ["noise.generator.shift", "'edm'"]),
    ({"fake_score": {"rho": 3.0}}, ["noise.fake_score.rho", "'ddpm'"]),
], ids=str)
def test_levels_that_make_no_sense(tiny_config, noise, words):
    with pytest.raises(UserError) as caught:
        build_config(tiny_config | {"noise": noise}, "file")
    text = str(caught.value)
    assert all(word in text for word in words) and "\n" not in text, text


def test_levels_of_an_update_take_over_what_they_do_not_say(tiny_config):
    noise = build_config(tiny_config | {"noise": {"density": "edm", "std": 0.7, "t_min": 50, "fake_score": {
        "mean": 0.5}, "generator": {"density": "karras", "t_max": 900}}}, "file").noise
    assert noise.levels("fake_score") == ("edm", 50, 979, {"std": 0.7, "mean": 0.5})
    assert noise.levels("generator") == ("karras", 50, 900, {})


# Diversity


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"prompt {n}\n" for n in range(200)))
    return str(path)


@pytest.mark.parametrize("options, count", [({"unique_prompts": 7}, 7), ({"prompt_share": 0.1}, 20)])
def test_few_prompts_of_a_file(lines, options, count):
    prompts = training_prompts(lines, 0, Synthetic(**options))
    epochs = [[prompts[n] for n in range(e * count, (e + 1) * count)] for e in range(3)]
    assert len(set(epochs[0])) == count and sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert epochs[0] != epochs[1]
    other = training_prompts(lines, 1, Synthetic(**options))
    assert {other[n] for n in range(count)} != set(epochs[0])


def test_all_prompts_unless_told_otherwise(lines):
    plain = open_prompts(lines, 3)
    prompts = training_prompts(lines, 3, Synthetic())
    assert [prompts[n] for n in range(300)] == [plain[n] for n in range(300)]


def test_few_prompts_of_the_shapes_world():
    prompts = training_prompts("shapes:train", 0, Synthetic(unique_prompts=1500))
    plain = open_prompts("shapes:train", 0)
    for epoch in range(2):                               # a short caption as often as in the whole world
        assert sorted(prompts[1500 * epoch + n] for n in range(1500)) == sorted(plain[n] for n in range(1500))


def test_repeats(lines):
    plain, prompts = open_prompts(lines, 0), training_prompts(lines, 0, Synthetic(prompt_repeats=3))
    assert [prompts[n] for n in range(9)] == [plain[n // 3] for n in range(9)]


@pytest.mark.parametrize("options, total", [({}, 200), ({"unique_prompts": 7}, 7), ({"prompt_repeats": 3}, 200)],
                         ids=str)
def test_some_prompts(lines, options, total):
    """Different ones, none more than once; the shapes world has no end, and none are taken of it."""
    some, number = some_prompts(training_prompts(lines, 0, Synthetic(**options)), 50)
    assert number == total and len(set(some)) == len(some) == min(50, total)
    assert some_prompts(training_prompts("shapes:train", 0, Synthetic()), 50) == ([], 0)


def test_prompts_that_are_cut_off(tiny_teacher):
    """Counted with the tokens of start and end, as many as the text encoder has positions."""
    teacher = load_teacher(tiny_teacher)
    limit = teacher.prompt_limit()[1]
    texts = [" ".join(["red"] * n) for n in (1, limit - 2, limit - 1, 3 * limit)]
    ids = TextEncoder(teacher, torch.float32).tokenize(texts)
    assert ids.shape[1] == limit == 24 and torch.equal(ids[1], ids[2])           # (the last word is lost)
    assert [count_cut(teacher.parts["tokenizer"], [text], limit) for text in texts] == [0, 0, 1, 1]
    assert count_cut(teacher.parts["tokenizer"], texts * 700, limit) == 1400
    assert cut_note(teacher.parts["tokenizer"], texts[:2], limit) is None
    note = cut_note(teacher.parts["tokenizer"], texts, limit, 10**6)
    assert note.startswith("2 of 4 prompts drawn from 1,000,000 are longer than the 24 tokens")
    teacher.parts["tokenizer"].model_max_length = 10**30          # (a tokenizer that does not say)
    assert teacher.prompt_limit()[1] == limit


def test_more_prompts_than_there_are(lines):
    with pytest.raises(UserError, match=r"synthetic.unique_prompts \(201\).*200 prompts"):
        training_prompts(lines, 0, Synthetic(unique_prompts=201))


def test_z_of_a_prompt():
    got = joined(batches(unique_prompts=2, z_per_prompt=3)(0, "fake_score"))
    seen = {}
    stream = batches(unique_prompts=2, z_per_prompt=3)
    for step in range(12):
        for update in ("fake_score", "generator"):
            prompts = stream._text(2 * step + (update == "generator"))[0]
            for prompt, z in zip(prompts, joined(stream(step, update))["z"], strict=True):
                seen.setdefault(prompt, set()).add(z.numpy().tobytes())
    assert [len(z) for z in seen.values()] == [3, 3] and not set.intersection(*seen.values())
    pool = torch.stack([fixed_z([p], [k], 5, (4, 3, 2))[0] for p in seen for k in range(3)])
    assert all((z == pool).flatten(1).all(1).any() for z in got["z"])
    [other] = fixed_z(["a"], [0], 6, (4, 3, 2))
    assert not torch.equal(fixed_z(["a"], [0], 5, (4, 3, 2))[0], other)          # (of another run's seed)
    many = fixed_z(["a"] * 400, range(400), 0, (4, 3, 2))
    assert abs(many.mean()) < 0.04 and abs(many.std() - 1) < 0.03
