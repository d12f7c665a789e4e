"""The parent's end of the process that renders a chat template."""

from __future__ import annotations

import asyncio
import os
import sys

import msgspec

from appliance.core.errors import ModelFileError, UnavailableError
from appliance.serving.template_protocol import HEADER_BYTES, Reply

START_TIMEOUT_S = 60.0
"""For Python to start and to import Jinja; well under a second, but slow storage may be busy loading the model."""

MODEL_ADVICE = "Use another model file, or one whose chat template is repaired; /v1/completions needs no template."

_PASSED_ON = ("LANG", "LC_ALL", "LD_LIBRARY_PATH", "TZ")
"""All that a template's process may see of the environment."""


class ChildDiedError(ModelFileError):
    """The child ended in the middle of a message."""

    default_code = "chat_template_failed"


class TemplateChild:
    """A running `template_process`."""

    def __init__(self, process: asyncio.subprocess.Process, reply_limit: int) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._process = process
        self._stdin = process.stdin
        self._stdout = process.stdout
        self._reply_limit = reply_limit

    @classmethod
    async def start(cls, *, reply_limit: int) -> TemplateChild:
        """Start a process and wait until it can compile.

        Raises:
            UnavailableError: It cannot be started.
        """
        advice = "The machine may be out of memory or processes; `appliance doctor` looks."
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-I",
                "-m",
                "appliance.serving.template_process",
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                env={name: os.environ[name] for name in _PASSED_ON if name in os.environ},
                start_new_session=True,  # Ctrl-C in a terminal is for the server alone
            )
        except OSError as error:
            raise UnavailableError(
                f"The process that renders chat templates cannot be started: {error.strerror}.", advice=advice
            ) from error
        child = cls(process, reply_limit)
        ready = False
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await child.receive()
            ready = True
        except (TimeoutError, ChildDiedError) as error:
            raise UnavailableError("The process that renders chat templates did not start.", advice=advice) from error
        finally:
            if not ready:
                await child.stop()
        return child

    async def exchange(self, frame: bytes) -> Reply:
        """Send a frame and return the reply.

        Raises:
            ChildDiedError: The process ended.
        """
        try:
            self._stdin.write(frame)
            await self._stdin.drain()
        except ConnectionError as error:
            raise ChildDiedError("The process that renders the model's chat template ended.") from error
        return await self.receive()

    async def receive(self) -> Reply:
        """Return the next reply. Raises as `exchange` does."""
        try:
            length = int.from_bytes(await self._stdout.readexactly(HEADER_BYTES), "big")
            if length > self._reply_limit:
                raise ChildDiedError(f"The model's chat template answered with {length} bytes.", advice=MODEL_ADVICE)
            return msgspec.json.decode(await self._stdout.readexactly(length), type=Reply)
        except (asyncio.IncompleteReadError, ConnectionError, msgspec.DecodeError) as error:
            raise ChildDiedError(
                "The model's chat template brought its process down, most likely by using too much memory.",
                advice=MODEL_ADVICE,
            ) from error

    async def stop(self) -> None:
        """Kill the process and wait for its end; a caller who is cancelled meanwhile leaves no zombie."""
        if self._process.returncode is None:
            try:
                self._process.kill()
            except ProcessLookupError:
                return  # it ended just now
        self._stdin.close()
        await self._process.wait()
