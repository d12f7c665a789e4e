"""Structured output on the real default model, by the official client."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import openai
import pydantic
import pytest

from tests.journeys.processes import server_process

pytestmark = [pytest.mark.journey, pytest.mark.timeout(300)]

MODEL = "smollm2-135m-instruct"


class City(pydantic.BaseModel):
    name: str
    continent: Literal["Africa", "America", "Asia", "Europe"]
    capital: bool


def test_parse_returns_what_the_model_said_and_a_hostile_schema_costs_a_refusal(
    real_data: Path, tmp_path: Path
) -> None:
    with server_process(real_data, tmp_path) as server:
        server.wait_until_ready()
        with server.client() as client:
            answer = client.chat.completions.parse(
                model=MODEL,
                messages=[{"role": "user", "content": "Describe Paris as JSON."}],
                response_format=City,
                temperature=0,
                max_completion_tokens=200,
            )
            city = answer.choices[0].message.parsed
            assert isinstance(city, City)
            assert "Paris" in city.name
            chosen = client.completions.create(
                model=MODEL, prompt="Is water wet? ", extra_body={"structured_outputs": {"choice": ["yes", "no"]}}
            )
            assert (chosen.choices[0].text in ("yes", "no"), chosen.choices[0].finish_reason) == (True, "stop")
            with pytest.raises(openai.BadRequestError, match="nothing is fetched"):
                client.completions.create(
                    model=MODEL,
                    prompt="x",
                    extra_body={"structured_outputs": {"json": {"$ref": f"{server.url}/openapi.json"}}},
                )
