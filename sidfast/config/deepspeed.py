"""The configuration's `deepspeed` section, as far as it can be judged without DeepSpeed: its keys, and those values
that DeepSpeed would not look at. What it refuses by itself is found by engines/validate.py."""

import difflib

ENGINES = ("generator", "fake_score")
# Keys that follow from others, with those.
_INSTEAD = {"train_batch_size": "train.batch_size", "train_micro_batch_size_per_gpu": "train.micro_batch",
            "gradient_accumulation_steps": "train.batch_size", "optimizer": "optimizer",
            "scheduler": "optimizer.generator.warmup"}
# All others that DeepSpeed 0.19 reads, the likeliest first; it ignores whatever else there is.
DEEPSPEED_KEYS = (
    "zero_optimization", "bf16", "fp16", "gradient_clipping", "activation_checkpointing", "aio", "autotuning",
    "checkpoint", "comet", "comms_logger", "communication_data_type", "compile", "csv_monitor", "data_efficiency",
    "data_parallel_size", "data_types", "dataloader_drop_last", "datastates_ckpt", "disable_allgather",
    "disable_python_gc", "dump_state", "expert_parallel", "flops_profiler", "gradient_allreduce_op",
    "gradient_predivide_factor", "hybrid_engine", "log_level", "managed_gradient_accumulation", "memory_breakdown",
    "pipeline", "prescale_gradients", "seq_parallel_communication_data_type", "sequence_parallel_size",
    "steps_per_print", "tensor_parallel", "tensorboard", "timers", "torch_autocast",
    "use_data_before_expert_parallelism", "vocabulary_size", "wall_clock_breakdown", "wandb", "weight_quantization",
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer")
# Types that DeepSpeed does not look at, or turns into others: "yes" is true to it, and stage "3" is 3.
_TRUTH = ((bool,), "true or false")
_TYPES = {"bf16.enabled": _TRUTH, "fp16.enabled": _TRUTH, "prescale_gradients": _TRUTH,
          "zero_allow_untested_optimizer": _TRUTH, "gradient_clipping": ((int, float), "a number"),
          "zero_optimization.stage": ((int,), "0, 1, 2 or 3")}


def check_deepspeed(section):
    """Raise ValueError, naming the key, for what DeepSpeed would pass over in silence."""
    _check(section, "deepspeed", ENGINES)
    if all(section.get(key, {}).get("enabled") for key in ("bf16", "fp16")):
        raise ValueError("deepspeed: bf16 and fp16 are both enabled; choose one")
    for engine in ENGINES:
        own, name = section.get(engine, {}), f"deepspeed.{engine}"
        _check(own, name)
        for key in ("bf16", "fp16"):
            if key in own:
                raise ValueError(f"{name}.{key}: all networks compute in one type; set deepspeed.{key} instead")
        _check_offload(section.get("zero_optimization", {}) | own.get("zero_optimization", {}), name)


def _check_offload(zero, name):
    """What only stage 3 does, and other stages do otherwise or not at all; `zero`: as an engine gets it."""
    for key in ("offload_param", "offload_optimizer"):
        device, place = (zero.get(key) or {}).get("device", "none"), f"{name}.zero_optimization.{key}"
        if zero.get("stage", 0) != 3 and (device == "nvme" or (key == "offload_param" and device != "none")):
            raise ValueError(f"{place}: {device} needs ZeRO stage 3")
        if device == "nvme" and not zero[key].get("nvme_path"):
            raise ValueError(f"{place}.nvme_path: is missing")


def _check(section, name, further=()):
    """One section; `further`: keys that are ours and not DeepSpeed's."""
    if not isinstance(section, dict):
        raise ValueError(f"{name}: must be a section, not {section!r}")
    for key in section:
        if key in _INSTEAD:
            raise ValueError(f"{name}.{key} follows from the rest; set {_INSTEAD[key]} instead")
        if key not in DEEPSPEED_KEYS and key not in further:
            near = _nearest(key, (*DEEPSPEED_KEYS, *further))
            raise ValueError(f"{name}.{key}: DeepSpeed knows no such key" + (f"; did you mean {near}?" if near else ""))
    for key in ("bf16", "fp16", "zero_optimization"):
        if not isinstance(section.get(key, {}), dict):
            raise ValueError(f"{name}.{key}: must be a section, not {section[key]!r}")
    for key, value in section.get("zero_optimization", {}).items():
        if key.startswith("cpu_offload"):
            raise ValueError(f"{name}.zero_optimization.{key} is of older DeepSpeeds; set "
                             f"{name}.zero_optimization.{'offload_param' if 'param' in key else 'offload_optimizer'} "
                             'to {"device": "cpu"} instead')
        if key.startswith("offload_") and not isinstance(value, dict | None):
            raise ValueError(f"{name}.zero_optimization.{key}: must be a section or null, not {value!r}")
    for place, (kinds, words) in _TYPES.items():
        value, keys = section, place.split(".")
        while keys and keys[0] in value:
            value = value[keys.pop(0)]
        if not keys and type(value) not in kinds:        # (True is an int to isinstance)
            raise ValueError(f"{name}.{place}: must be {words}, not {value!r}")
    if section.get("gradient_clipping", 0) < 0:
        raise ValueError(f"{name}.gradient_clipping: must be at least 0, not {section['gradient_clipping']!r}")


def _nearest(key, known):
    """The known key that is spelt most like another, or begins with the same word (zero_stage, fp16_enabled)."""
    key = key.lower()
    match = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    begins = [name for name in known if name.split("_")[0] == key.split("_")[0]]
    return (match or begins or [None])[0]
