"""Renders chats by the chat template of the model's tokenizer, as a server does, but always on the same day."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.data.chats import Message, Render
from compressor.data.files import read_regular, reading
from compressor.process.utf8 import parse_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CLOCK = "strftime_now"  # the function by which templates print the date
# Friday, 26 July 2024: the date that Llama's templates print where there is no clock.
DAY = {"%d": "26", "%m": "07", "%b": "Jul", "%B": "July", "%Y": "2024", "%y": "24", "%a": "Fri", "%A": "Friday",
       "%-d": "26", "%-m": "7", "%F": "2024-07-26", "%H": "00", "%M": "00", "%S": "00"}  # fmt: skip
MARK = "compressor-probe"
# Files in which the processor of a model with images keeps its template, where a tokenizer doesn't look for one.
PROCESSOR_FILES = ("chat_template.json", "processor_config.json")


def chat_renderer(tokenizer: PreTrainedTokenizerBase, directory: Path, *, is_request: bool) -> Render | None:
    """The function that turns (messages, tools or None) into text; None if the model has no chat template.

    directory   of the model: the template is its processor's if the tokenizer has none
    is_request  a chat that doesn't end with a turn of the assistant ends with the beginning of one, as a prompt does
    raises      RecipeError for a file of the processor that can't be read
    """
    if getattr(tokenizer, "chat_template", None) is None:
        template = _processor_template(directory)
        if template is None:
            return None
        tokenizer.chat_template = template
    takes_parts = _takes_parts(tokenizer)

    def render(messages: list[Message], tools: list[Message] | None) -> Any:
        formed = [{**message, "content": _content(message["content"], takes_parts)} for message in messages]
        return _rendered(tokenizer, formed, tools, is_request and messages[-1]["role"] != "assistant")

    return render


def _processor_template(directory: Path) -> str | None:
    for path in (directory / name for name in PROCESSOR_FILES):
        if path.is_file():
            with reading(path.name):
                found = parse_json(read_regular(path))
            if isinstance(found, dict) and isinstance(found.get("chat_template"), str):
                return str(found["chat_template"])
    return None


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: list[Message], tools: Any, is_prompt: bool) -> Any:
    template = tokenizer.get_chat_template(None, tools)
    if CLOCK in template:
        template = _stopped_clock() + template
    return tokenizer.apply_chat_template(
        messages, tools=tools, chat_template=template, tokenize=False, add_generation_prompt=is_prompt
    )


def _stopped_clock() -> str:
    """A macro that takes the place of the clock: samples that depend on the day of the run could not be made again."""
    made = "format" + "".join(f" | replace('{directive}', '{text}')" for directive, text in DAY.items())
    return f"{{% macro {CLOCK}(format) %}}{{{{ {made} }}}}{{% endmacro %}}\n"  # the template trims this line break


def _content(content: str | list[Message], takes_parts: bool) -> str | list[Message]:
    if takes_parts:
        return [{"type": "text", "text": content}] if isinstance(content, str) else content
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def _takes_parts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template reads a content as a list of parts. Those of models with images often do, and print nothing
    of a content that is a text."""

    def prints(content: str | list[Message]) -> bool:
        try:
            return MARK in _rendered(tokenizer, [{"role": "user", "content": content}], None, False)
        except Exception:  # the template refuses this form; if it refuses both, its rows tell why
            return False

    return not prints(MARK) and prints([{"type": "text", "text": MARK}])
