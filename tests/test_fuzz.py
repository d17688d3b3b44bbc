"""Whatever a configuration holds: it runs, or ends in one line and exit code 2 with nothing written."""

import json
import os
import tempfile
from pathlib import Path

import pytest
from conftest import environment, free_port
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from sidfast.kernels import backend

from sidfast import train
from sidfast.accel import plan as speed
from sidfast.common.explain import _keys
from sidfast.config.schema import Config

QUICK = settings(max_examples=100, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
                 suppress_health_check=list(HealthCheck))
LONG = settings(QUICK, max_examples=2000)
KEYS = [key for key in _keys(Config) if "." in key] + ["deepspeed", "train", "noise", "optimizer", "extra", "model.x"]
DEEPSPEED = ["zero_optimization", "bf16", "fp16", "gradient_clipping", "communication_data_type", "steps_per_print",
             "zero_optimization.stage", "zero_optimization.overlap_comm", "zero_optimization.reduce_bucket_size",
             "zero_optimization.contiguous_gradients", "bf16.enabled", "fp16.enabled", "fp16.loss_scale",
             "zero_optimization.offload_optimizer", "prescale_gradients", "wall_clock_breakdown", "data_types",
             "activation_checkpointing", "flops_profiler", "tensorboard", "sparse_gradients", "amp", "elasticity",
             "generator", "fake_score", "generator.zero_optimization.stage", "train_batch_size", "optimizer",
             "pipeline", "gradient_predivide_factor", "zero_allow_untested_optimizer", "dump_state", "comms_logger",
             "checkpoint"]

numbers = st.one_of(
    st.sampled_from([0, 1, 2, 3, 4, -1, 7, 999, 1000, 10**6, 2**31, 2**63, 2**64, 10**30, 0.0, -0.0, 1.0, 0.5, 1e-300,
                     1e300, -1e-9, 5e-324, float("nan"), float("inf"), -float("inf")]),
    st.integers(-10, 20), st.integers(), st.floats())
texts = st.one_of(
    st.sampled_from(["", "auto", "cpu", "fp32", "ddpm", "edm", "karras", "laplace", "shapes:train", "null", "a/b", "\0",
                     "shapes:test", "\ud800", "../..", "/", "\n\n", "\u202e", "x" * 5000, "true", "1", "é", "~", "%s",
                     "{}", "/dev/null", "/proc/self/mem", "\x1b[31m"]),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20))              # (the default is the same, but slow)
scalars = st.one_of(st.none(), st.booleans(), numbers, texts)
garbage = st.recursive(scalars, lambda inner: st.one_of(
    st.lists(inner, max_size=3), st.dictionaries(st.one_of(st.sampled_from(DEEPSPEED), texts), inner, max_size=3)),
    max_leaves=8)
changes = st.one_of(
    st.tuples(st.sampled_from(KEYS), scalars), st.tuples(st.sampled_from(KEYS), garbage),
    st.tuples(st.sampled_from(DEEPSPEED).map("deepspeed.{}".format), scalars),
    st.tuples(st.sampled_from(DEEPSPEED).map("deepspeed.{}".format), garbage),
    st.tuples(texts.map("train.{}".format), garbage), st.tuples(texts, garbage))


PLAUSIBLE = {                                            # most of them run
    "guidance.kappa1": [0, 1, 4.5, -1.5, 1e30], "guidance.kappa4": [0, 1.0, 3, -2],
    "guidance.prompt_dropout": [0, 0.9], "loss.alpha": [0, 1.2, -1, 1e3],
    "noise.density": ["edm", "karras", "cosine", "linear", "sigmoid", "laplace"], "noise.t_min": [0, 1, 500, 978],
    "noise.t_max": [21, 980, 999, 1000], "noise.t_init": [1, 999, 1000], "noise.mean": [0.0, -1.2, 1e6],
    "noise.std": [1.2, 1e-6, 1e9], "noise.scale": [1, 1e6], "noise.rho": [7, 1e-3, 100], "train.steps": [1, 2],
    "train.batch_size": [2, 6, 8, 5], "train.micro_batch": [1, 4, 3, "auto"], "train.seed": [1, 2**63, 10**30],
    "train.save_every": [0, 1], "train.samples": [0, 1], "train.keep": [1, 10**9], "train.log_every": [1, 100],
    "train.sample_every": [1, 10**12], "optimizer.generator.lr": [1e-300, 1e10, 1],
    "optimizer.fake_score.beta1": [0.9], "optimizer.generator.eps": [None, 1e-30, 1e30],
    "optimizer.generator.warmup": [1, 10**9, 10**400], "optimizer.fake_score.decay": [1, 10**9],
    "ema.half_life": [0, 1e300], "ema.ramp_up": [None, 1e-30, 1e30], "speed.tf32": [False],
    "speed.fused": ["auto", True], "speed.cuda_graphs": ["auto", True], "model.resolution": [8, 15, 16, 32, 33],
    "speed.attention": ["math", "flash"], "speed.gradient_checkpointing": [True], "evaluation.every": [1, 2],
    "deepspeed.zero_optimization.stage": [0, 1, 2, 3, 4, "2"], "deepspeed.bf16.enabled": [True, "yes", 1],
    "deepspeed.gradient_clipping": [1.0, -1, 1e-300, 1e30, "1"],
    "deepspeed.generator.zero_optimization.stage": [0, 1, 2],
    "deepspeed.zero_optimization.reduce_bucket_size": [1, 10, "5e8", -1], "deepspeed.prescale_gradients": [True],
    "deepspeed.fp16.enabled": [True, None], "deepspeed.communication_data_type": ["fp32", "fp16"],
    "deepspeed.tensorboard": [{"enabled": True}, 3], "deepspeed.wall_clock_breakdown": [True, "x"],
    "deepspeed.zero_optimization.overlap_comm": [True, False, "x"], "deepspeed.comms_logger": [{"enabled": True}],
    "deepspeed.flops_profiler": [{"enabled": True, "profile_step": 1}], "deepspeed.unknown_key": [1]}
plausible = st.sampled_from(sorted(PLAUSIBLE)).flatmap(
    lambda key: st.tuples(st.just(key), st.sampled_from(PLAUSIBLE[key])))


@st.composite
def cases(draw, plausible_of_ten):
    """(changes to a good configuration, `--set` overrides, what is done to the file's text)."""
    if draw(st.integers(0, 9)) < plausible_of_ten:
        return draw(st.lists(plausible, min_size=1, max_size=3)), [], "", 0
    values = st.one_of(texts, scalars.map(json.dumps))
    sets = st.one_of(texts, st.tuples(st.sampled_from(KEYS + DEEPSPEED), values).map("=".join))
    damages = ["", "", "", "", "", "cut", "twice", "deep", "bytes", "digits", "bom", "null", "list"]
    return (draw(st.lists(changes, min_size=1, max_size=3)), draw(st.lists(sets, max_size=2)),
            draw(st.sampled_from(damages)), draw(st.integers(0, 10**6)))


def written(values, damage, n):
    """The bytes of a configuration file."""
    text = json.dumps(values)
    if damage == "cut":
        text = text[:n % len(text)]
    elif damage == "twice":
        text = f'{{"train": {{}}, {text[1:]}'
    elif damage == "deep":
        depth = 10 ** (n % 6)
        text = f'{text[:-1]}, "deepspeed": {"[" * depth}{"]" * depth}}}'
    elif damage == "digits":
        text = text.replace("20", "2" * (n % 10000 + 1), 1)
    elif damage == "bytes":
        raw = bytearray(text.encode())
        raw[n % len(raw)] = n % 256
        return bytes(raw)
    elif damage == "bom":
        text = "\ufeff" + text
    elif damage == "null":
        text = "null"
    elif damage == "list":
        text = f"[{text}]"
    return text.encode("utf-8", "surrogatepass")


def assign(values, key, value):
    *sections, last = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            return
    values[last] = value


def is_small(config):
    """Whether a resolved configuration takes milliseconds on the tiny teacher."""
    t, e = config["train"], config["evaluation"]
    steps = t["steps"] or -(-t["images"] // t["batch_size"])
    return (t["batch_size"] <= 16 and steps <= 20 and t["samples"] <= 2 and e["images"] == 0
            and (config["model"]["resolution"] or 8) <= 64)


def outcome(capsys, main, args, out):
    """Runs a command in this process; checks how it ends. Returns its exit code."""
    before = set(out.parent.iterdir())
    try:
        code = main(args)
    except SystemExit as stop:                           # argparse
        code = stop.code
    captured = capsys.readouterr()
    if code == 2:
        lines = [line for line in captured.err.strip().splitlines() if not line.startswith("sidfast: starting, ")]
        assert lines and (len(lines) == 1 or lines[0].startswith("usage:")), captured.err
        assert "Traceback" not in captured.err
        assert set(out.parent.iterdir()) == before, "something was written"
    elif code == 1:                                      # the one way in which a run fails by itself
        last = captured.err.strip().splitlines()[-1]
        assert ("diverged" in last or "the run ends" in last) and "Traceback" not in captured.err, captured.err
    else:
        assert code == 0, captured.err
    return code


class Tally:
    """How the cases of a fuzz ended."""

    def __init__(self):
        self.ran = self.refused = self.diverged = self.too_large = 0

    def __str__(self):
        return (f"{self.ran} ran, {self.refused} refused, {self.diverged} diverged, {self.too_large} valid and too "
                "large to run here")


@pytest.fixture
def alone(monkeypatch, tmp_path):
    """The environment of one process; nothing that a case does to it stays, nor what DeepSpeed's monitors write."""
    monkeypatch.chdir(tmp_path)
    for name, value in (environment(free_port()) | {"LOCAL_WORLD_SIZE": str(os.cpu_count())}).items():     # one thread
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for module in (backend, speed):                      # plain PyTorch, as on any machine without a GPU
        monkeypatch.setattr(module, "INTERPRETED", False)


def fuzz_configs(capsys, tiny_config, options, plausible_of_ten):
    tally = Tally()

    @options
    @given(cases(plausible_of_ten))
    def check(case):
        mutations, overrides, damage, n = case
        values = json.loads(json.dumps(tiny_config))
        values["train"] |= {"steps": 1, "save_every": 0}
        for key, value in mutations:
            assign(values, key, value)
        with tempfile.TemporaryDirectory() as folder:
            file, out = Path(folder) / "config.json", Path(folder) / "run"
            file.write_bytes(written(values, damage, n))
            args = ["--config", str(file), "--out", str(out), *(a for o in overrides for a in ("--set", o))]
            before = os.getcwd()
            try:
                resolved = train.main([*args, "--dry-run"])
            except SystemExit as stop:
                resolved = stop.code
            text = capsys.readouterr()
            if resolved == 0 and not is_small(json.loads(text.out)):
                tally.too_large += 1
                return
            code = outcome(capsys, train.main, args, out)
            assert code == 2 or resolved == 0
            if code == 0:
                tally.ran += 1
                assert (out / "metrics.jsonl").read_text().strip() and (out / "report.html").is_file()
            else:
                tally.refused += code == 2
                tally.diverged += code == 1
            assert before == os.getcwd()

    check()
    return tally


def test_configurations(capsys, tiny_config, alone):
    tally = fuzz_configs(capsys, tiny_config, QUICK, 1)
    assert tally.ran > 2 and tally.refused > 50, tally


@pytest.mark.slow
def test_two_thousand_configurations(capsys, tiny_config, alone):
    tally = fuzz_configs(capsys, tiny_config, LONG, 5)
    with capsys.disabled():
        print(f"\n{tally}")
    assert tally.ran > 100 and tally.refused > 400, tally
