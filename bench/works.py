"""What is measured: contenders, the lines of the table with their bars, and how large a run is. Literal tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bench.judge import Bar


@dataclass(frozen=True)
class Contender:
    """A script of `contenders/` on one kind of rows. `venv` is the folder of its environment, where it needs its own.

    `not_alike` says why its losses can't be held against ours step by step, where they can't; `missing` why it never runs.
    """

    script: str
    rows: str
    spec: Mapping[str, Any] = field(default_factory=dict)
    title: str = ""
    not_alike: str = ""
    venv: str = ""
    missing: str = ""


_SEES_OTHERS = "rows of a pack see each other without flash attention"
_OWN_ORDER = "rows come in an order of its own"
_MEAN_OF_MEANS = "its loss is a mean over micro-batches, each with its own mean"

CONTENDERS = {
    "headstart-lora": Contender("headstart_tune", "chat", {"method": "lora"}, "headstart, LoRA"),
    "trl-lora-1": Contender("trl_sft", "chat", {"method": "lora", "micro": 1}, "TRL, LoRA, batch 1 x 4"),
    "trl-lora-4": Contender("trl_sft", "chat", {"method": "lora", "micro": 4}, "TRL, LoRA, batch 4 (pads)"),
    "trl-lora-packing": Contender(
        "trl_sft", "chat", {"method": "lora", "packing": 1024}, "TRL, LoRA, packing to 1,024", _SEES_OTHERS
    ),
    "litgpt-lora": Contender(
        "litgpt_lora",
        "chat",
        {"method": "lora", "micro": 1},
        "LitGPT, LoRA, batch 1 x 4",
        _MEAN_OF_MEANS,
        ".venv-litgpt",
    ),
    "llamafactory-lora": Contender(
        "",
        "chat",
        title="LLaMA-Factory, LoRA",
        missing="not installed: it needs torchvision, torchaudio and older peers",
    ),
    "headstart-full": Contender("headstart_tune", "chat", {"method": "full", "lr": 5e-5}, "headstart, full"),
    "trl-full-1": Contender("trl_sft", "chat", {"method": "full", "lr": 5e-5, "micro": 1}, "TRL, full, batch 1 x 4"),
    "headstart-scored": Contender(
        "headstart_tune", "chat", {"method": "lora", "score": True}, "headstart, LoRA, scored"
    ),
    "trl-scored": Contender("trl_sft", "chat", {"method": "lora", "micro": 1, "score": True}, "TRL, LoRA, scored"),
    "headstart-labels": Contender("headstart_tune", "labels", {"method": "full"}, "headstart, minilm"),
    "trainer-labels": Contender("trainer_labels", "labels", {"method": "full"}, "Trainer, minilm, dynamic padding"),
    "trainer-grouped": Contender(
        "trainer_labels",
        "labels",
        {"method": "full", "grouped": True},
        "Trainer, minilm, grouped by length",
        _OWN_ORDER,
    ),
    "headstart-shared": Contender(
        "headstart_groups", "answers", {"method": "lora", "share": True}, "headstart, shared"
    ),
    "headstart-unshared": Contender(
        "headstart_groups", "answers", {"method": "lora", "share": False}, "headstart, unshared"
    ),
    "headstart-planned": Contender(
        "headstart_tune", "chat", {"method": "lora", "plain": True}, "headstart, LoRA, as it is"
    ),
    "headstart-planned-full": Contender(
        "headstart_tune", "chat", {"method": "full", "lr": 5e-5, "plain": True}, "headstart, full, as it is"
    ),
    "headstart-planned-labels": Contender(
        "headstart_tune", "labels", {"method": "full", "plain": True}, "headstart, minilm, as it is"
    ),
    "headstart-dpo": Contender("headstart_tune", "pairs", {"method": "lora"}, "headstart, DPO, LoRA"),
    "trl-dpo-1": Contender("trl_dpo", "pairs", {"method": "lora", "micro": 1}, "TRL, DPO, LoRA, batch 1 x 4"),
    "headstart-dpo-3": Contender(
        "headstart_tune", "pairs", {"method": "lora", "epochs": 3}, "headstart, DPO, LoRA, three epochs"
    ),
    "trl-dpo-3": Contender(
        "trl_dpo", "pairs", {"method": "lora", "micro": 1, "epochs": 3}, "TRL, DPO, LoRA, batch 1 x 4, three epochs"
    ),
    "products": Contender("products", "chat", {}, "this machine's float32 products"),
}


@dataclass(frozen=True)
class Line:
    """A line of the table: `ours` against `theirs` by a measure of `judge`, and what is to be reached.

    `work` is what it is run by. `check` changes the spec of a further, untimed pair of runs whose losses are compared
    instead of those of the timed ones, where these are random.
    """

    work: str
    text: str
    measure: str
    ours: str
    theirs: str
    bar: Bar | None = None
    check: Mapping[str, Any] | None = None
    once: bool = False


# A rate at which the losses of a few steps fall by more than what they may be apart.
_NO_DROPOUT = {"dropout": 0.0, "steps": 12, "lr": 1e-3}

LINES = (
    Line("sft-lora", "SFT LoRA, speed against TRL's best (batch 1)", "speed", "headstart-lora", "trl-lora-1", Bar(2.0)),
    Line("sft-lora", "SFT LoRA, speed against TRL's batch 4", "speed", "headstart-lora", "trl-lora-4", Bar(4.0)),
    Line("sft-lora", "SFT LoRA, speed against TRL with packing", "speed", "headstart-lora", "trl-lora-packing"),
    Line("sft-lora", "SFT LoRA, speed against LitGPT", "speed", "headstart-lora", "litgpt-lora"),
    Line("sft-lora", "SFT LoRA, speed against LLaMA-Factory", "speed", "headstart-lora", "llamafactory-lora"),
    Line("sft-full", "SFT full, speed against TRL's best (batch 1)", "speed", "headstart-full", "trl-full-1", Bar(1.7)),
    Line(
        "dpo",
        "DPO LoRA, one epoch, the reference pass counted",
        "epoch_speed",
        "headstart-dpo",
        "trl-dpo-1",
        Bar(3.5),
    ),
    Line("dpo", "DPO LoRA, peak memory", "memory", "headstart-dpo", "trl-dpo-1"),
    Line(
        "dpo-epochs",
        "DPO LoRA, three epochs, the reference pass counted",
        "epoch_speed",
        "headstart-dpo-3",
        "trl-dpo-3",
        Bar(4.5),
        once=True,
    ),
    Line(
        "labels",
        "classification, speed against Trainer grouped by length",
        "speed",
        "headstart-labels",
        "trainer-grouped",
        Bar(1.5),
    ),
    Line(
        "labels",
        "classification, speed against Trainer with dynamic padding",
        "speed",
        "headstart-labels",
        "trainer-labels",
        check=_NO_DROPOUT,
    ),
    Line(
        "shared-answers",
        "eight answers to one prompt, speed-up as a part of the ideal",
        "share_of_ideal",
        "headstart-shared",
        "headstart-unshared",
        Bar(0.9),
    ),
    Line(
        "roofline",
        "share of the best product rate in a LoRA step",
        "share_of_products",
        "headstart-lora",
        "products",
        Bar(0.65),
    ),
    Line(
        "memory", "SFT LoRA, peak memory against TRL's best", "memory", "headstart-lora", "trl-lora-1", Bar(0.6, False)
    ),
    Line("memory", "SFT full, peak memory against TRL's best", "memory", "headstart-full", "trl-full-1"),
    Line(
        "eval-loss",
        "loss on held-out rows against TRL's, difference",
        "loss_gap",
        "headstart-scored",
        "trl-scored",
        Bar(0.01, False),
        once=True,
    ),
    *(
        Line(
            "plan",
            f"{text}, planned {what} against measured, difference",
            measure,
            ours,
            ours,
            Bar(limit, False),
            once=True,
        )
        for text, ours in (
            ("SFT LoRA", "headstart-planned"),
            ("SFT full", "headstart-planned-full"),
            ("classification", "headstart-planned-labels"),
        )
        for what, measure, limit in (("memory", "planned_memory", 0.15), ("time", "planned_time", 0.20))
    ),
)


@dataclass(frozen=True)
class Size:
    """How large a run is: rows of each kind, held-out rows that are scored, and rounds."""

    chat: int
    labels: int
    answers: int
    held_out: int
    repeats: int
    pairs: int = 24


SIZES = {
    "quick": Size(chat=8, labels=320, answers=16, held_out=5, repeats=1, pairs=8),
    "usual": Size(chat=24, labels=1_600, answers=32, held_out=20, repeats=3),
    "full": Size(chat=96, labels=4_800, answers=64, held_out=100, repeats=5, pairs=96),
}

# What all contenders on one kind of rows have in common.
SPECS: Mapping[str, Mapping[str, Any]] = {
    "chat": {"model": "smollm2-135m", "batch_size": 4, "lr": 5e-4},
    "labels": {"model": "minilm", "batch_size": 32, "lr": 2e-4},
    "pairs": {"model": "smollm2-135m", "batch_size": 4, "lr": 5e-5, "beta": 0.1},
    "answers": {"model": "smollm2-135m", "batch_size": 8, "lr": 5e-4},
}
COMMON = {"rank": 16, "alpha": 32.0, "seed": 0, "max_length": 1024}
