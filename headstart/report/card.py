"""The model card: what was tuned on what, what it gained, and the few lines that load it without headstart."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headstart.data.templates import TEMPLATES
from headstart.display import safe
from headstart.report.words import guard_words, lineage_facts, score_table, sentence, speed_facts

LORA = """```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained({base}{revision}, dtype="{dtype}")
tokenizer = AutoTokenizer.from_pretrained({model})
{room}model = PeftModel.from_pretrained(base, {model})
{rest}```
"""
FULL = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({model}, dtype="{dtype}")
tokenizer = AutoTokenizer.from_pretrained({model})
{rest}```
"""
PIPELINE = """```python
from transformers import pipeline

tell = pipeline("{pipeline}", model={model}, dtype="{dtype}"{more})
print(tell("..."))
```
"""
NUMBERS = """```python
from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained({model}, dtype="{dtype}")
tokenizer = AutoTokenizer.from_pretrained({model})
found = model(**tokenizer("...", return_tensors="pt")).logits[0]
{rest}print(found.tolist())
```
"""
REWARD = """```python
from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained({model}, dtype="{dtype}")
tokenizer = AutoTokenizer.from_pretrained({model})
{rest}print(model(**inputs).logits[0, 0].item())  # of two answers to one prompt the better one has more
```
"""
JUDGED = """messages = [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]
inputs = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
"""
EMBEDDING = """```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer({model})
print(model.similarity(model.encode("..."), model.encode("...")))
```
"""
IMAGES = (
    """```python
import headstart

headstart.predict({model}, "a folder of images", "found.jsonl")
```

or, with torchvision at hand:

"""
    + PIPELINE
)
CHAT = """messages = [{{"role": "user", "content": "..."}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
"""
PLAIN = """inputs = tokenizer("...", return_tensors="pt")
"""
ANSWER = """output = model.generate(**inputs, max_new_tokens=512, do_sample=False, repetition_penalty=1.0, eos_token_id={stop_ids})
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
"""


SHAPES = {
    "classification": PIPELINE,
    "multilabel": PIPELINE,
    "regression": NUMBERS,
    "tagging": PIPELINE,
    "masked": PIPELINE,
    "images": IMAGES,
    "embedding": EMBEDDING,
    "reward": REWARD,
}
PIPELINES = {"tagging": "token-classification", "masked": "fill-mask", "images": "image-classification"}
MORE = {"tagging": ', aggregation_strategy="simple"', "multilabel": ", top_k=None"}
TAGS = PIPELINES | {
    "embedding": "sentence-similarity",
    **dict.fromkeys(("chat", "causal", "preference"), "text-generation"),
}
RANDOM = ", from random weights of its shape"
ROOM = """if len(tokenizer) > base.get_input_embeddings().weight.shape[0]:
    base.resize_token_embeddings(len(tokenizer))
"""
UNITS = "found = found * found.new_tensor({spread}) + found.new_tensor({mean})  # in the units of the data\n"


def model_card(folder: Path, result: Mapping[str, Any], template: str) -> str:
    """Return the card as Markdown with the hub's metadata on top."""
    model, under = result["model"], result["base"] or result["model"]
    head = ["---", *_metadata(under, result), "---"]
    scores = [
        f"| {_text(name)} | {before} | {after} | {difference} | {counted} |"
        for name, before, after, difference, _, counted in score_table(result)
    ]
    rest = (PLAIN if template == "plain" else CHAT.format()) + ANSWER.format(stop_ids=result["stop_ids"])
    shape = SHAPES.get(result["task"], LORA if result["method"] == "lora" else FULL)
    if result["task"] == "regression":
        rest = UNITS.format(**result["scale"]) if result["scale"] else ""
    if result["task"] == "reward":
        rest = JUDGED
    code = ", trust_remote_code=True" if result["task"] == "images" else ""
    snippet = shape.format(
        model=_literal(str(folder / "model")),
        base=_literal(under["name"].partition("@")[0] if under["kind"] == "hub" else under["path"]),
        revision=f", revision={_literal(under['revision'])}" if under["revision"] else "",
        dtype=result["dtype"],
        rest=rest,
        room=ROOM if template in TEMPLATES else "",
        pipeline=PIPELINES.get(result["task"], "text-classification"),
        more=code + MORE.get(result["task"], ""),
    )
    rows = min(result["rows"]["train"], result["tokens"]["rows_seen"])
    begun = f"{model['name']}{' at ' + model['revision'] if model['revision'] else ''}"
    return "\n".join(
        [
            *head,
            f"# {_text(folder.name)}",
            "",
            f"{_text(begun)}, fine-tuned ({result['task']}, {result['method']}) on {rows:,} rows{RANDOM * (result['weights'] == 'random')}.",
            *(["", f"It began with an adapter: {_text(result['plan']['start'])}."] if result["base"] else []),
            "",
            f"**{_text(sentence(result))}.**",
            "",
            "| | before | after | difference, 95% interval | over |",
            "|---|---|---|---|---|",
            *scores,
            "",
            _known(result),
            "",
            *_lineage(result),
            "## Training",
            "",
            *(f"- {name}: {value}" for name, value in speed_facts(result)),
            "",
            "## Use",
            "",
            snippet,
        ]
    )


def _known(result: Mapping[str, Any]) -> str:
    guard = result["guard"]
    if isinstance(guard, str):
        return "What it knew before was not measured."
    said = guard_words(guard)
    return f"General text and questions: {_text(said)}."


def _lineage(result: Mapping[str, Any]) -> list[str]:
    facts = lineage_facts(result.get("lineage"))
    return ["## Lineage", "", *(f"- {name}: {_text(value)}" for name, value in facts), ""] if facts else []


def _metadata(model: Mapping[str, Any], result: Mapping[str, Any]) -> list[str]:
    task = result["task"]
    lines = ["tags: [headstart]", f"pipeline_tag: {TAGS.get(task, 'text-classification')}"]
    adapter = result["method"] == "lora" and task in ("chat", "causal", "preference")
    library = "peft" if adapter else "sentence-transformers" if task == "embedding" else "transformers"
    lines.append(f"library_name: {library}")
    if model["kind"] == "hub":
        lines.append(f"base_model: {_value(model['name'].partition('@')[0])}")
    if model["license"]:
        lines.append(f"license: {_value(model['license'].lower())}")
    return lines


MARKUP = re.compile(r"([\\`*\[\]|])")
UNQUOTED = re.compile(r"[\w./@+-]+")


def _text(text: str) -> str:
    """Return a name as Markdown that shows it, whatever it spells: no markup, no HTML, no link, one line."""
    return MARKUP.sub(r"\\\1", html.escape(safe(text).replace("\n", " "), quote=False))


def _literal(text: str) -> str:
    """Return a text as Python writes it, in which nothing ends a block of code or begins a tag."""
    escaped = json.dumps(text)
    return escaped.replace("<", "\\x3c").replace("`", "\\x60")


def _value(text: str) -> str:
    """Return a text as YAML: as it is where that is plain."""
    return text if UNQUOTED.fullmatch(text) else json.dumps(text).replace("<", "\\u003c")
