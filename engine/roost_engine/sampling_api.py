"""Fields of a body that say how tokens are chosen, and their reading.

OpenAI's and vLLM's names and ranges. What vLLM clamps or ignores is refused here: a bias beyond
±100, `min_tokens` above `max_tokens`, more than four stop strings (OpenAI's limit).

Not here: what the values do (sampling.py, logits.py, text_stream.py).
"""

from __future__ import annotations

import re
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from roost_engine.api_body import invalid
from roost_engine.request import SamplingParams

#: Most alternatives that logprobs show for a token, as in OpenAI's chat and vLLM.
MAX_LOGPROBS: Final = 20

_TOKEN_ID: Final = re.compile(r"\d{1,10}", re.ASCII)

StopString = Annotated[str, Meta(min_length=1, max_length=1000)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]
_Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
_Bias = Annotated[float, Meta(ge=-100, le=100)]
_Penalty = Annotated[float, Meta(ge=-2, le=2)]


class SamplingFields(msgspec.Struct):
    """As they stand in a body; null means not given."""

    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] | None = None
    logit_bias: Annotated[dict[str, _Bias], Meta(max_length=1024)] | None = None
    seed: _Seed | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=4)] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=256)] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    ignore_eos: bool | None = None


def read_max_tokens(fields: SamplingFields) -> int | None:
    """`max_tokens` under either of its names; ApiError if they differ."""
    old, new = fields.max_tokens, fields.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise invalid(
            "max_completion_tokens",
            "'max_tokens' and 'max_completion_tokens' are two names of one limit and differ.",
        )
    return new if old is None else old


def read_sampling(fields: SamplingFields, logprobs: int | None) -> SamplingParams:
    """Parameters without limit and seed, which the front end fills in."""
    max_tokens = read_max_tokens(fields)
    min_tokens = fields.min_tokens or 0
    if max_tokens is not None and min_tokens > max_tokens:
        raise invalid("min_tokens", f"'min_tokens' {min_tokens} exceeds 'max_tokens' {max_tokens}.")
    stop = [fields.stop] if isinstance(fields.stop, str) else fields.stop or []
    skip_special_tokens = fields.skip_special_tokens
    return SamplingParams(
        max_tokens=1,
        min_tokens=min_tokens,
        temperature=1.0 if fields.temperature is None else fields.temperature,
        top_p=1.0 if fields.top_p is None else fields.top_p,
        top_k=max(fields.top_k or 0, 0),
        min_p=fields.min_p or 0.0,
        presence_penalty=fields.presence_penalty or 0.0,
        frequency_penalty=fields.frequency_penalty or 0.0,
        repetition_penalty=fields.repetition_penalty or 1.0,
        logit_bias={_read_token_id(key): bias for key, bias in (fields.logit_bias or {}).items()},
        stop=tuple(stop),
        stop_token_ids=frozenset(fields.stop_token_ids or ()),
        include_stop_in_output=bool(fields.include_stop_str_in_output),
        skip_special_tokens=True if skip_special_tokens is None else skip_special_tokens,
        ignore_eos=bool(fields.ignore_eos),
        logprobs=logprobs,
    )


def _read_token_id(key: str) -> int:
    if not _TOKEN_ID.fullmatch(key):
        raise invalid("logit_bias", f"Invalid 'logit_bias': {key!r} is not a token id.")
    return int(key)
