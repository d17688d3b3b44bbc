"""Configuration files: defaults, overrides, and one clear line for every mistake."""

import json
import re
from pathlib import Path

import pytest

from sidfast.common.errors import UserError
from sidfast.config.deepspeed import _INSTEAD, DEEPSPEED_KEYS
from sidfast.config.schema import Config, build_config, load_config

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.json"))
SMALLEST = {"model": {"teacher": "assets/teacher"}, "data": {"prompts": "captions.txt"}, "train": {"steps": 3}}


def written(tmp_path, values=SMALLEST):
    path = tmp_path / "run.json"
    path.write_text(values if isinstance(values, str) else json.dumps(values), encoding="utf-8")
    return path


def message(path, *overrides):
    """The one line that loading fails with."""
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    text = str(caught.value)
    assert text and len(text.splitlines()) == 1, text
    return text


def test_defaults_are_the_papers(tmp_path):
    config = load_config(written(tmp_path))
    assert (config.train.steps, config.train.images, config.train.total_steps) == (3, None, 3)
    assert config.train.batch_size == 512
    assert config.loss.alpha == 1
    g = config.guidance
    assert (g.kappa1, g.kappa2, g.kappa3, g.kappa4, g.prompt_dropout) == (1.5, 1.5, 1.5, 1.5, 0.1)
    n = config.noise
    assert (n.density, n.t_min, n.t_max, n.t_init, n.options) == ("ddpm", 20, 979, 625, {})
    for adam in (config.optimizer.generator, config.optimizer.fake_score):
        assert (adam.lr, adam.beta1, adam.beta2, adam.eps) == (1e-6, 0, 0.999, None)
    assert (config.ema.half_life, config.ema.ramp_up) == (50_000, 0.05)
    assert config.deepspeed == {} and config.model.resolution is None


def test_file_and_overrides(tmp_path):
    path = written(tmp_path, SMALLEST | {"noise": {"density": "edm", "std": 0.7}, "guidance": {"kappa4": 4.5}})
    config = load_config(path, ["noise.mean=-0.5", "guidance.kappa4=3", "loss.alpha=1.2", "ema.ramp_up=null",
                                "data.prompts=a b=c.txt", "optimizer.fake_score.lr=1e-5", "speed.tf32=false",
                                "deepspeed.zero_optimization.stage=2", 'deepspeed.bf16={"enabled": true}'])
    assert config.noise.options == {"mean": -0.5, "std": 0.7}
    assert config.guidance.kappa4 == 3 and config.guidance.kappa3 == 1.5
    assert config.loss.alpha == 1.2 and config.ema.ramp_up is None
    assert config.data.prompts == "a b=c.txt" and config.speed.tf32 is False
    assert config.optimizer.fake_score.lr == 1e-5 and config.optimizer.generator.lr == 1e-6
    assert config.deepspeed == {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}


@pytest.mark.parametrize("overrides, blamed", [
    (["loss.alpha=1", "train.stepz=3"], "--set train.stepz=3: unknown key train.stepz"),
    (["train.batch_size=5", "loss.alpha=1"], "--set train.batch_size=5: train.batch_size (5) must be a multiple"),
    (['noise={"density": "x"}'], '--set noise={"density": "x"}: noise.density: '),
    (["train.batch_size=many"], "--set train.batch_size=many: train.batch_size: "),
    (["deepspeed.zero_stage=2"], "--set deepspeed.zero_stage=2: deepspeed.zero_stage: DeepSpeed knows no such key"),
    (["train.log_every=5", "train.log_every=-1"], "--set train.log_every=-1: train.log_every: ")], ids=str)
def test_an_override_at_fault_is_named(tmp_path, overrides, blamed):
    with pytest.raises(UserError, match=re.escape(blamed)):
        load_config(written(tmp_path, SMALLEST), overrides)


def test_a_file_at_fault_is_named(tmp_path):
    path = written(tmp_path, SMALLEST | {"noise": {"std": 0.7}})
    with pytest.raises(UserError, match=re.escape(f"{path}: noise.std has no meaning")):
        load_config(path, ["loss.alpha=1.2"])


def test_later_override_wins(tmp_path):
    assert load_config(written(tmp_path), ["train.steps=5", "train.steps=7"]).train.steps == 7


@pytest.mark.parametrize("images, steps", [(1, 1), (64, 1), (65, 2), (640, 10)], ids=str)
def test_images_are_rounded_up_to_steps(tmp_path, images, steps):
    config = load_config(written(tmp_path), ["train.steps=null", f"train.images={images}", "train.batch_size=64"])
    assert config.train.total_steps == steps


def test_resolved_configuration_loads_again(tmp_path):
    config = load_config(written(tmp_path), ["noise.density=laplace", "noise.scale=0.3"])
    assert build_config(json.loads(config.model_dump_json()), "again") == config
    assert Config.model_validate(config.model_dump()) == config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_shipped_configuration_loads(path):
    assert load_config(path).train.total_steps >= 1


def test_first_configuration_is_shipped():
    assert ROOT / "configs" / "ddpm.json" in CONFIGS


# Mistakes. All overrides below are also written into the file itself.

MISSPELT = {
    "guidance.kapa1=2": "guidance.kappa1",
    "guidence.kappa1=2": "guidance",
    "trian.steps=5": "train",
    "train.batchsize=8": "train.batch_size",
    "train.lr=1e-5": "optimizer.generator.lr",
    "train.learning_rate=1e-5": "optimizer.generator.lr",
    "optimizer.fake_score.learning_rate=1e-5": "optimizer.fake_score.lr",
    "train.iterations=5": "train.steps",
    "noise.tmin=30": "noise.t_min",
    "optimizer.generator.bta1=0": "optimizer.generator.beta1",
    "optimizer.fake_score.bta1=0": "optimizer.fake_score.beta1",
    "ema.halflife=5": "ema.half_life",
    "steps=5": "train.steps",
}
WRONG_TYPE = ("train.steps=abc", "train.steps=1.5", "train.steps=[1]", "train.steps=true", "train.batch_size=null",
              "guidance.kappa1=much", "guidance.kappa1=true", "loss.alpha={}", "data.prompts=12", "model.teacher=null",
              "speed.tf32=maybe", "noise.density=5", "train=3", "noise=[]", "optimizer.generator=1e-5", "deepspeed=3",
              "deepspeed.generator=5")
OUT_OF_RANGE = ("train.steps=0", "train.batch_size=-4", "train.micro_batch=0", "train.seed=-1", "train.samples=-1",
                "train.keep=0", "noise.t_min=-1", "noise.t_init=0", "noise.density=edn", "model.resolution=4",
                "guidance.kappa1=1e+30", "guidance.kappa4=-1e+31",
                "guidance.prompt_dropout=1", "guidance.prompt_dropout=-0.1", "optimizer.generator.lr=0",
                "optimizer.fake_score.beta2=1", "optimizer.generator.eps=0", "ema.half_life=-1", "ema.ramp_up=0",
                "evaluation.images=-1", "evaluation.resize=16385", "evaluation.seeds_per_prompt=1000000001")
NOT_FINITE = ("guidance.kappa1=NaN", "guidance.kappa4=Infinity", "loss.alpha=-Infinity",
              "optimizer.generator.lr=Infinity", "ema.half_life=NaN")


@pytest.fixture(params=("file", "set"))
def mistake(request, tmp_path):
    """A function: the message, less the name of the file or of the option, for wrong `key=value`s in either."""
    def find(*settings):
        values = json.loads(json.dumps(SMALLEST))
        if request.param == "file":
            for setting in settings:
                put(values, *setting.split("=", 1))
        path = written(tmp_path, values)
        text = message(path, *(settings if request.param == "set" else ()))
        places = [f"{path}: "] if request.param == "file" else [f"--set {setting}: " for setting in settings]
        [place] = [place for place in places if text.startswith(place)]
        return text.removeprefix(place)
    return find


def put(values, key, value):
    *sections, last = key.split(".")
    for name in sections:
        values = values.setdefault(name, {})
    try:
        values[last] = json.loads(value)
    except json.JSONDecodeError:
        values[last] = value


@pytest.mark.parametrize("setting", MISSPELT)
def test_misspelt_key(mistake, setting):
    text = mistake(setting)
    key = setting.partition("=")[0]
    top = key if key.split(".")[0] in Config.model_fields or "." not in key else key.split(".")[0]
    assert text == f"unknown key {top}; did you mean {MISSPELT[setting]}?"


@pytest.mark.parametrize("key", ("xyzzy", "train.xyzzy"))
def test_key_like_no_other(mistake, key):
    assert mistake(f"{key}=1") == f"unknown key {key}"


@pytest.mark.parametrize("setting", WRONG_TYPE)
def test_wrong_type(mistake, setting):
    assert mistake(setting).startswith(setting.partition("=")[0] + ":")


@pytest.mark.parametrize("setting", OUT_OF_RANGE)
def test_out_of_range(mistake, setting):
    key, _, value = setting.partition("=")
    text = mistake(setting)
    assert text.startswith(f"{key}: ") and value in text, text


@pytest.mark.parametrize("setting", NOT_FINITE)
def test_not_finite(mistake, setting):
    assert mistake(setting).startswith(setting.partition("=")[0] + ":")


@pytest.mark.parametrize("t_min, t_max", [(900, 30), (500, 500), (979, 20)], ids=str)
def test_t_min_must_be_below_t_max(mistake, t_min, t_max):
    text = mistake(f"noise.t_min={t_min}", f"noise.t_max={t_max}")
    assert f"noise.t_min ({t_min})" in text and f"noise.t_max ({t_max})" in text, text


@pytest.mark.parametrize("settings", (["train.images=64"], ["train.steps=null"]), ids=("both", "neither"))
def test_one_of_steps_and_images(mistake, settings):
    text = mistake(*settings)
    assert "train.steps" in text and "train.images" in text, text


def test_batch_must_divide_into_micro_batches(mistake):
    text = mistake("train.batch_size=10", "train.micro_batch=4")
    assert "train.batch_size (10)" in text and "train.micro_batch (4)" in text, text
    text = mistake("train.batch_size=12", "train.micro_batch=4", "train.fake_score_factor=2")
    assert "train.micro_batch (4) x train.fake_score_factor (2)" in text, text


@pytest.mark.parametrize("setting", ("noise.std=1", "noise.rho=3", "noise.mean=0", "noise.shift=2"))
def test_option_of_another_density(mistake, setting):
    text = mistake(setting)
    assert setting.partition("=")[0] in text and "ddpm" in text, text


def test_evaluation_needs_prompts_outside_the_shapes_world(mistake):
    text = mistake("evaluation.images=10")
    assert "evaluation.images" in text and "evaluation.prompts" in text, text


@pytest.mark.parametrize("engine", ("", "generator.", "fake_score."), ids=("both", "generator", "fake_score"))
@pytest.mark.parametrize("key, instead", [
    ("train_batch_size", "train.batch_size"), ("train_micro_batch_size_per_gpu", "train.micro_batch"),
    ("gradient_accumulation_steps", "train.batch_size"), ("optimizer", "optimizer"), ("scheduler", "optimizer")])
def test_reserved_deepspeed_keys(mistake, engine, key, instead):
    text = mistake(f"deepspeed.{engine}{key}=4")
    assert f"deepspeed.{engine}{key}" in text and f"set {instead}" in text, text


@pytest.mark.parametrize("key, near", [
    ("zero_stage", "zero_optimization"), ("zero", "zero_optimization"), ("zero_optim", "zero_optimization"),
    ("BF16.enabled", "bf16"), ("bfloat16.enabled", "bf16"), ("fp16_enabled", "fp16"), ("fp32.enabled", None),
    ("amp.enabled", None), ("fake_scores.zero_optimization.stage", "fake_score"), ("Generator", "generator"),
    ("generator.zero_stage", "zero_optimization"), ("fake_score.generator", None)])
def test_keys_that_deepspeed_does_not_know(mistake, key, near):
    top = ".".join(key.split(".")[:2 if key.startswith(("generator.", "fake_score.")) else 1])
    assert mistake(f"deepspeed.{key}=2") == (
        f"deepspeed.{top}: DeepSpeed knows no such key" + (f"; did you mean {near}?" if near else ""))


@pytest.mark.parametrize("engine", ("", "generator."), ids=("both", "generator"))
def test_negative_gradient_clipping(mistake, engine):
    assert mistake(f"deepspeed.{engine}gradient_clipping=-1") == (
        f"deepspeed.{engine}gradient_clipping: must be at least 0, not -1")


class Asked(dict):
    """A dictionary that remembers the keys it was asked for."""

    def __init__(self, **values):
        super().__init__(values)
        self.keys_asked = set()

    def __contains__(self, key):
        self.keys_asked.add(key)
        return super().__contains__(key)

    def __getitem__(self, key):
        self.keys_asked.add(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        self.keys_asked.add(key)
        return super().get(key, default)

    def keys(self):
        return self

    def __copy__(self):
        return self


def test_keys_are_those_that_deepspeed_asks_for():
    from deepspeed.runtime import config

    section = Asked(train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=1)
    config.DeepSpeedConfig(section)
    refused = {"bfloat16", *_INSTEAD, *config._REMOVED_TOP_LEVEL_CONFIG_KEYS}    # an old name; ours; gone
    joined = {"sequence_parallel_size", "data_parallel_size"}                    # read once processes have joined
    assert section.keys_asked - refused - joined == set(DEEPSPEED_KEYS) - joined


@pytest.mark.parametrize("section", SMALLEST)
def test_missing_section(tmp_path, section):
    path = written(tmp_path, {k: v for k, v in SMALLEST.items() if k != section})
    assert message(path) == f"{path}: {section} is missing"


@pytest.mark.parametrize("key", ("model.teacher", "data.prompts"))
def test_missing_key(tmp_path, key):
    path = written(tmp_path, SMALLEST | {key.split(".")[0]: {}})
    assert message(path) == f"{path}: {key} is missing"


@pytest.mark.parametrize("text, line", [
    ('{\n  "model": {},\n  oops\n}', 3), ('{\n\n"a": [1, 2\n', 4), ("", 1), ('{"a": 1,}', 1), ("{} {}", 1)],
    ids=("word", "cut off", "empty", "comma", "two"))
def test_not_json(tmp_path, text, line):
    path = written(tmp_path, text)
    assert message(path).startswith(f"{path}, line {line}: not JSON")


@pytest.mark.parametrize("text", ("[]", "3", "null", '"train"'))
def test_not_an_object(tmp_path, text):
    path = written(tmp_path, text)
    assert message(path) == f"{path}: must be a JSON object of sections"


def test_missing_file(tmp_path):
    path = tmp_path / "none.json"
    assert message(path) == f"{path}: no such file"


def test_a_folder_and_other_bytes(tmp_path):
    assert message(tmp_path).startswith(f"{tmp_path}: cannot be read")
    path = tmp_path / "latin.json"
    path.write_bytes(b'{"model": "\xe9"}')
    assert message(path).startswith(f"{path}: cannot be read")


@pytest.mark.parametrize("override", ("train.steps", "=3", ".steps=3", "train.=3", "", "train..steps=3"))
def test_override_of_no_key(tmp_path, override):
    assert message(written(tmp_path), override) == f"--set {override}: must be section.key=value"


def test_override_inside_a_value(tmp_path):
    text = message(written(tmp_path), "data.prompts.first=1")
    assert text.startswith("--set data.prompts.first=1: ") and "prompts is not a section" in text
