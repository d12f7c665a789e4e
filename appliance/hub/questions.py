"""What devices ask (`up/<dev>/req`), and who answers: each kind of question has one answerer.

A device that asks too often is told so. An answer is lost with the connection: whoever asked asks again.
"""

from __future__ import annotations

import logging
from collections.abc import Collection

import msgspec

from appliance.core.clock import Clock
from appliance.core.errors import ApplianceError, UnavailableError
from appliance.core.fleet import Answer, Question, UpKind, down
from appliance.core.messaging import Link, Message
from appliance.hub.device_records import DeviceStore
from appliance.hub.dispatch import Complaints
from appliance.hub.part import Answerer
from appliance.hub.rates import Rates

logger = logging.getLogger("appliance.hub")

ANSWER_EXPIRY_S = 60
LONGEST_CORRELATION = 64

_DECODER = msgspec.json.Decoder(Question)
_ENCODER = msgspec.msgpack.Encoder()


class Questions:
    """The part of the hub that answers."""

    kinds: frozenset[UpKind] = frozenset({"req"})

    def __init__(
        self, link: Link, devices: DeviceStore, complaints: Complaints, clock: Clock, *, most_a_minute: int
    ) -> None:
        self._link = link
        self._devices = devices
        self._complaints = complaints
        self._clock = clock
        self._rates = Rates(most_a_minute)
        self._answerers: dict[str, Answerer] = {"time": self._time}
        self._while_quarantined: set[str] = {"time"}

    def answer_with(self, kind: str, answerer: Answerer, *, while_quarantined: bool = False) -> None:
        """Have a kind of question answered.

        Args:
            kind: As in `Question`.
            answerer: Returns the answer; an ApplianceError that it raises becomes one that is not ok.
            while_quarantined: Whether a device may ask of whose identity there are two.

        Raises:
            ValueError: Somebody answers it already.
        """
        if kind in self._answerers:
            raise ValueError(f"two answer {kind!r}")
        self._answerers[kind] = answerer
        if while_quarantined:
            self._while_quarantined.add(kind)

    @property
    def answered(self) -> Collection[str]:
        """Return the kinds of questions that somebody answers."""
        return self._answerers.keys()

    async def handle(self, device: str, kind: UpKind, rest: str, message: Message) -> None:  # noqa: ARG002
        """Answer one question."""
        correlation = message.correlation
        if message.retain or not correlation or len(correlation) > LONGEST_CORRELATION:
            self._complaints.refuse(device, "bad_question", "a question needs correlation data and is never retained")
            return
        try:
            question = _DECODER.decode(message.payload)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            self._complaints.refuse(device, "bad_document", str(error))
            answer = Answer(False, code="bad_question", detail=str(error)[:300])
        else:
            answer = await self._answer(device, question)
        answer = msgspec.structs.replace(answer, now=self._clock.unix())
        topic = down(device, "res")
        try:
            await self._link.publish(
                Message(topic, _ENCODER.encode(answer), expiry_s=ANSWER_EXPIRY_S, correlation=correlation)
            )
        except ApplianceError as error:
            logger.info("An answer to %s was lost: %s", device, error)

    async def run(self) -> None:
        """Do nothing: every question is answered as it comes."""

    async def _answer(self, device: str, question: Question) -> Answer:
        answerer = self._answerers.get(question.kind)
        if answerer is None:
            return Answer(False, code="unavailable", detail=f"This hub answers no {question.kind!r}.")
        wait_s = self._rates.take(device, self._clock.monotonic())
        if wait_s:
            return Answer(False, code="overloaded", detail=f"Too many questions; ask again in {wait_s:.1f} s.")
        known = self._devices.find(device)
        if known is not None and known.quarantined is not None and question.kind not in self._while_quarantined:
            return Answer(False, code="quarantined", detail="Two boxes use this identity; a person has to decide.")
        try:
            return await answerer(device, question)
        except UnavailableError as error:
            return Answer(False, code=error.code, detail=str(error)[:2000])
        except ApplianceError as error:
            logger.warning("A question of %s (%s) was refused: %s", device, question.kind, error)
            return Answer(False, code=error.code, detail=str(error)[:2000])

    async def _time(self, _device: str, _question: Question) -> Answer:
        return Answer(True)
