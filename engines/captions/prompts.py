"""Which texts are prompts."""

from __future__ import annotations

MAX_CHARACTERS = 8192  # more than the tokens of a caption can hold; limits the work of the tokenizer


def prompt_fault(prompt: str) -> str | None:
    """Return why `prompt` cannot be encoded, as the end of a sentence that begins "The prompt …", or None."""
    if len(prompt) > MAX_CHARACTERS:
        return f"has {len(prompt):,} characters; the limit is {MAX_CHARACTERS:,}"
    try:
        prompt.encode()
    except UnicodeEncodeError:
        return "contains a lone surrogate, which is not a character; send valid Unicode"
    return None
