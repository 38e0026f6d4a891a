"""Talk to a model: the renderer of training writes its prompts, so that it is asked as it was taught."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from headstart.data.formats import fold_system
from headstart.data.records import Message
from headstart.data.render import Renderer
from headstart.display import Display
from headstart.errors import Problem, UsageError
from headstart.models.attention import use_attention
from headstart.models.load import load_tokenizer, model_length, stop_ids
from headstart.models.source import find_model
from headstart.run import find_run
from headstart.verbs import load_here

UNFINISHED = "\ufffd"


@dataclass(frozen=True)
class Said:
    """An answer, and whether the model ended it by itself."""

    text: str
    stopped: bool


class Chat:
    """A conversation with a model; `temperature` 0 takes the likeliest token each time."""

    def __init__(
        self, model: str, *, system: str | None = None, max_tokens: int = 512, temperature: float = 0.0
    ) -> None:
        source = find_model(model)
        run = find_run(model)
        settings = run.read_config().settings.data if run else None
        self._plain = settings is not None and settings.template == "plain"
        self._folds = settings is not None and "fold_system" in settings.fix
        if system and self._plain and not self._folds:
            what = "without a template a prompt is one text, which has no system turn"
            raise UsageError(Problem("usage.flag", what, "--system", "put it in front of the question"))
        template = "plain" if self._plain else "model"
        tokenizer = load_tokenizer(source)
        self._renderer = Renderer(tokenizer, stop_ids(source, tokenizer), template)
        self._model = load_here(source, "chat").model
        self._max_tokens = max_tokens
        self._length = model_length(self._model.config)
        self._temperature = temperature
        _check_text(system or "")
        self.messages = [Message("system", system)] if system else []

    def answer(self, text: str, on_text: Callable[[str], None] | None = None) -> Said:
        """Ask, and return the answer; `on_text` is called with each piece of it as it comes."""
        _check_text(text)
        self.messages.append(Message("user", text))
        said = self.reply(self.messages, on_text)
        self.messages.append(Message("assistant", said.text))
        return said

    def reply(self, messages: Sequence[Message], on_text: Callable[[str], None] | None = None) -> Said:
        """Return the answer to a conversation that ends with a turn of the user; nothing of it is kept."""
        prompt = self._renderer.prompt(self._turns(messages))
        if len(prompt) >= self._length:
            what = f"the conversation has {len(prompt):,} tokens, and the model can place {self._length:,}"
            raise UsageError(Problem("usage.flag", what, "chat", "begin a new conversation"))
        ids: list[int] = []
        shown = ""
        stopped = False
        for id_ in self._tokens(prompt):
            if id_ in self._renderer.stop_ids:
                stopped = True
                break
            ids.append(id_)
            whole = self._renderer.decode(ids)
            # The bytes of one character can come in several tokens: it is shown when it is whole.
            if on_text and not whole.endswith(UNFINISHED):
                on_text(whole[len(shown) :])
                shown = whole
        said = Said(self._renderer.decode(ids), stopped)
        if on_text:
            on_text(said.text[len(shown) :] + "\n")
        return said

    def _turns(self, messages: Sequence[Message]) -> Sequence[Message]:
        """Return the turns that the model is asked with, joined as they were where it was taught."""
        turns = messages
        if self._plain:  # a prompt is one text, so a new question begins anew
            turns = [*(turn for turn in turns if turn.role == "system"), turns[-1]]
        return fold_system(turns) if self._folds else turns

    def _tokens(self, prompt: list[int]) -> Any:
        """Yield new tokens one by one."""
        use_attention(self._model, packed=False)
        ids = torch.tensor([prompt], device=self._model.device)
        past = None
        for _ in range(min(self._max_tokens, self._length - len(prompt))):
            with torch.no_grad():
                output = self._model(input_ids=ids, past_key_values=past, use_cache=True, logits_to_keep=1)
            past = output.past_key_values
            logits = output.logits[0, -1].float()
            if self._temperature > 0:
                new = int(torch.multinomial((logits / self._temperature).softmax(-1), 1))
            else:
                new = int(logits.argmax())
            yield new
            ids = torch.tensor([[new]], device=self._model.device)


def _check_text(text: str) -> None:
    """Raise UsageError where a text holds what no tokenizer can encode: bytes that this locale can't read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        what = f"character {error.start + 1} of the text can't be read here"
        raise UsageError(Problem("usage.flag", what, "chat", "ask in a locale of UTF-8: LC_ALL=C.UTF-8")) from None


def talk(chat: Chat, display: Display) -> None:
    """Hold a conversation in the terminal until the user has had enough."""
    display.line("an empty line or Ctrl-D ends the conversation", "dim")
    while True:
        try:
            asked = input("> ").strip()
        except EOFError:
            return
        if not asked:
            return
        chat.answer(asked, display.stream)
