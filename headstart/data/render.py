"""Conversations -> token ids: the one renderer, used by training, evaluation and chat alike.

A chat template is text with holes. Each content is put into its hole as a mark that no template and no text holds; what
the template writes around the marks is known to be the template's, and what replaces a mark is known to be content.
So control tokens are taken from the template alone, by id, and content is encoded as text, whatever it spells. An answer
begins where the template's own generation prompt ends, and ends with its stop token: nothing is ever searched for.
"""

from __future__ import annotations

import datetime
import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from headstart.data.bounded import BoundedTemplate
from headstart.data.encode import Encoder, Run, split_keep
from headstart.data.opaque import is_opaque
from headstart.data.read import Where
from headstart.data.records import Conversation, Message
from headstart.data.shapes import Shape, ShapeKey, join_known, shape_of, stand_in
from headstart.data.templates import TEMPLATES, give_template
from headstart.errors import ModelError, Problem

# Private-use characters; the quote between them shows whether the template wrote the content as JSON (\") or as it is.
MARK = re.compile('\ue000(\\d+)(\\\\*)"\ue001')
WRITTEN = ("content", "tool_calls", "reasoning_content")
THOUGHT = "<think>\n{}\n</think>\n\n"  # how models write it that know it
SHAPES_MAX = 4096
Strip = Callable[[str], str]


class Renderer(Encoder):
    """The model's tokenizer and chat template, as a function from conversations to tokens.

    `tokenizer` is a transformers tokenizer with a fast backend, `stop_ids` the tokens that end an answer,
    `template` is `model` (its own chat template), one by name, which the tokenizer is then given, or `plain` (the answer
    follows the prompt directly). `today` is the date for templates that write one, fixed so that a run is the same on any day.
    With `whole`, conversations are read to the last token that the template writes, and nothing of them is trained.

    Raises ModelError where the tokenizer or the template can't be used.
    """

    def __init__(
        self,
        tokenizer: Any,
        stop_ids: Sequence[int],
        template: str = "model",
        today: datetime.date | None = None,
        *,
        whole: bool = False,
    ) -> None:
        if template in TEMPLATES:
            give_template(tokenizer, template)
        super().__init__(tokenizer)
        self._today = today or datetime.date.today()
        self._plain = template == "plain"
        self._whole = whole
        if not self._plain and not tokenizer.chat_template:
            cure = (
                "tune its chat model, give it a template by name (-s data.template=chatml), or say that the answer follows "
                "the prompt directly: -s data.template=plain"
            )
            raise ModelError(Problem("model.template", "the model has no chat template", "", cure))
        self.stop_ids = tuple(dict.fromkeys(int(id_) for id_ in stop_ids))
        self._templates: dict[str, BoundedTemplate] = {}
        self._stop_id = self._find_stop()
        self._writes_reasoning = not self._plain and self._find_reasoning()
        self._opaque = (
            not self._plain and isinstance(tokenizer.chat_template, str) and is_opaque(tokenizer.chat_template)
        )
        self._shapes: dict[ShapeKey, Shape | None] = {}
        self._stop_text = next((text for text, (id_, _) in self._control.items() if id_ == self._stop_id), "")

    @property
    def identity(self) -> list[Any]:
        """All that the ids depend on, the template included, and the date if it writes one."""
        template = "plain" if self._plain else str(self.tokenizer.chat_template)
        return [
            *super().identity,
            *["whole"] * self._whole,
            template,
            self._today.isoformat() if "strftime_now" in template else "",
        ]

    # --- the three uses ---

    def training(self, conversation: Conversation) -> list[list[Run]] | Problem:
        """Return the sequences of a conversation: one, or one an answer where the template rewrites earlier turns."""
        try:
            if self._whole:
                return [self._read(conversation)]
            if self._plain:
                return self._plain_training(conversation)
            return self._chat_training(conversation)
        except _TemplateError as error:
            cure = f"mend the turns, or delete the row{_joining(conversation.messages)}"
            return Problem("row.template", f"the chat template refuses the row: {error}", str(conversation.where), cure)

    def prompt(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """Return the ids after which the model answers. Raises ModelError where the template refuses the messages."""
        try:
            runs = self._plain_prompt(messages) if self._plain else self._chat_prompt(messages, tools)
        except _TemplateError as error:
            raise ModelError(Problem("model.template", f"the chat template refuses: {error}")) from None
        return [int(id_) for id_ in self.encode([runs])[0].ids]

    def document(self, text: str, *, end: bool) -> list[Run]:
        """Return a text to continue, all of it trained; with `end`, its end too."""
        begin = [Run("", id_) for id_ in self.begin()]
        return [*begin, Run(text, None, trained=True), *([Run("", self._stop_id, trained=True)] if end else [])]

    # --- a chat template ---

    def _chat_training(self, conversation: Conversation) -> list[list[Run]]:
        key = shape_of(conversation) if self._opaque else None
        if key is None:
            marked, sequences = self._sequences(conversation)
            return [self._runs(marked, text, spans) for text, spans in sequences]
        if key not in self._shapes:
            if len(self._shapes) >= SHAPES_MAX:
                self._shapes.clear()
            self._shapes[key] = self._learn_shape(key)
        shape = self._shapes[key]
        if shape is None:
            marked, sequences = self._sequences(conversation)
            return [self._runs(marked, text, spans) for text, spans in sequences]
        return shape.fill(conversation.messages)

    def _read(self, conversation: Conversation) -> list[Run]:
        """Return all of a conversation, to be read and not learned: what transformers' `apply_chat_template` gives."""
        marked, text = self._mark(self._with_thoughts(conversation.messages), conversation.tools)
        return self._runs(marked, text, [])

    def _mark(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> tuple[_Marked, str]:
        """Return marks for what messages and tools hold, and the text in which these are written."""
        marked = _Marked(messages, tools, self._control_text)
        text = self._render(marked.messages, marked.tools)
        self._match_plain(marked, text, messages, tools)
        self._check_written(marked, text, messages, tools)
        return marked, text

    def _learn_shape(self, key: ShapeKey) -> Shape | None:
        """Return how conversations of a shape are written; None where each has to be looked at by itself."""
        told = [
            (role, f" \n{number}\n " if filled else "", trained) for number, (role, filled, trained) in enumerate(key)
        ]
        messages = tuple(Message(role, content, trained) for role, content, trained in told)
        try:
            marked, sequences = self._sequences(Conversation(Where("", 0), messages))
        except _TemplateError:
            return None
        strips = marked.strips
        marked.stand_in([stand_in(number) for number, (_, filled, _) in enumerate(key) if filled])
        written = [self._runs(marked, text, spans) for text, spans in sequences]
        if any(token.lstrip or token.rstrip for _, token in self._control.values()):
            return None  # such tokens take white space from contents
        return Shape([join_known(runs, self._known) for runs in written], [strips.get(role) for role, _, _ in key])

    def _known(self, run: Run) -> tuple[int, ...]:
        """Return the ids of a run that holds no content."""
        return tuple(self.encode([[run]])[0].ids.tolist())

    def _sequences(self, conversation: Conversation) -> tuple[_Marked, list[tuple[str, list[tuple[int, int]]]]]:
        """Return a conversation's marks, and its marked texts with the places that are trained in each."""
        messages = self._with_thoughts(conversation.messages)
        marked, whole = self._mark(messages, conversation.tools)
        spans = []
        for index, message in enumerate(messages):
            if message.trained:
                prompt = self._render(marked.messages[:index], marked.tools, generation=True)
                alone = (
                    whole if index + 1 == len(messages) else self._render(marked.messages[: index + 1], marked.tools)
                )
                if not alone.startswith(prompt):
                    raise _TemplateError("its generation prompt does not begin its own answer")
                if self._writes_reasoning and message.reasoning and not marked.writes_thought(index, alone):
                    raise _TemplateError(f"it does not write the reasoning of turn[{index}]")
                start = marked.start_of(index, alone) if message.silent and message.reasoning else len(prompt)
                spans.append((alone, start, self._end(alone, max(len(prompt), marked.end_of(index, alone)))))
        if all(whole.startswith(alone[:end]) and self._stops(alone[:end]) for alone, _, end in spans):
            last = spans[-1][2]
            return marked, [(whole[:last], [(start, end) for _, start, end in spans])]
        return marked, [(alone[:end], [(start, end)]) for alone, start, end in spans]

    def _chat_prompt(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> list[Run]:
        messages = self._with_thoughts(messages)
        marked = _Marked(messages, tools, self._control_text)
        text = self._render(marked.messages, marked.tools, generation=True)
        self._match_plain(marked, text, messages, tools, generation=True)
        return self._runs(marked, text, [])

    def _render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], *, generation: bool = False
    ) -> str:
        """Return what transformers' `apply_chat_template` gives, within bounds and on the day of the run."""
        given = list(tools) or None
        try:
            template = self._bounded(self.tokenizer.get_chat_template(tools=given))
            return template.render(
                **self.tokenizer.special_tokens_map,
                messages=[_with_other_names(message) for message in messages],
                tools=given,
                documents=None,
                add_generation_prompt=generation,
                strftime_now=self._today.strftime,
            )
        except Exception as error:  # what a template can do wrong, nobody lists
            raise _TemplateError(str(error) or type(error).__name__) from None

    def _bounded(self, text: str) -> BoundedTemplate:
        from transformers.utils.chat_template_utils import _compile_jinja_template

        if text not in self._templates:
            self._templates[text] = BoundedTemplate(_compile_jinja_template("").environment, text)
        return self._templates[text]

    def _match_plain(
        self,
        marked: _Marked,
        whole: str,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        *,
        generation: bool = False,
    ) -> None:
        """Make the marks stand for what the template makes of the contents; refuse a template that rewrites them."""
        plain = self._render([_as_mapping(message) for message in messages], tools, generation=generation)
        roles = marked.roles_with_edges()
        for strips in itertools.product(STRIPS, repeat=len(roles)):
            by_role = dict(zip(roles, strips, strict=True))
            if marked.fill(whole, by_role) == plain:
                marked.settle(by_role)
                return
        raise _TemplateError("it rewrites the text of a turn, so that the trained tokens can't be known")

    def _check_written(
        self, marked: _Marked, whole: str, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]
    ) -> None:
        """Refuse a row of which the template leaves something out."""
        written = {int(match[1]) for match in MARK.finditer(whole)}
        for index, message in enumerate(messages):
            missing = marked.needed(index) - written
            named = all(call["function"]["name"] in whole for call in message.tool_calls)
            if missing or not named:
                part = "the tool call" if message.tool_calls else "the text"
                raise _TemplateError(f"it does not write {part} of turn[{index}] ({message.role})")
        if tools and self._render(marked.messages, ()) == whole:
            raise _TemplateError("it does not write the tools")

    def _end(self, text: str, begin: int) -> int:
        """Return where the answer ends in `text`: behind the stop token that the template writes after `begin`."""
        found = text.find(self._stop_text, begin) if self._stop_text else -1
        return found + len(self._stop_text) if found >= 0 else len(text)

    def _stops(self, text: str) -> bool:
        return bool(self._stop_text) and text.endswith(self._stop_text)

    def _runs(self, marked: _Marked, text: str, spans: Sequence[tuple[int, int]]) -> list[Run]:
        """Cut a marked text into runs: at control tokens, and where an answer begins or ends."""
        cuts = sorted({0, len(text), *(edge for span in spans for edge in span if edge <= len(text))})
        runs: list[Run] = []
        for start, end in zip(cuts, cuts[1:], strict=False):
            trained = any(a <= start and end <= b for a, b in spans)
            runs += self._cut(
                marked, text[start:end], trained, after_control=not runs or runs[-1].control_id is not None
            )
            if trained and (not runs or runs[-1].control_id not in self.stop_ids):
                runs.append(Run("", self._stop_id, trained=True))
        return runs

    def _cut(self, marked: _Marked, text: str, trained: bool, *, after_control: bool) -> list[Run]:
        runs: list[Run] = []
        pending = ""
        strip_next = False
        for piece, is_content in _pieces(text):
            parts = [piece] if is_content else split_keep(self._control_text, piece)
            for part in parts:
                if not is_content and part in self._control:
                    id_, token = self._control[part]
                    pending = pending.rstrip() if token.lstrip else pending
                    runs += [Run(pending, None, trained, after_control)] if pending else []
                    runs.append(Run("", id_, trained))
                    pending, strip_next, after_control = "", token.rstrip, True
                    continue
                real = marked.text(part) if is_content else part
                pending += real.lstrip() if strip_next else real
                strip_next = strip_next and not pending
        return [*runs, Run(pending, None, trained, after_control)] if pending else runs

    def _with_thoughts(self, messages: Sequence[Message]) -> list[Message]:
        """Return messages for a template: where it knows no reasoning, that stands in the content, in front."""
        if self._writes_reasoning:
            return list(messages)
        return [replace(m, thought=THOUGHT.format(m.reasoning)) if m.reasoning else m for m in messages]

    def _find_reasoning(self) -> bool:
        """Tell whether the template writes the reasoning of an answer."""
        marked = _Marked([Message("user", "q"), Message("assistant", "a", reasoning="r")], (), self._control_text)
        try:
            return marked.writes_thought(1, self._render(marked.messages, ()))
        except _TemplateError:
            return False

    def answer_text(self, ids: Sequence[int]) -> str:
        """Return the text of an answer without what was thought before it."""
        end, _ = self._control.get("</think>", (-1, None))
        ids = [int(id_) for id_ in ids]
        thought = end in ids
        text = self.decode(ids[len(ids) - ids[::-1].index(end) :] if thought else ids)
        _, mark, answer = text.rpartition("</think>")
        return answer.lstrip() if mark or thought else text

    def _find_stop(self) -> int:
        """Return the token that ends an answer: the one that the template writes there, else the model's own."""
        if not self._plain:
            marked = _Marked([Message("user", "q"), Message("assistant", "a")], (), self._control_text)
            try:
                text = self._render(marked.messages, ())
            except _TemplateError as error:
                cure = "use another model, or mend its chat_template.jinja"
                raise ModelError(Problem("model.template", f"the chat template fails: {error}", "", cure)) from None
            written_to = max((m.end() for m in MARK.finditer(text)), default=-1)
            if written_to < 0:
                cure = "use another model, or mend its chat_template.jinja: content is a text"
                raise ModelError(Problem("model.template", "the chat template does not write contents", "", cure))
            tail = text[written_to:]
            written = [self._control[t][0] for t in self._control_text.findall(tail)]
            known = [id_ for id_ in written if id_ in self.stop_ids]
            if written:
                stop = int(known[0] if known else written[0])
                self.stop_ids = tuple(dict.fromkeys((*self.stop_ids, stop)))
                return stop
        if not self.stop_ids:
            raise ModelError(
                Problem(
                    "model.template", "the model has no token that ends an answer", "", "set eos_token in its tokenizer"
                )
            )
        return self.stop_ids[0]

    # --- no template ---

    def _plain_training(self, conversation: Conversation) -> list[list[Run]]:
        *asked, answer = conversation.messages
        thought = THOUGHT.format(answer.reasoning) if answer.reasoning else ""
        runs = [Run(thought, None, not answer.silent, after_control=False)] if thought else []
        runs += [Run(answer.content, None, True, after_control=False), Run("", self._stop_id, trained=True)]
        return [[*self._plain_prompt(asked), *runs]]

    def _plain_prompt(self, messages: Sequence[Message]) -> list[Run]:
        if [message.role for message in messages] != ["user"]:
            raise _TemplateError("without a template (data.template=plain) a row is one prompt and one answer")
        return [*(Run("", id_) for id_ in self.begin()), Run(messages[0].content)]


def _joining(messages: Sequence[Message]) -> str:
    """Return which settings would join turns that a template may not know."""
    roles = [message.role for message in messages]
    fixes = ["fold_system"] * any(role in ("system", "developer") for role in roles)
    fixes += ["merge_turns"] * any(a == b != "tool" for a, b in itertools.pairwise(roles))
    return f"; it may help to join them: -s data.fix={','.join(fixes)}" if fixes else ""


class _TemplateError(Exception):
    pass


class _Marked:
    """Messages and tools whose texts are replaced by marks, and what each mark stands for.

    The content of a turn is always marked; other texts (of tools, names, arguments) where they spell a control token,
    and every text inside of a call's arguments, so that it is known to be content.
    """

    def __init__(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], control: re.Pattern[str]
    ) -> None:
        self._control = control
        self._texts: list[str] = []
        self._roles: list[str] = []
        self._last: list[int] = []
        self._needed: list[set[int]] = []
        self._thoughts: list[int] = []
        self._starts: list[int] = []
        self.strips: dict[str, Strip] = {}
        self.tools = [self._leaves(tool, always=False) for tool in tools]
        self.messages = [self._message(message) for message in messages]

    def end_of(self, index: int, text: str) -> int:
        """Return where the last mark of a message ends in `text`; 0 where it isn't there."""
        last = self._last[index]
        return next((m.end() for m in MARK.finditer(text) if int(m[1]) == last), 0)

    def start_of(self, index: int, text: str) -> int:
        """Return where the content of a message begins in `text`, behind its reasoning."""
        return next((m.start() for m in MARK.finditer(text) if int(m[1]) == self._starts[index]), 0)

    def writes_thought(self, index: int, text: str) -> bool:
        """Tell whether the reasoning of a message stands in `text`."""
        return any(int(m[1]) == self._thoughts[index] for m in MARK.finditer(text))

    def needed(self, index: int) -> set[int]:
        """Return the numbers of a message's marks that a template must write: its content and its calls' arguments."""
        return self._needed[index]

    def roles_with_edges(self) -> list[str]:
        """Return the roles of which a text begins or ends with white space, so that stripping it would show."""
        marked = zip(self._roles, self._texts, strict=True)
        return sorted({role for role, text in marked if role and text != text.strip()})

    def fill(self, text: str, strips: Mapping[str, Strip]) -> str:
        """Return `text` with contents for marks, those of a role stripped as `strips` says."""
        return MARK.sub(lambda m: _escape(self._stripped(int(m[1]), strips), m[2]), text)

    def settle(self, strips: Mapping[str, Strip]) -> None:
        """Keep the contents as the template strips them."""
        self.strips = dict(strips)
        self._texts = [self._stripped(index, strips) for index in range(len(self._texts))]

    def stand_in(self, texts: Sequence[str]) -> None:
        """Let the marks stand for other texts."""
        self._texts = list(texts)

    def text(self, mark: str) -> str:
        """Return what a mark stands for, as JSON where the template wrote it as JSON."""
        match = MARK.fullmatch(mark)
        return _escape(self._texts[int(match[1])], match[2]) if match else mark

    def _stripped(self, index: int, strips: Mapping[str, Strip]) -> str:
        return strips.get(self._roles[index], _as_is)(self._texts[index])

    def _new(self, text: str, role: str) -> str:
        self._texts.append(text)
        self._roles.append(role)
        return f'\ue000{len(self._texts) - 1}"\ue001'

    def _message(self, message: Message) -> dict[str, Any]:
        mapping = _as_mapping(message)
        marked = {key: self._leaves(value, always=False) for key, value in mapping.items() if key not in WRITTEN}
        self._thoughts.append(-1)
        if message.reasoning and not message.thought:
            marked["reasoning_content"] = self._new(message.reasoning, "")
            self._thoughts[-1] = len(self._texts) - 1
        first = len(self._texts)
        # The thought has a mark of its own, which no template strips, so that it can be told from the answer.
        marked["content"] = self._new(message.thought, "") if message.thought else ""
        self._starts.append(len(self._texts))
        marked["content"] += self._new(message.content, message.role) if message.content else ""
        if message.tool_calls:
            marked["tool_calls"] = [self._call(call) for call in message.tool_calls]
        self._needed.append(set(range(first, len(self._texts))))
        self._last.append(len(self._texts) - 1)
        return marked

    def _call(self, call: Mapping[str, Any]) -> dict[str, Any]:
        function = call["function"]
        name = self._leaves(function["name"], always=False)
        arguments = self._leaves(function["arguments"], always=True)
        return {**call, "function": {"name": name, "arguments": arguments}}

    def _leaves(self, value: Any, *, always: bool) -> Any:
        if isinstance(value, str):
            return self._new(value, "") if value and (always or self._control.search(value)) else value
        if isinstance(value, Mapping):
            return {self._leaves(k, always=False): self._leaves(v, always=always) for k, v in value.items()}
        if isinstance(value, Sequence):
            return [self._leaves(inner, always=always) for inner in value]
        return value


def _as_is(text: str) -> str:
    return text


STRIPS: tuple[Strip, ...] = (_as_is, str.strip, str.lstrip, str.rstrip)


def _with_other_names(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a message whose reasoning also stands under the older name that some templates read."""
    thought = message.get("reasoning_content")
    return message if thought is None else {"thinking": thought, **message}


def _as_mapping(message: Message) -> dict[str, Any]:
    mapping: dict[str, Any] = {"role": message.role, "content": message.thought + message.content}
    if message.reasoning and not message.thought:
        mapping["reasoning_content"] = message.reasoning
    if message.tool_calls:
        mapping["tool_calls"] = [dict(call) for call in message.tool_calls]
    if message.tool_call_id:
        mapping["tool_call_id"] = message.tool_call_id
    if message.name:
        mapping["name"] = message.name
    return mapping


def _escape(text: str, backslashes: str) -> str:
    """Write `text` as JSON as often as the backslashes before a mark's quote tell: 1 -> once, 3 -> twice."""
    for _ in range((len(backslashes) + 1).bit_length() - 1):
        text = json.dumps(text, ensure_ascii=False)[1:-1]
    return text


def _pieces(text: str) -> Iterable[tuple[str, bool]]:
    """Yield (piece, is it a mark) of a marked text."""
    position = 0
    for match in MARK.finditer(text):
        yield text[position : match.start()], False
        yield match[0], True
        position = match.end()
    yield text[position:], False
