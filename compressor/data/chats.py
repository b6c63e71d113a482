"""Reads the chats in the rows of a source, and turns rows into texts: a chat by the model's own chat template.

A chat is a list of messages: objects with `role` and `content`, or with `from` and `value`. It is prepared as a server
prepares a request: the text parts of a content are kept, the arguments of a tool call are an object, and a call needs
no content.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from compressor.data.rows import FOUND, Rows, text_of
from compressor.errors import DependencyError, RecipeError

Message = dict[str, Any]
Render = Callable[[list[Message], list[Message] | None], Any]  # (messages, tools or None) -> text
MESSAGE_KEYS = (("role", "content"), ("from", "value"))
SPEAKERS = {  # of `from` -> role
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "tool": "tool",
    "observation": "tool",
}


def texts_of(rows: Rows, render: Render | None, *, is_chat: bool) -> tuple[list[str], bool]:
    """(texts, whether they are rendered chats).

    render   turns a chat into text by the model's chat template; None if it has none
    is_chat  every row has to be a chat; else the first row decides
    raises   RecipeError with the row whose value is not a text, or not a chat; DependencyError
    """
    if not is_chat and not _begins_with_chat(rows):
        return [text_of(value, rows.field, rows.name, number) for number, value in enumerate(rows.values, 1)], False
    texts = []
    for number, value in enumerate(rows.values, 1):
        messages = messages_of(value, rows.field, rows.name, number)
        tools = None if rows.tools is None else tools_of(rows.tools[number - 1], rows.name, number)
        if render is None:
            raise no_template(rows.name, rows.field)
        try:
            text = render(messages, tools)
        except ImportError as error:
            raise DependencyError(
                f"a chat needs a package that is missing ({error})",
                where=rows.name,
                hint=f"Run pip install -U {error.name or 'jinja2'}.",
                data={"reason": "no-package", "package": error.name, "cause": str(error)},
            ) from error
        except Exception as error:  # any exception of the model's own template for these messages
            raise RecipeError(
                f"the model's chat template refuses it ({type(error).__name__}: {str(error)[:160]})",
                where=f"{rows.name}, row {number}",
                hint="Remove or correct this row, or set `field` to a column of text.",
                data={"reason": "chat-refused", "error": type(error).__name__, "cause": str(error)[:160]},
            ) from error
        texts.append(text_of(text, rows.field, rows.name, number))
    return texts, True


def check_values(rows: Rows, *, is_chat: bool) -> None:
    """raises RecipeError for the first value that is not what the format asks for"""
    for number, value in enumerate(rows.values, 1):
        if is_chat:
            messages_of(value, rows.field, rows.name, number)
            if rows.tools is not None:
                tools_of(rows.tools[number - 1], rows.name, number)
        elif chat_of(value) is None:
            text_of(value, rows.field, rows.name, number)


def no_template(name: str, field: str) -> RecipeError:
    return RecipeError(
        f"contains chat messages in {field!r}, and the model's tokenizer has no chat template",
        where=name,
        hint="Set `field` to a column of text, or copy chat_template.jinja beside the model's config.json.",
        data={"reason": "no-chat-template", "field": field},
    )


def chat_of(value: Any) -> list[Any] | None:
    """The chat in a value: a list of objects. Old data sets store it as an object of lists."""
    if isinstance(value, list) and value and all(isinstance(message, dict) for message in value):
        return value
    if isinstance(value, dict) and any({*keys} <= value.keys() for keys in MESSAGE_KEYS):
        columns = {key: column for key, column in value.items() if isinstance(column, list)}
        is_whole = any({*keys} <= columns.keys() for keys in MESSAGE_KEYS)
        if is_whole and len({len(column) for column in columns.values()}) == 1:
            return [dict(zip(columns, message, strict=True)) for message in zip(*columns.values(), strict=True)] or None
    return None


def messages_of(value: Any, field: str, name: str, row: int) -> list[Message]:
    """The messages of a chat, each with a `role` and a `content`: a text, or a list of text parts.

    raises  RecipeError with the row, and the number of the message
    """
    found = chat_of(value)
    if found is None:
        kind = "an empty list" if value == [] else FOUND.get(type(value), type(value).__name__)
        raise RecipeError(
            f"has {kind} in {field!r}, not a chat",
            where=f"{name}, row {row}",
            hint="Write its chat as a list of objects with `role` and `content`, or remove this row.",
            data={"reason": "no-chat", "field": field},
        )
    return [_message(message, number, field, name, row) for number, message in enumerate(found, 1)]


def tools_of(value: Any, name: str, row: int) -> list[Message] | None:
    """The functions that a chat may call: a list of JSON schemas, or its JSON text. None if there are none.

    raises  RecipeError with the row
    """
    tools = _from_json(value)
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RecipeError(
            "has no list of objects in 'tools'",
            where=f"{name}, row {row}",
            hint="Write the functions that the chat may call as a list of JSON schemas, or remove 'tools'.",
            data={"reason": "no-tools"},
        )
    return tools


def without_nulls(value: Any) -> Any:
    """A value without the keys of objects that have no value."""
    if isinstance(value, dict):
        return {key: without_nulls(part) for key, part in value.items() if part is not None}
    return [without_nulls(part) for part in value] if isinstance(value, list) else value


def _begins_with_chat(rows: Rows) -> bool:
    return bool(rows.values) and chat_of(rows.values[0]) is not None


def _message(message: Message, number: int, field: str, name: str, row: int) -> Message:
    where = f"{name}, row {row}"
    kept = {key: part for key, part in message.items() if part is not None}  # None: a column of other rows
    if "role" not in kept and isinstance(kept.get("from"), str):
        speaker = kept.pop("from")
        if speaker not in SPEAKERS:
            raise RecipeError(
                f"message {number} in {field!r} is from {speaker[:40]!r}, which is no known speaker",
                where=where,
                hint=f"Write one of {', '.join(SPEAKERS)}; or write `role` and `content` in place of `from`.",
                data={"reason": "unknown-speaker", "message": number, "field": field, "speaker": speaker[:40]},
            )
        value = {"content": kept.pop("value")} if "value" in kept else {}
        kept = {"role": SPEAKERS[speaker], **value, **kept}
    if calls := kept.get("tool_calls"):
        kept["tool_calls"] = _calls(calls)
        kept.setdefault("content", "")
    for key in ("role", "content"):
        texts = _parts(kept[key]) if key == "content" and isinstance(kept.get(key), list) else [kept.get(key)]
        if not texts or not all(isinstance(text, str) for text in texts):
            raise RecipeError(
                f"message {number} in {field!r} has no text in {key!r}",
                where=where,
                hint="Fill it in, or remove the row.",
                data={"reason": "no-message-text", "message": number, "field": field, "key": key},
            )
        for text in texts:
            text_of(text, f"{field}.{key}", name, row)
    return kept


def _parts(content: list[Any]) -> list[Any]:
    """The texts of a content's parts; None for a part that is no text, such as an image."""
    return [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content]


def _calls(calls: Any) -> Any:
    """Tool calls with their arguments as objects: an API gives them as JSON text, and templates print objects."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        return calls
    made = []
    for call in calls:
        function = call.get("function")
        arguments = _from_json(function.get("arguments")) if isinstance(function, dict) else None
        is_object = isinstance(function, dict) and isinstance(arguments, dict)
        made.append({**call, "function": {**function, "arguments": arguments}} if is_object else call)
    return made


def _from_json(value: Any) -> Any:
    """The value of a JSON text; a text that is no JSON, and any other value, as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value
