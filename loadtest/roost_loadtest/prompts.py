"""Long prompts of known content, made the same way every time: no files, no randomness."""

from __future__ import annotations

_PLACES = ("reading room", "archive", "map cabinet", "courtyard", "workshop", "music room")
_RULES = (
    "Visitors of the {place} keep their bags in the lockers at the entrance.",
    "The {place} opens at {hour} and closes one hour after sunset.",
    "Questions about the {place} are answered at desk {number} on the ground floor.",
    "Nothing is carried out of the {place} without a slip signed on day {number}.",
    "Groups of more than {number} people announce a visit to the {place} one week before.",
)


def handbook(name: str, num_tokens: int) -> str:
    """A house handbook of about `num_tokens` tokens; other names share no prefix."""
    rules = [f"Handbook of the {name}. These are the rules of the house."]
    length, number = 0, 0
    while length < num_tokens * 3.72:  # bytes a token of this text in a 49k vocabulary
        number += 1
        rule = _RULES[number % len(_RULES)].format(
            place=_PLACES[number % len(_PLACES)], hour=6 + number % 5, number=number
        )
        rules.append(f"{number}. {rule}")
        length += len(rules[-1]) + 1
    return " ".join(rules)


def conversation(name: str, question: str, num_tokens: int) -> list[dict[str, str]]:
    """Chat messages: the handbook as the system prompt, then one question."""
    return [
        {"role": "system", "content": handbook(name, num_tokens)},
        {"role": "user", "content": question},
    ]
