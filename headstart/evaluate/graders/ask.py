"""Models that grade: at an OpenAI-compatible endpoint that the grader names, or on this machine. Chats in, texts or rewards out."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from headstart import machine
from headstart.data.encode import Encoder
from headstart.data.preferences import label_of
from headstart.data.read import Where
from headstart.data.records import Conversation, Message, Related
from headstart.data.related import segment_related
from headstart.data.render import Renderer
from headstart.data.segments import encode_rows
from headstart.engine.forward import EmbeddingReader, RewardReader
from headstart.errors import ModelError, Problem
from headstart.evaluate.generate import generate
from headstart.evaluate.graders.forms import ModelGrader, RewardModel
from headstart.evaluate.score import Floats, embed_rows, score_answers
from headstart.models.load import find_labels, load_model, load_tokenizer, model_length, stop_ids
from headstart.models.source import find_model
from headstart.objectives.preference import Terms, preference_losses

Chat = Sequence[Mapping[str, str]]
AT_ONCE = 4  # questions to an endpoint
TIMEOUT_S = 120.0
TRIES = 4
WAIT_S = 1.0  # before the second try; twice as long before each next
REPLY_MAX = 1 << 20
TOKENS = 64  # of a local model's answer, where the grader says nothing
PACK_TOKENS = 2048
LOCAL = ("localhost", "127.0.0.1", "::1")
AGAIN = (408, 409, 429, 500, 502, 503, 504)  # what may go well later
SAID = 300  # characters of a refusal that are shown
UNREADABLE = (OSError, ValueError, KeyError, IndexError, TypeError, RecursionError, http.client.HTTPException)


def ask(grader: ModelGrader, chats: Sequence[Chat], schema: Mapping[str, Any]) -> list[str]:
    """Return what the grader's model answers to each chat; an endpoint is asked for JSON of `schema`.

    Raises ModelError where the model can't be loaded, or the endpoint can't be reached, refuses or gives no answer.
    """
    if grader.endpoint is None:
        return _ask_here(grader, chats)
    url = check_endpoint(grader)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(lambda chat: _ask_endpoint(grader, url, chat, schema), chats))


def check_endpoint(grader: ModelGrader) -> str:
    """Return the address that is asked.

    Raises ModelError where the network is forbidden, or the key isn't there or can't be sent in a header.
    """
    endpoint = grader.endpoint or ""
    if machine.offline() and urllib.parse.urlsplit(endpoint).hostname not in LOCAL:
        cure = "unset HEADSTART_OFFLINE, or name an endpoint on this machine"
        raise ModelError(Problem("model.offline", f"{grader.name} asks {endpoint}", grader.name, cure))
    if grader.api_key_env and not _key(grader):
        what = f"the key of {grader.name} isn't in the environment"
        raise ModelError(Problem("grader.endpoint", what, grader.name, f"export {grader.api_key_env}=..."))
    if not re.fullmatch(r"[!-~]*", _key(grader)):
        what = f"the key of {grader.name} holds white space, a line's end or a letter beyond ASCII"
        cure = f"export {grader.api_key_env}=... without it (a file of Windows ends its lines with a character more)"
        raise ModelError(Problem("grader.endpoint", what, grader.name, cure))
    return f"{endpoint.rstrip('/')}/chat/completions"


def _key(grader: ModelGrader) -> str:
    return os.environ.get(grader.api_key_env, "") if grader.api_key_env else ""


def _ask_endpoint(grader: ModelGrader, url: str, chat: Chat, schema: Mapping[str, Any]) -> str:
    form = {"type": "json_schema", "json_schema": {"name": "grade", "strict": True, "schema": schema}}
    sampling = grader.sampling_params.model_dump(exclude_none=True)
    if (tokens := sampling.pop("max_completions_tokens", None)) is not None:
        sampling["max_completion_tokens"] = tokens
    body = {"model": grader.model, "messages": list(chat), "response_format": form, **sampling}
    key = _key(grader)
    for attempt in range(TRIES):
        try:
            return _text_of(json.loads(_post(url, body, key)))
        except urllib.error.HTTPError as error:
            said = f"HTTP {error.code} {error.reason}"
            with contextlib.suppress(*UNREADABLE):
                said += f": {error.read(REPLY_MAX).decode(errors='replace')}"
            if error.code not in AGAIN:
                break
        except UNREADABLE as error:
            said = f"{type(error).__name__}: {error}"
        if attempt + 1 < TRIES:
            time.sleep(WAIT_S * 2**attempt)
    said = (said.replace(key, "[key]") if key else said)[:SAID]  # first without the key: a part of it must not stay
    cure = f"see that {grader.endpoint} answers for the model {grader.model}, then run the command again"
    raise ModelError(Problem("grader.endpoint", f"{grader.name} got no grade: {said}", grader.name, cure))


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """The key is sent to the endpoint that is named, and to no other."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _post(url: str, body: Mapping[str, Any], key: str) -> bytes:
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers, method="POST")  # noqa: S310 (http, https)
    with urllib.request.build_opener(_NoRedirect).open(request, timeout=TIMEOUT_S) as reply:
        return bytes(reply.read(REPLY_MAX))


def _text_of(reply: Any) -> str:
    """Return the answer; of a model that refuses none: a number or a label in its excuse is no grade."""
    text = reply["choices"][0]["message"]["content"]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise TypeError("the answer holds no text")
    return text


# --- on this machine ---


def _load(name: str, task: str) -> tuple[Any, Any, Any]:
    source = find_model(name)
    tokenizer = load_tokenizer(source)
    return source, tokenizer, load_model(source, machine.pick_device(), task=task).model


@lru_cache(maxsize=1)
def _chat_model(name: str) -> tuple[Any, Renderer]:
    source, tokenizer, model = _load(name, "chat")
    return model, Renderer(tokenizer, stop_ids(source, tokenizer))


@lru_cache(maxsize=1)
def _embedding_model(name: str) -> tuple[EmbeddingReader, Encoder, int]:
    _, tokenizer, model = _load(name, "embedding")
    return EmbeddingReader(model), Encoder(tokenizer), min(model_length(model.config), tokenizer.model_max_length)


def _ask_here(grader: ModelGrader, chats: Sequence[Chat]) -> list[str]:
    """Return what a local model answers, greedily."""
    model, renderer = _chat_model(grader.model)
    prompts = [renderer.prompt(_messages(chat)) for chat in chats]
    length = model_length(model.config)
    for prompt in prompts:
        if len(prompt) >= length:
            what = f"{grader.name} asks with {len(prompt):,} tokens, and {grader.model} can place {length:,}"
            raise ModelError(Problem("grader.endpoint", what, grader.name, "name a model that reads more"))
    limit = grader.sampling_params.max_completions_tokens or TOKENS
    answers = generate(model, prompts, renderer.stop_ids, [limit] * len(prompts), length)
    return [renderer.answer_text(answer.ids) for answer in answers]


def _messages(chat: Chat) -> list[Message]:
    role = {"developer": "system"}
    return [Message(role.get(turn["role"], turn["role"]), turn["content"]) for turn in chat]


def check_reward_model(grader: RewardModel) -> None:
    """Raise ModelError where the model that a grader names gives no rewards."""
    labels = find_labels(find_model(grader.model))
    if labels is None or labels.task not in ("reward", "regression") or len(labels.names) != 1:
        cure = "make one: headstart tune PAIRS -s preference.objective=reward"
        raise ModelError(Problem("model.kind", f"{grader.name} names no reward model", grader.model, cure))


@lru_cache(maxsize=1)
def _reward_model(name: str) -> tuple[RewardReader, Renderer]:
    source = find_model(name)
    tokenizer = load_tokenizer(source)
    model = load_model(source, machine.pick_device(), task="reward", labels=find_labels(source)).model
    renderer = Renderer(tokenizer, stop_ids(source, tokenizer), whole=True)
    return RewardReader(model, preference_losses(Terms("reward"))), renderer


def give_rewards(grader: RewardModel, chats: Sequence[Chat]) -> list[float | str]:
    """Return the reward of the last turn of each chat, or why it has none: too long for the model, say."""
    reader, renderer = _reward_model(grader.model)
    length = model_length(reader.model.config)
    rows = []
    for number, chat in enumerate(chats):
        *asked, answer = _messages(chat)
        rows.append(Conversation(Where("grader", number), (*asked, replace(answer, trained=True))))
    outcomes = [outcome for part in encode_rows([rows], renderer, max_length=length) for outcome in part]
    examples = [replace(o.example, label=label_of([0.0])) for o in outcomes if o.example]
    rewards = iter(score_answers(reader, examples, PACK_TOKENS))
    return [
        float(next(rewards)[0])
        if o.example
        else o.problem.what
        if o.problem
        else f"{o.length:,} tokens, and {grader.model} can place {length:,}"
        for o in outcomes
    ]


def cosines(name: str, pairs: Sequence[tuple[str, str]]) -> Floats:
    """Return the cosine of the embeddings of each pair of texts, [N]; longer texts are read up to the model's length.

    A text without a token is like none: 0.
    """
    reader, encoder, length = _embedding_model(name)
    rows = [Related(Where("grader", number), pair) for number, pair in enumerate(pairs)]
    made = segment_related(rows, encoder, max_length=length, over_length="cut")
    found = np.zeros(len(pairs))
    if made.examples:
        embedded = embed_rows(reader, made.examples, PACK_TOKENS).reshape(len(made.examples), 2, -1)
        found[[row.where.line for row in made.kept]] = (embedded[:, 0] * embedded[:, 1]).sum(1)
    return found
