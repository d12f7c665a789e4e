"""`appliance chat`: talk to a model in the terminal, here or on another box."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from appliance.cli.options import Context, verb_options
from appliance.cli.server import open_client, server_options
from appliance.core.errors import InvalidRequestError, NotFoundError

if TYPE_CHECKING:
    from appliance.cli.chat_client import ChatClient
    from appliance.cli.chat_conversation import Conversation
    from appliance.cli.chat_terminal import ChatTerminal

INTERRUPTED = 130
"""Exit code of a question that Ctrl-C stopped, as a shell has it."""

HISTORY_LINES = 1000


@click.command(
    epilog="Examples: `appliance chat`, `appliance chat 'Why is the sky blue?'`, `appliance chat Summarise: < a.txt`, "
    "`appliance chat --url https://box.local:8443`.",
)
@click.argument("question", nargs=-1)
@server_options
@click.option("--model", "model_name", help="Model to ask; by default the configured one, or one that is loaded.")
@click.option("--system", default="", help="System prompt.")
@click.option("--temperature", type=float, help="0 always takes the likeliest token.")
@click.option("--top-p", type=float, help="Nucleus mass.")
@click.option("--top-k", type=int, help="Keep the k likeliest tokens.")
@click.option("--min-p", type=float, help="Least share of the likeliest token's probability.")
@click.option("--repeat-penalty", type=float, help="Against repetition; 1 is off.")
@click.option("--max-tokens", type=int, help="Most tokens of an answer.")
@click.option("--seed", type=int, help="Makes answers repeatable.")
@click.option("--stop", multiple=True, help="String that ends an answer; may be repeated.")
@verb_options
def command(
    context: Context,
    *,
    question: tuple[str, ...],
    url: str | None,
    api_key: str,
    ca: Path | None,
    model_name: str | None,
    system: str,
    **sampling: Any,
) -> None:
    """Talk to a model in the terminal, or ask it one QUESTION. What is piped in becomes part of the question."""
    from appliance.cli.chat_conversation import Conversation

    asked = "\n\n".join(filter(None, [" ".join(question), _piped(may_wait=not question)]))
    if not asked and not os.isatty(0):
        raise InvalidRequestError("There is no question.", advice="Give one as an argument or pipe it in.")
    parameters = {name: value for name, value in sampling.items() if value not in (None, ())}
    conversation = Conversation(system)
    with open_client(context.settings, url=url, api_key=api_key, ca=ca) as client:
        model = model_name or _choose_model(client, context.settings.model)
        if asked:
            _ask_once(client, model, conversation.with_question(asked), parameters, as_json=context.json)
        else:
            _converse(client, model, conversation, parameters, as_json=context.json)


def _converse(
    client: ChatClient, model: str, conversation: Conversation, parameters: dict[str, Any], *, as_json: bool
) -> None:
    from appliance.cli.chat_terminal import ChatTerminal

    terminal = ChatTerminal(
        client,
        model=model,
        conversation=conversation,
        parameters=parameters,
        read_line=_read_line,
        as_json=as_json,
    )
    _with_history(terminal)


def _ask_once(
    client: ChatClient, model: str, messages: list[Any], parameters: dict[str, Any], *, as_json: bool
) -> None:
    from appliance.cli.chat_answer import describe, get_answer, show

    try:
        answer = get_answer(client, model, messages, parameters, _ignore if as_json else show)
    finally:
        if not as_json:
            click.echo()
    if as_json:
        click.echo(msgspec.json.encode(answer.document()))
    elif sys.stdout.isatty() and sys.stderr.isatty():
        click.secho(f"({describe(answer.statistics)})", dim=True, err=True)
    if answer.interrupted:
        sys.exit(INTERRUPTED)


def _ignore(_: str) -> None:
    """Show nothing: the answer is printed whole."""


def _choose_model(client: ChatClient, configured: str) -> str:
    """Return the configured model if the server has it, else one that is loaded, else any."""
    from appliance.cli.chat_terminal import matches

    models = client.models()
    if not models:
        raise NotFoundError(
            f"The server at {client.url} has no model.",
            advice="There, run: appliance models pull smollm2-135m-instruct",
            code="model_not_found",
        )
    if any(matches(model, configured) for model in models):
        return configured
    return next((model for model in models if model.loaded), models[0]).id


def _piped(*, may_wait: bool) -> str:
    """Return what is piped in.

    Beside a question it is read only from a pipe or a file: a service or a remote shell may leave open an input on
    which nothing ever comes.
    """
    if os.isatty(0) or not (may_wait or _is_pipe_or_file()):
        return ""
    try:
        return sys.stdin.buffer.read().decode().strip("\r\n")
    except UnicodeDecodeError as error:
        raise InvalidRequestError(
            f"What was piped in is not UTF-8 text: byte 0x{error.object[error.start]:02x} at {error.start}."
        ) from error


def _is_pipe_or_file() -> bool:
    try:
        kind = os.fstat(0).st_mode
    except OSError:  # closed
        return False
    return stat.S_ISFIFO(kind) or stat.S_ISREG(kind)


def _read_line() -> str:
    # the marks \001 and \002 tell readline that what is between them takes no room
    return input("\001\033[1m\002> \001\033[0m\002" if sys.stdout.isatty() else "> ")


def _with_history(terminal: ChatTerminal) -> None:
    """Run with line editing, completion of commands, and a history that only this user may read."""
    import readline

    path = Path(click.get_app_dir("appliance")) / "chat_history"
    readline.set_history_length(HISTORY_LINES)
    readline.set_completer_delims("")
    readline.set_completer(_completer(terminal.command_names))
    readline.parse_and_bind("tab: complete")
    with _warning_of_lost_history(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        readline.read_history_file(path)
    try:
        terminal.run()
    finally:
        with _warning_of_lost_history(path):
            readline.write_history_file(path)


@contextmanager
def _warning_of_lost_history(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        click.secho(f"The history of your questions cannot be kept in {path}: {error.strerror}.", dim=True, err=True)


def _completer(names: list[str]) -> Callable[[str, int], str | None]:
    def complete(text: str, index: int) -> str | None:
        found = [name for name in names if text and name.startswith(text)]
        return found[index] if index < len(found) else None

    return complete
