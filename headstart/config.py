"""Every knob of a run, on one typed page, and where each value came from.

A value is `None` where headstart decides it from the model, the data and the machine when the run starts; the resolved
`config.yaml` of the run then holds what was decided and why.
"""

from __future__ import annotations

import codecs
import difflib
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, ValidationError

from headstart.errors import Problem, UsageError

DEFAULT_MODEL = "smollm2-135m"
AUTO = "auto"
# What can be learned, and which kind of fine-tuning that is.
TASKS = {
    "chat": "instruction",
    "causal": "unsupervised",
    "masked": "unsupervised",
    "classification": "supervised",
    "multilabel": "supervised",
    "regression": "supervised",
    "tagging": "supervised",
    "embedding": "supervised",
    "images": "supervised",
    "preference": "preference",
    "reward": "preference",
}
# objectives/preference.py; of `reward` a model comes out that scores answers, in place of one that writes them.
OBJECTIVES = ("dpo", "dpo_norm", "hinge", "ipo", "robust", "simpo", "orpo", "cpo", "kto", "reward")


def _rate(value: Any) -> Any:
    if value is None or value == AUTO:
        return value
    try:
        rate = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        raise ValueError("it should be a number, or auto") from None
    if not (math.isfinite(rate) and rate > 0):
        raise ValueError("it should be a finite number greater than 0, or auto")
    return rate


def _split_commas(value: Any) -> Any:
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def _switch(value: Any) -> Any:
    # YAML reads on and off as truth values.
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


def _names_or_switch(value: Any) -> Any:
    return _split_commas(_switch(value))


# Bytes that stand for themselves in every encoding that rows are parted in; those that escape give them away.
PLAIN = b'{"a": 1}\\x41\\u0041+AGE-.xn--4ca'


def _encoding(value: Any) -> Any:
    try:
        name = codecs.lookup(value).name
        plain = name.startswith(("utf-16", "utf-32")) or PLAIN.decode(name) == PLAIN.decode()
    except (LookupError, ValueError, TypeError):
        plain = False
    if not plain:
        raise ValueError(
            "it should be an encoding of text that Python knows: cp1252, gb18030, shift_jis, utf-16-le, ..."
        )
    return name


Fix = Literal["merge_turns", "fold_system", "redact"]
Names = Annotated[tuple[str, ...], BeforeValidator(_split_commas)]
NamesOrSwitch = Annotated[tuple[str, ...], Field(min_length=1), BeforeValidator(_names_or_switch)]
Count = Annotated[int, Field(ge=1)]
# One validator, so that a bad value is one problem and not one for each form.
Rate = Annotated[
    float | Literal["auto"] | None,
    PlainValidator(_rate, json_schema_input_type=Annotated[float, Field(gt=0)] | Literal["auto"] | None),
]
CountOrOff = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """A group of settings; a name that isn't in it is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DataSettings(Section):
    """What is learned from."""

    train: Names = Field((), description="Files, folders or hub:owner/name to train on.")
    eval: Names = Field((), description="Files to score on; else a part of the training data.")
    format: Literal[
        "auto",
        "messages",
        "sharegpt",
        "alpaca",
        "prompt_completion",
        "columns",
        "labels",
        "tags",
        "related",
        "images",
        "preference",
        "text",
    ] = Field("auto", description="How rows are laid out; auto detects it and says so.")
    encoding: Annotated[str, BeforeValidator(_encoding)] = Field(
        "utf-8", description="What text files without a byte order mark are written in; it is never guessed."
    )
    prompt: str | None = Field(None, description="A column, or a template over columns: 'Summarize: {text}'.")
    completion: str | None = Field(None, description="A column, or a template over columns: the answer.")
    rejected: str | None = Field(
        None, description="A column, or a template over columns: an answer that data.completion is better than."
    )
    text: str | None = Field(None, description="A column, or a template over columns: text to continue or to label.")
    text_pair: str | None = Field(None, description="A column, or a template: the second text of a pair.")
    label: Names = Field((), description="The column of the label (class, list of classes, number, tags), or several.")
    class_weights: Literal["none", "balanced"] = Field(
        "none", description="What a row of a class weighs: all the same, or rare classes more."
    )
    whole_words: bool = Field(False, description="Mask whole words, not pieces of them.")
    train_on: Literal["all", "last"] = Field("all", description="Answers of a conversation that are trained.")
    reasoning: Literal["keep", "drop", "untrained"] = Field(
        "keep", description="What an assistant thinks before an answer: learned, left out, or read and not learned."
    )
    fix: Annotated[tuple[Fix, ...], BeforeValidator(_split_commas)] = Field(
        (),
        description="merge_turns: neighbouring turns of one role become one; fold_system: what a system turn says goes in front of the user's next; redact: [EMAIL] and the like are learned in place of personal data and secrets.",
    )
    control_tokens: Literal["text", "refuse"] = Field(
        "text", description="Control tokens that are spelled in the data: read as text, or refused."
    )
    template: Literal["model", "plain", "chatml", "llama3", "gemma", "mistral", "alpaca"] = Field(
        "model", description="The model's own chat template, one by name, or plain: the answer follows the prompt."
    )
    mix: Names = Field((), description="Other data sets mixed in, each PATH=WEIGHT: 0.2 is 20 rows beside each 100.")
    rows: Count | None = Field(
        None, description="The most rows to train on, by their hashes, so that fewer are always part of more."
    )
    held_out: float | None = Field(
        None, gt=0, description="Rows kept from training: a part below 1, else a number of rows."
    )
    group_by: str | None = Field(
        None, description="A column; rows that agree in it are never on both sides of the split."
    )
    leaks: Literal["auto", "near", "exact"] = Field(
        "auto",
        description="Rows not trained on since they are held out too: near takes those that say nearly the same; auto does where data is small and few rows do.",
    )
    max_length: Count | None = Field(None, description="The most tokens of a row.")
    over_length: Literal["auto", "drop", "cut", "split", "error"] = Field(
        "auto",
        description="Longer rows: drop whole, cut the longest context, split (documents), error; auto drops, or splits.",
    )
    positions: Literal["restart", "continue"] = Field(
        "restart", description="Where the positions of a further piece of a document begin: at 0, or where it was cut."
    )
    max_bad_rows: CountOrOff = Field(0, description="Rows that may be left out because they can't be used.")

    @property
    def redact(self) -> bool:
        """Tell whether personal data and secrets are replaced."""
        return "redact" in self.fix


class LoraSettings(Section):
    """The adapter of `method: lora`."""

    rank: Count = Field(16, description="Rank of the two small matrices beside each adapted one.")
    alpha: float = Field(32.0, gt=0, description="Scale: the adapter's part is alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Share of inputs zeroed before the adapter.")
    targets: Names = Field(("all-linear",), description="Module names to adapt; all-linear is every one but the head.")


class PreferenceSettings(Section):
    """What is learned from answers that are preferred to others."""

    objective: Literal[("auto", *OBJECTIVES)] = Field(  # type: ignore[valid-type]
        "auto",
        description="How answers are held against each other; auto is dpo, or kto for lone answers with a label; reward makes a reward model.",
    )
    beta: float | None = Field(None, gt=0, description="How strongly: the scale of rewards; of ipo the penalty.")
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="The part of the pairs that may be the wrong way round."
    )
    likelihood: float | None = Field(
        None, ge=0, description="What the chosen answer's own loss per token weighs beside; 0 is nothing."
    )


class OptimSettings(Section):
    """AdamW and its learning rate."""

    lr: Rate = Field(None, description="Peak learning rate; auto tries several for a tenth of the run, and chooses.")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="How it falls after the warm-up, to zero at the last step."
    )
    warmup: float | None = Field(
        None, ge=0, description="Steps over which it rises: a part of all below 1, else a number."
    )
    weight_decay: float = Field(0.0, ge=0, description="Decay of matrices; never of norms and biases.")
    clip: float = Field(1.0, ge=0, description="Largest norm of a step's gradient; 0 is off.")
    not_finite: Literal["skip", "rollback", "stop"] = Field(
        "skip",
        description="A step that isn't finite: left out, with the weights of the last checkpoint, or the end. Three in a row end the run.",
    )


class EngineSettings(Section):
    """How the work is laid on the machine; nothing here changes the gradient."""

    tokens_per_pack: Count | None = Field(None, description="Tokens that go through the model at once.")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Numbers inside the model; auto is float32 on the CPU."
    )
    checkpointing: Annotated[Literal["auto", "on", "off"], BeforeValidator(_switch)] = Field(
        "auto", description="Recompute activations in the backward pass: less memory, more time."
    )
    fast: Annotated[Literal["auto", "on", "off"], BeforeValidator(_switch)] = Field(
        "auto", description="Run known layers as fused functions; auto does on the CPU in float32. Same gradient."
    )
    threads: Count | None = Field(None, description="CPU threads.")


class EvalSettings(Section):
    """How the model is scored."""

    every: CountOrOff | None = Field(None, description="Steps between evaluations; 0 is never.")
    rows: Count | None = Field(None, description="The most held-out rows that are scored.")
    generate: CountOrOff | None = Field(None, description="Held-out rows answered before and after; 0 is none.")
    choices: Annotated[Literal["auto", "on", "off"], BeforeValidator(_switch)] = Field(
        "auto", description="Pick answers from those of the training data; auto does where a few stand again and again."
    )
    graders: Names = Field((), description="Grader files by which the answers are scored before and after, too.")
    guard: NamesOrSwitch = Field(
        ("auto",),
        description="Is what it knew kept? auto scores general text and questions before and after; off, or own files.",
    )
    patience: CountOrOff = Field(
        3, description="Evaluations without a better one after which training stops; 0 is never."
    )


class SaveSettings(Section):
    """Checkpoints."""

    every: CountOrOff | None = Field(None, description="Steps between checkpoints; 0 is only at the end.")
    keep: Count = Field(2, description="Checkpoints kept beside the best one.")


class Settings(Section):
    """All settings of a run."""

    model: str = Field(DEFAULT_MODEL, description="A built-in name, a folder, a .gguf file, a hub id or a run.")
    kind: Literal["auto", "unsupervised", "supervised", "instruction", "preference"] = Field(
        "auto",
        description="Text to continue, labels to tell, answers to learn, or answers to prefer; auto sees it from the data.",
    )
    task: Literal[("auto", *TASKS)] = Field(  # type: ignore[valid-type]
        "auto", description="What exactly is learned; auto sees it from the data and the model."
    )
    weights: Literal["pretrained", "random"] = Field(
        "pretrained", description="Where the model begins; random is for seeing what the head start is worth."
    )
    method: Literal["lora", "full"] | None = Field(None, description="Train an adapter, or every weight.")
    out: str | None = Field(None, description="The run folder.")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(0, description="Seed of every random choice.")
    epochs: float | None = Field(None, gt=0, description="Times that each row is seen.")
    steps: Count | None = Field(None, description="Optimizer steps; instead of epochs.")
    batch_size: Count | None = Field(None, description="Rows per optimizer step, exactly.")
    data: DataSettings = DataSettings()
    lora: LoraSettings = LoraSettings()
    preference: PreferenceSettings = PreferenceSettings()
    optim: OptimSettings = OptimSettings()
    engine: EngineSettings = EngineSettings()
    eval: EvalSettings = EvalSettings()
    save: SaveSettings = SaveSettings()


class Override(NamedTuple):
    """One value from outside: its dotted key, the value and who gave it."""

    key: str
    value: Any
    source: str


@dataclass(frozen=True)
class Config:
    """Settings with the source of each: `default`, a flag, a file's name, or `auto: why`."""

    settings: Settings
    sources: Mapping[str, str]

    def source(self, key: str) -> str:
        """Return who gave the value of a dotted key."""
        return self.sources.get(key, "default")

    def given(self, key: str) -> bool:
        """Tell whether a user gave this value."""
        return key in self.sources and not self.sources[key].startswith("auto: ")

    def decide(self, values: Mapping[str, tuple[Any, str]]) -> Config:
        """Fill in values that were left to headstart: dotted key -> (value, why)."""
        tree = self.settings.model_dump()
        sources = dict(self.sources)
        for key, (value, why) in values.items():
            _put(tree, key, value)
            sources[key] = f"auto: {why}"
        return replace(self, settings=Settings.model_validate(tree), sources=sources)

    def pin(self, values: Mapping[str, Any]) -> Config:
        """Say values more exactly; who gave them stays."""
        tree = self.settings.model_dump()
        for key, value in values.items():
            _put(tree, key, value)
        return replace(self, settings=Settings.model_validate(tree))

    def fixed(self) -> Config:
        """Return the settings with what was decided taken as given: a run that goes on decides nothing anew."""
        return replace(self, sources={key: source.removeprefix("auto: ") for key, source in self.sources.items()})

    def render(self) -> str:
        """Return the settings as YAML, each with its source as a comment."""
        lines = ["# headstart: the resolved settings of this run, each with where its value came from"]
        for name, value in self.settings.model_dump(mode="json").items():
            if isinstance(value, dict):
                lines.append(f"{name}:")
                lines += [self._line(f"{name}.{key}", inner, "  ") for key, inner in value.items()]
            else:
                lines.append(self._line(name, value, ""))
        return "\n".join(lines) + "\n"

    def _line(self, key: str, value: Any, indent: str) -> str:
        dumped = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6)
        text = dumped.removesuffix("\n").removesuffix("\n...")
        if "\n" in text:  # read back line by line, so each value stands on one
            quoted = yaml.safe_dump(value, default_flow_style=True, default_style='"', allow_unicode=True, width=10**6)
            text = quoted.removesuffix("\n")
        source = self.source(key)
        if value is None and source == "default":
            source = "auto: decided when the run starts"
        return f"{indent}{key.rpartition('.')[2]}: {text}  # {source}"


def build_config(file: Path | None = None, overrides: Iterable[Override] = (), under: Config | None = None) -> Config:
    """Lay a config file and then overrides over the defaults, or what lies `under`. A null is as if the key weren't there.

    Raises UsageError with every problem at once: unknown keys (with the nearest known one), bad values, settings
    that would have no effect.
    """
    config = _lay_over(file, overrides, under)
    if problems := _without_effect(config):
        raise UsageError(problems)
    return config


def _lay_over(file: Path | None, overrides: Iterable[Override], under: Config | None = None) -> Config:
    tree: dict[str, Any] = under.settings.model_dump() if under else {}
    sources: dict[str, str] = dict(under.sources) if under else {}
    given = [item for item in (*_read_yaml(file), *overrides) if item.value is not None]
    known = known_keys()
    problems = [_unknown_key(item, known) for item in given if item.key not in known]
    for item in given:
        if item.key in known:
            _put(tree, item.key, item.value)
            sources[item.key] = item.source
    try:
        settings = Settings.model_validate(tree)
    except ValidationError as error:
        problems += [_bad_value(detail, sources) for detail in error.errors()]
        raise UsageError(problems) from None
    if problems:
        raise UsageError(problems)
    return Config(settings, sources)


def read_resolved(path: Path) -> Config:
    """Read a run's own `config.yaml`, its sources included."""
    config = _lay_over(path, ())
    sources = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        body, mark, source = line.rpartition("  # ")
        if not mark:
            if line.endswith(":"):
                section = line[:-1]
            continue
        key = body.partition(":")[0]
        sources[f"{section}.{key.strip()}" if key.startswith("  ") else key] = source
    sources = {k: s for k, s in sources.items() if s not in ("default", "auto: decided when the run starts")}
    return replace(config, sources=sources)


def as_names(value: str | Path | Sequence[str | Path]) -> list[str]:
    """Return one name or several as a list of texts."""
    return [str(value)] if isinstance(value, str | Path) else [str(item) for item in value]


def known_keys() -> dict[str, str]:
    """Return every dotted key with its description."""
    keys: dict[str, str] = {}
    for name, field in Settings.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            for inner, inner_field in field.annotation.model_fields.items():
                keys[f"{name}.{inner}"] = inner_field.description or ""
        else:
            keys[name] = field.description or ""
    return keys


class _StrictLoader(yaml.SafeLoader):
    """YAML without custom tags and aliases, in which a key that stands twice is an error."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):  # a few of which can stand for more than any memory holds
            raise yaml.composer.ComposerError(
                None,
                None,
                "an alias (*name) has no use here",
                self.peek_event().start_mark,  # type: ignore[no-untyped-call]
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                what = "a value that begins with { or [ must stand in quotes"
                raise yaml.constructor.ConstructorError(None, None, what, key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path | None) -> list[Override]:
    if path is None:
        return []
    try:
        text = path.read_text(encoding="utf-8")
        tree = yaml.load(text, _StrictLoader)  # noqa: S506 (a SafeLoader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UsageError(
            Problem("config.unreadable", f"the config file can't be read: {error}", str(path), "mend the file")
        ) from None
    if tree is None:
        return []
    if not isinstance(tree, dict):
        raise UsageError(
            Problem(
                "config.unreadable",
                "a config file holds `key: value` lines",
                str(path),
                "see `headstart config render`",
            )
        )
    found = []
    for key, value in tree.items():
        if isinstance(value, dict):
            found += [Override(f"{key}.{inner}", item, path.name) for inner, item in value.items()]
        else:
            found.append(Override(str(key), value, path.name))
    return found


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    section, _, name = key.rpartition(".")
    (tree.setdefault(section, {}) if section else tree)[name] = value


def _unknown_key(item: Override, known: Mapping[str, str]) -> Problem:
    by_name = {key.rpartition(".")[2]: key for key in known}
    near = difflib.get_close_matches(item.key, known, n=1, cutoff=0.6)
    if not near:
        near = [by_name[n] for n in difflib.get_close_matches(item.key.rpartition(".")[2], by_name, n=1)]
    cure = f"did you mean `{near[0]}`?" if near else "`headstart config render` lists every setting"
    return Problem("config.unknown_key", f"there is no setting `{item.key}`", item.source, cure)


def _bad_value(detail: Any, sources: Mapping[str, str]) -> Problem:
    key = ".".join(str(part) for part in detail["loc"] if isinstance(part, str))
    message = detail["msg"].replace("Input should be", "it should be")
    what = f"`{key}` can't be {detail['input']!r}: {message}"
    return Problem("config.bad_value", what, sources.get(key, ""), known_keys().get(key, ""))


def _without_effect(config: Config) -> list[Problem]:
    settings = config.settings
    pairs = [
        ("epochs", config.given("steps"), "`steps` is given too"),
        ("data.held_out", bool(settings.data.eval), "`data.eval` is given too"),
        ("data.text", settings.kind == "instruction", "`kind` is instruction"),
        ("data.text", settings.data.prompt is not None, "`data.prompt` is given too"),
        ("data.train_on", settings.kind in ("unsupervised", "supervised"), f"`kind` is {settings.kind}"),
        ("data.prompt", settings.kind in ("unsupervised", "supervised"), f"`kind` is {settings.kind}"),
        ("data.label", settings.kind in ("unsupervised", "instruction", "preference"), f"`kind` is {settings.kind}"),
        ("data.group_by", bool(settings.data.eval), "`data.eval` is given, so nothing is split"),
        *((f"lora.{name}", settings.method == "full", "`method` is full") for name in LoraSettings.model_fields),
        ("eval.graders", settings.eval.generate == 0, "`eval.generate` is 0, so nothing is answered"),
        ("eval.graders", settings.kind == "unsupervised", "`kind` is unsupervised, so nothing is answered"),
        ("eval.patience", settings.eval.every == 0, "`eval.every` is 0, so nothing is compared"),
    ]
    return [
        Problem(
            "config.no_effect", f"`{key}` has no effect: {why}", config.source(key), f"leave out `{key}`, or the other"
        )
        for key, clash, why in pairs
        if clash and config.given(key) and setting(settings, key) is not None
    ]


def flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings, as plain values, by their dotted keys."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= {f"{name}.{key}": inner for key, inner in value.items()} if isinstance(value, dict) else {name: value}
    return found


def setting(settings: Settings, key: str) -> Any:
    """Return the value of a dotted key."""
    value: Any = settings
    for name in key.split("."):
        value = getattr(value, name)
    return value
