"""The chat in a terminal: reads lines, runs /commands, shows answers as they come."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import click
import msgspec

from appliance.cli.chat_answer import Answer, describe, get_answer, show
from appliance.cli.chat_client import ChatClient
from appliance.cli.chat_conversation import Conversation
from appliance.cli.chat_wire import Model
from appliance.cli.options import report_error
from appliance.core.errors import ApplianceError, InvalidRequestError, NotFoundError
from appliance.core.printable import printable

LEAVE_HINT = "Ctrl-C again or Ctrl-D leaves."


class ChatTerminal:
    """One session with a person."""

    def __init__(
        self,
        client: ChatClient,
        *,
        model: str,
        conversation: Conversation,
        parameters: Mapping[str, Any],
        read_line: Callable[[], str],
        as_json: bool,
    ) -> None:
        """Nothing is said yet.

        Args:
            client: The server.
            model: Whom to ask at first.
            conversation: What has been said; changes as the session goes on.
            parameters: Sampling parameters of every question.
            read_line: Returns the next line; raises EOFError at the end.
            as_json: Print each answer as a line of JSON instead of text.
        """
        self._client = client
        self._model = model
        self._conversation = conversation
        self._parameters = parameters
        self._read_line = read_line
        self._as_json = as_json
        self._unanswered: str | None = None
        self._answers: list[Answer] = []
        self._commands: dict[str, tuple[str, str, Callable[[str], bool | None]]] = {
            "/help": ("", "list the commands", self._help),
            "/model": ("[NAME]", "list the models, or go on with another", self._switch_model),
            "/system": ("[TEXT]", "show the system prompt, or set it; - removes it", self._set_system),
            "/save": ("FILE", "write the conversation to a file", self._save),
            "/load": ("FILE", "go on with a saved conversation", self._load),
            "/clear": ("", "forget the conversation; the system prompt stays", self._clear),
            "/retry": ("", "ask the last question again", self._retry),
            "/stats": ("", "show what the last answer and the session cost", self._statistics),
            "/quit": ("", "leave, as Ctrl-D does", self._quit),
        }

    @property
    def command_names(self) -> list[str]:
        """Return all commands, for completion."""
        return list(self._commands)

    def run(self) -> None:
        """Converse until the person leaves."""
        self._note(f"Talking to {self._model} at {self._client.url}. /help lists the commands; Ctrl-D leaves.")
        stopped_once = False
        while True:
            try:
                stopped_once = self._handle(self._read_line().strip())
            except EOFError:
                click.echo()
                return
            except KeyboardInterrupt:
                click.echo()
                if stopped_once:
                    return
                stopped_once = True
                self._note(LEAVE_HINT)
            except ApplianceError as error:
                report_error(error, as_json=self._as_json)
                stopped_once = False

    def _handle(self, line: str) -> bool:
        """Act on a line; return whether Ctrl-C stopped it."""
        if line.startswith("/") and not line.startswith("//"):
            name, _, argument = line.partition(" ")
            if name not in self._commands:
                close = get_close_matches(name, self._commands, n=1)
                advice = f"Did you mean {close[0]}?" if close else "/help lists them; // begins a message with a slash."
                raise InvalidRequestError(f"There is no command {printable(name)}.", advice=advice)
            return bool(self._commands[name][2](argument.strip()))
        return self._ask(line.removeprefix("/") if line.startswith("//") else line) if line else False

    def _ask(self, question: str) -> bool:
        self._unanswered = question
        messages = self._conversation.with_question(question)
        try:
            answer = get_answer(self._client, self._model, messages, self._parameters, self._show)
        except ApplianceError:
            self._end_line()
            raise
        self._end_line()
        if answer.text:
            self._conversation.keep(question, answer.text)
            self._unanswered = None
        self._answers.append(answer)
        self._tell(answer)
        return answer.interrupted

    def _show(self, piece: str) -> None:
        if not self._as_json:
            show(piece)

    def _end_line(self) -> None:
        if not self._as_json:
            click.echo()

    def _tell(self, answer: Answer) -> None:
        if self._as_json:
            click.echo(msgspec.json.encode(answer.document()))
        if answer.interrupted:
            self._note(f"Stopped. {LEAVE_HINT}")
        else:
            cut = "; cut off at the most tokens" if answer.finish_reason == "length" else ""
            self._note(f"({describe(answer.statistics)}{cut})")

    def _note(self, text: str) -> None:
        """Tell the person something that is not part of the conversation."""
        if sys.stderr.isatty():
            click.secho(printable(text), dim=True, err=True)

    def _help(self, _: str) -> None:
        rows = [(f"{name} {argument}", meaning) for name, (argument, meaning, _) in self._commands.items()]
        click.echo("\n".join(f"  {left:<16} {meaning}" for left, meaning in rows))
        click.echo("  Ctrl-C stops an answer. A message that begins with a slash is written with two.")

    def _switch_model(self, name: str) -> None:
        models = self._client.models()
        if not name:
            for model in models:
                mark = "*" if matches(model, self._model) else " "
                click.echo(f"{mark} {printable(model.id)}{'' if model.loaded is not False else '  (not loaded)'}")
            return
        if not any(matches(model, name) for model in models):
            raise NotFoundError(
                f"The server has no model {printable(name)}.",
                advice=f"It has {printable(', '.join(model.id for model in models)) or 'none'}.",
            )
        self._model = name
        self._note(f"Talking to {name}.")

    def _set_system(self, text: str) -> None:
        if text:
            self._conversation.system = "" if text == "-" else text
        self._note(f"System prompt: {self._conversation.system or 'none'}")

    def _save(self, name: str) -> None:
        path = _path(name)
        self._conversation.save(path, self._model)
        self._note(f"Saved to {path}.")

    def _load(self, name: str) -> None:
        model = self._conversation.load(_path(name))
        self._unanswered = None
        self._note(f"{len(self._conversation.messages)} messages, held with {model}.")

    def _clear(self, _: str) -> None:
        self._conversation.clear()
        self._unanswered = None
        self._note("Forgotten.")

    def _retry(self, _: str) -> bool:
        question = self._unanswered or self._conversation.take_back()
        if question is None:
            raise InvalidRequestError("There is no question to ask again.")
        return self._ask(question)

    def _quit(self, _: str) -> None:
        raise EOFError

    def _statistics(self, _: str) -> None:
        if not self._answers:
            raise InvalidRequestError("There is no answer yet.")
        last, every = self._answers[-1].statistics, [answer.statistics for answer in self._answers]
        prompts, tokens = sum(each.prompt_tokens for each in every), sum(each.completion_tokens for each in every)
        click.echo(f"Last answer: {describe(last)}")
        click.echo(f"  of its prompt's {last.prompt_tokens} tokens, {last.cached_tokens} came from the cache")
        click.echo(f"Session: {len(every)} answers, {prompts} tokens of prompts, {tokens} tokens of answers")


def matches(model: Model, name: str) -> bool:
    """Return whether a name, with or without a version, means this model."""
    return model.id == name or model.id.partition(":")[0] == name or name.partition(":")[0] == model.id


def _path(name: str) -> Path:
    if not name:
        raise InvalidRequestError("A file name is missing.", advice="For example: /save talk.json")
    return Path(name).expanduser()
