"""What a run begins with: the method, an adapter that trains further, the template that a run was taught, a reward model."""

from __future__ import annotations

from headstart.config import Config, Settings, setting
from headstart.data.templates import TEMPLATES
from headstart.errors import Problem, UsageError
from headstart.models.load import find_base, find_labels, read_adapter
from headstart.models.source import Source, find_model
from headstart.run import find_run

WRITES = ("chat", "causal", "preference")  # tasks of models that write text; their adapters are kept as adapters
COMPARED = ("preference", "reward")  # tasks of answers that are held against each other
SMALL_MODEL_BYTES = 250_000_000


def decide_reward(config: Config) -> Config:
    """Decide whether a reward model is made: the objective or the task says so.

    Raises UsageError where objective and task contradict each other.
    """
    settings = config.settings
    task, objective = settings.task, settings.preference.objective
    if (task == "reward" and objective not in ("auto", "reward")) or (
        objective == "reward" and task not in ("auto", "reward")
    ):
        what = f"the task is {task} and the objective {objective}"
        cure = "-s preference.objective=reward alone makes a reward model"
        raise UsageError(Problem("config.bad_value", what, "preference.objective", cure))
    if "reward" in (task, objective):
        return config.decide(
            {
                k: ("reward", "a reward model is made")
                for k, v in (("task", task), ("preference.objective", objective))
                if v == "auto"
            }
        )
    return config


def is_reward_model(name: str) -> bool:
    """Tell whether a model is one that a run made to give rewards."""
    labels = find_labels(find_model(name))
    return labels is not None and labels.task == "reward"


def carry_template(config: Config, task: str) -> dict[str, tuple[str, str]]:
    """Decide that prompts have no template, where the model is a run's that was taught without one.

    A template that it was taught lies with its tokenizer.
    """
    folder = find_run(config.settings.model)
    if task not in ("chat", *COMPARED) or config.given("data.template") or folder is None:
        return {}
    plain = folder.read_config().settings.data.template == "plain"
    return {"data.template": ("plain", f"as {config.settings.model} was taught")} if plain else {}


def decide_adapter(config: Config, source: Source) -> Config:
    """Take over what an adapter that trains further is. Raises UsageError where the user wants it otherwise."""
    settings = config.settings
    if not source.is_adapter:
        return config
    if settings.weights == "random":
        cure = f"-s model={find_base(source).name} has the same shape"
        raise UsageError(Problem("config.no_effect", "an adapter has no shape of its own", "weights", cure))
    adapter = read_adapter(source)
    if settings.method != "lora" or settings.task not in WRITES:
        return config
    targets = adapter["target_modules"]
    own = {
        "lora.rank": adapter["r"],
        "lora.alpha": float(adapter["lora_alpha"]),
        "lora.dropout": float(adapter["lora_dropout"]),
        "lora.targets": (targets,) if isinstance(targets, str) else tuple(sorted(targets)),
    }
    lost = [key for key, value in own.items() if config.given(key) and setting(settings, key) != value]
    if settings.data.template in TEMPLATES:
        lost.append("data.template")
    if lost:
        what = f"the adapter of {source.name} trains further as it is"
        cure = "leave it out; --method full merges the adapter and trains all weights"
        raise UsageError(Problem("config.no_effect", f"`{key}` can't be had: {what}", key, cure) for key in lost)
    return config.decide(
        {key: (value, f"that of {source.name}") for key, value in own.items() if not config.given(key)}
    )


def choose_method(settings: Settings, source: Source, task: str) -> tuple[str, str]:
    """Return whether an adapter is trained or every weight, where the user didn't say, and why."""
    if settings.weights == "random":
        return "full", "an adapter on random weights learns nothing"
    whole = find_base(source) if source.is_adapter else source
    size = sum(file.stat().st_size for file in whole.path.glob("*.safetensors"))
    if task not in WRITES and size < SMALL_MODEL_BYTES:
        return "full", "a small model trains whole in the time of an adapter"
    if task == "images":
        return "full", "an adapter has no place in convolutions"
    return "lora", "an adapter: less memory, nearly the same gain"
