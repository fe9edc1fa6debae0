"""Settings of critique and revision: principles, rounds, texts of the requests, and the model.

Promises: texts of requests with unknown or missing places are refused here.
"""

from __future__ import annotations

from string import Formatter

from pydantic import Field, PositiveInt, ValidationInfo, field_validator

from rlhf_cluster.rewards.servers.http_client import ServerSection
from rlhf_cluster.sections.section import Section

CRITIQUE = """Below are a question and an answer to it.

<question>
{prompt}
</question>
<answer>
{response}
</answer>

Judge the answer by this principle: {principle}
Name what in the answer goes against the principle, and what it lacks. Do not answer the question.
"""
REVISION = """Below are a question, an answer to it, and a critique of that answer.

<question>
{prompt}
</question>
<answer>
{response}
</answer>
<critique>
{critique}
</critique>

The critique is by this principle: {principle}
Write the answer anew so that nothing of the critique holds any more. Give the new answer alone.
"""
_PLACES = {
    "critique_request": ("prompt", "response", "principle"),
    "revision_request": ("prompt", "response", "principle", "critique"),
}
_NEEDED = {
    "critique_request": ("response", "principle"),
    "revision_request": ("response", "critique"),
}


class ChatEndpoint(ServerSection):
    """An OpenAI-compatible server that criticises and revises in place of the model."""

    url: str = Field(pattern=r"^https?://[^\s@?#]+$")
    """Base URL of the endpoint, such as http://judge:8000/v1; `/chat/completions` is added."""
    model: str = Field(min_length=1)
    """Name of the model at that endpoint."""
    max_tokens: PositiveInt = 1024
    """Longest critique and longest revision, in tokens of that model."""
    temperature: float = Field(default=1.0, ge=0)
    """Sampling temperature of that model. With 0, an unusable reply mostly repeats when asked again."""
    parallel: PositiveInt = 8
    """Requests in flight at once."""


class Revise(Section):
    """Each response is criticised by a principle and revised after the critique, `rounds` times."""

    principles: tuple[str, ...] = Field(min_length=1)
    """Principles to judge by. Each round of a response uses one, chosen by `run.seed`.

    No principle repeats for a response before all were used.
    """
    rounds: PositiveInt = 1
    """Critiques, each with its revision, of one response."""
    attempts: PositiveInt = 2
    """Most requests for one critique or revision until it has text and an end."""
    critique_request: str = CRITIQUE
    """Text of the request for a critique, with {prompt}, {response} and {principle}."""
    revision_request: str = REVISION
    """Text of the request for a revision: the same places, and {critique}."""
    endpoint: ChatEndpoint | None = None
    """Server that writes critiques and revisions. Default: the model itself, in the generation pool."""

    @field_validator("principles")
    @classmethod
    def _check_principles(cls, principles: tuple[str, ...]) -> tuple[str, ...]:
        if any(not principle.strip() for principle in principles):
            raise ValueError("holds a blank text. Remove it")
        if len(set(principles)) < len(principles):
            raise ValueError("holds a principle twice. Remove one")
        return principles

    @field_validator("critique_request", "revision_request")
    @classmethod
    def _check_request(cls, text: str, info: ValidationInfo) -> str:
        name = info.field_name or ""
        known = ", ".join(f"{{{place}}}" for place in _PLACES[name])
        try:
            parts = list(Formatter().parse(text))
        except ValueError as error:
            raise ValueError(f"{error}. Write a brace that is none of {known} twice") from None
        places = [place for _, place, spec, form in parts if place is not None]
        if any(spec or form for _, _, spec, form in parts) or set(places) - {*_PLACES[name]}:
            raise ValueError(f"has a place that is none of {known}. Write other braces twice")
        missing = [place for place in _NEEDED[name] if place not in places]
        if missing:
            raise ValueError(
                f"has no {{{missing[0]}}}, so that the reply could not be about it. Add it"
            )
        return text
