"""The forms that records have in the data that people fine-tune on, brought to the few that a model is given.

A form is told by the names of a record's fields, as TRL, axolotl and LLaMA-Factory have them. What comes out has
``text``, or ``messages`` (with ``tools``), or ``prompt`` and ``response``, or ``input_ids`` (with ``labels``), beside
what the record has else.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

from tailorcli.errors import DataError
from tailorcli.files import parse_json
from tailorcli.options import DataColumns

PROMPTS = ("prompt", "instruction", "question", "query", "input")
RESPONSES = ("response", "completion", "output", "answer", "chosen")
TURNS = ("conversations", "conversation")
_MORE = {"instruction": ("input", "context"), "question": ("context",)}  # what a prompt goes on with
_PLAIN = {("prompt", "response"), ("prompt", "completion")}  # joined as they stand
_ROLES = {
    "user": ("user", "human"),
    "assistant": ("assistant", "gpt", "chatgpt", "bard", "bing", "model", "bot", "function_call"),
    "system": ("system",),
    "tool": ("tool", "observation", "function", "function_response", "tool_response"),
}
_ROLE_OF = {name: role for role, names in _ROLES.items() for name in names}
TOKEN_IDS = "token ids"  # the form of a record that is prepared for a model
_BESIDE_TOKENS = ("images", "image", "audio", "audios", "pixel_values", "input_features")
_LEARNT = ("weight", "train")  # whether a turn is learnt
_OF_TURNS = " of messages"  # the form of a prompt and a response that are lists of turns
MARKS = {"image": "<image>", "audio": "<audio>"}  # in the texts of turns: the place of the next image or sound
_BESIDE = {"image": ("images", "image"), "audio": ("audio", "audios")}  # the fields that hold them
_UNDESIRED = {"completion": "label", "messages": "kto_tag", "conversations": "kto_tag"}  # by TRL and LLaMA-Factory
HINT = (
    'a record needs "text", or "messages" or "conversations", or a prompt and a response, with "images" or "audio" as '
    "the model takes; name other columns by --text-column, or --prompt-column and --response-column"
)
_TURNS_HINT = 'turns are [{"role": "user", "content": "..."}, ...] or [{"from": "human", "value": "..."}, ...]'

# A form's name, the fields, and the turns before the response where a chat template may frame a prompt.
Formed = tuple[str, dict[str, Any], list[dict[str, Any]] | None]


def is_pair_of_turns(form: str) -> bool:
    """Whether a record's form is a prompt and a response, each a list of turns."""
    return form.endswith(_OF_TURNS)


def is_undesired(value: Any) -> bool:
    """Whether a record is one of unpaired preferences (KTO) whose response is the one to avoid."""
    names = value if isinstance(value, dict) else ()
    return any(response in names and str(value.get(label)).lower() == "false" for response, label in _UNDESIRED.items())


def is_known(columns: Sequence[str], named: DataColumns) -> bool:
    """Whether columns of these names make records."""
    there = set(columns)
    wanted = {name for name in (named.text, named.prompt, named.response) if name is not None}
    if wanted:
        return wanted <= there
    pair = there.intersection(PROMPTS) and there.intersection(RESPONSES)
    return bool(pair or there.intersection(("text", "messages", "chosen", "input_ids", *TURNS)))


def formed(where: str, value: dict[str, Any]) -> Formed | None:
    """A record's form and fields; None where it has no text at all, but maybe images or sound. Raises DataError."""
    if "text" in value:
        return "text", value, None
    if "messages" in value:
        return "messages", {**value, "messages": _with_earlier(where, value, _listed(value["messages"]))}, None
    prompt = next((name for name in PROMPTS if name in value), None)
    response = next((name for name in RESPONSES if name in value), None)
    turns = next((name for name in TURNS if name in value), None)
    if turns is not None and (prompt, response) not in _PLAIN:
        return _conversation(where, value, turns)
    if response == "chosen":
        return _preference(where, value, prompt)
    if prompt is not None and response is not None:
        return _pair(where, value, prompt, response)
    return _tokens(where, value) if "input_ids" in value else None


def _tokens(where: str, value: dict[str, Any]) -> Formed:
    """Token ids, as axolotl and TRL prepare them, with the labels of those to learn; what was padded is left out."""
    if beside := next((name for name in _BESIDE_TOKENS if value.get(name) is not None), None):
        what = f'{where} has "input_ids" and "{beside}", and of prepared records the tokens alone are read'
        raise DataError(what, "give it as it was before: texts, with images or audio")
    names = [name for name in ("input_ids", "labels", "attention_mask") if value.get(name) is not None]
    columns = {name: _numbers(where, value, name) for name in names}
    ids = columns.get("input_ids", [])
    if other := next((name for name in names if len(columns[name]) != len(ids)), None):
        what = f'{where}: "{other}" has {len(columns[other]):,} numbers, and "input_ids" {len(ids):,}'
        raise DataError(what, "a number for each token")
    if any(number < 0 for number in ids):
        raise DataError(f'{where}: "input_ids" has {min(ids)}, which is no token', "ids count from 0")
    mask = columns.pop("attention_mask", [1] * len(ids))
    fields = {
        name: [number for number, seen in zip(numbers, mask, strict=True) if seen] for name, numbers in columns.items()
    }
    return TOKEN_IDS, fields, None


def _numbers(where: str, value: dict[str, Any], name: str) -> list[int]:
    found = value[name]
    if not isinstance(found, list) or not all(type(number) is int for number in found):
        raise DataError(f'{where}: "{name}" is {_shown(found)}, expected a list of whole numbers', HINT)
    return found


def renamed(where: str, value: dict[str, Any], named: DataColumns) -> dict[str, Any]:
    """The record under the usual names, without what stands under these itself. Raises DataError."""
    for name in (named.text, named.prompt, named.response):
        if name is not None and name not in value:
            what = f"{where} has no column {name!r}; it has {', '.join(sorted(map(str, value)))}"
            raise DataError(what, "name one of those: --text-column, or --prompt-column and --response-column")
        if name is not None and not _is_turns(_listed(value[name])):
            _text(where, value, name)
    if named.text is not None:
        return {**value, "text": _text(where, value, named.text)}
    rest = {name: entry for name, entry in value.items() if name not in ("text", "messages", *TURNS)}
    if named.prompt is not None:
        rest = _without(rest, *PROMPTS, "context")
        rest["prompt" if named.prompt == "prompt" else "question"] = value[named.prompt]
    if named.response is not None:
        rest = _without(rest, *RESPONSES)
        rest["response" if named.response in ("response", "completion") else "answer"] = value[named.response]
    if "audio" in value and named.prompt is None and named.response is not None:  # what is heard needs no prompt
        return {**rest, "response": value[named.response]}
    if not (set(rest).intersection(PROMPTS) and set(rest).intersection(RESPONSES)):
        missing = "--response-column" if named.response is None else "--prompt-column"
        raise DataError(f"{where} has a column for {named.shown} alone", f"name the other by {missing}")
    return rest


def _without(value: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: entry for name, entry in value.items() if name not in names}


def _as_messages(value: dict[str, Any], messages: list[dict[str, Any]]) -> dict[str, Any]:
    """A record with messages in place of what they were made of."""
    return {**_without(value, *PROMPTS, *RESPONSES, *TURNS), "messages": messages}


def _pair(where: str, value: dict[str, Any], prompt: str, response: str) -> Formed:
    """A prompt and its response; texts under the names of a question and its answer may be framed by a template."""
    if _is_turns(_listed(value[prompt])) or _is_turns(_listed(value[response])):
        messages = _turns(where, value, prompt, "user") + _turns(where, value, response, "assistant")
        messages = _with_earlier(where, value, messages)
        return f"{prompt} and {response}{_OF_TURNS}", _as_messages(value, messages), None
    if (prompt, response) in _PLAIN:
        return f"{prompt} and {response}", {**value, "response": value[response]}, _framed(where, value)
    more = [name for name in _MORE.get(prompt, ()) if value.get(name)]
    parts = [_text(where, value, name) for name in (prompt, *more)]
    question = "\n".join(parts if prompt != "question" else [*parts[1:], parts[0]])
    answer = _text(where, value, response)
    before = _earlier(where, value)
    fields = {**value, "prompt": "".join(f"{turn['content']}\n" for turn in before) + f"{question}\n"}
    names = ", ".join((prompt, *more))
    turns = [*before, {"role": "user", "content": question}]
    return f"{names} and {response}", {**fields, "response": answer}, turns


def _earlier(where: str, value: dict[str, Any]) -> list[dict[str, Any]]:
    """The turns that a record has beside its own: under ``system`` and ``history``."""
    turns = [{"role": "system", "content": _text(where, value, "system")}] if value.get("system") else []
    history = _listed(value.get("history")) or []
    for earlier in history if isinstance(history, list) else [history]:
        if not isinstance(earlier, list) or len(earlier) != 2 or not all(isinstance(text, str) for text in earlier):
            raise DataError(f'{where}: "history" must be a list of [prompt, response]', HINT)
        turns += [{"role": "user", "content": earlier[0]}, {"role": "assistant", "content": earlier[1]}]
    return turns


def _with_earlier(where: str, value: dict[str, Any], turns: Any) -> Any:
    """Turns behind those that stand beside them, their own system's first; as they are where they are no list."""
    if not isinstance(turns, list):
        return turns
    before = _earlier(where, value)
    if turns and isinstance(turns[0], dict) and turns[0].get("role") == "system":
        before = [turns[0], *(turn for turn in before if turn["role"] != "system")]
        turns = turns[1:]
    return [*before, *turns]


def _framed(where: str, value: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The turns of a prompt that stands alone but for what was before it, which only a template can frame."""
    before = _earlier(where, value)
    return [*before, {"role": "user", "content": _text(where, value, "prompt")}] if before else None


def _conversation(where: str, value: dict[str, Any], name: str) -> Formed:
    """The turns of ShareGPT, with their system and tools beside them; behind them the chosen one of a pair."""
    turns = _turns(where, value, name, "user")
    if value.get("chosen"):
        turns = turns + _turns(where, value, "chosen", "assistant")
    turns = _with_earlier(where, value, turns)
    beside = [kind for kind, names in _BESIDE.items() if any(value.get(name) for name in names)]
    if beside:
        turns = [{**turn, "content": with_media_parts(turn.get("content"), beside)} for turn in turns]
    fields = _as_messages(value, turns)
    if tools := _listed(value.get("tools")):
        bare = isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)
        fields["tools"] = [_tool(tool) for tool in tools] if bare else tools
    return f"ShareGPT {name}", fields, None


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    """The definition of a tool as chat templates take it: ShareGPT's data holds the function alone."""
    return {"type": "function", "function": tool} if "name" in tool and "function" not in tool else tool


def _preference(where: str, value: dict[str, Any], prompt: str | None) -> Formed:
    """The chosen response of a preference pair: a text, or turns, which may hold the prompt already."""
    form = "preference pairs (the chosen one)"
    chosen = value["chosen"]
    if isinstance(_listed(chosen), str) and (prompt is None or not _is_turns(_listed(value[prompt]))):
        if prompt is None:
            return form, {**value, "text": chosen}, None
        if prompt == "prompt":  # as TRL has it: joined as they stand
            return form, {**value, "response": chosen}, _framed(where, value)
        return form, *_pair(where, value, prompt, "chosen")[1:]
    answered = _turns(where, value, "chosen", "assistant")
    asked = [] if prompt is None else _turns(where, value, prompt, "user")
    whole = any(turn["role"] == "user" for turn in answered) and (
        len(asked) == 0 or isinstance(value[prompt or ""], str) or answered[: len(asked)] == asked
    )
    turns = _with_earlier(where, value, answered if whole else asked + answered)
    return form, _as_messages(value, turns), None


def _is_turns(value: Any) -> bool:
    """Whether a value is a list of turns, not a text."""
    return isinstance(value, list) and bool(value) and all(isinstance(turn, dict) for turn in value)


def _turns(where: str, value: dict[str, Any], name: str, role: str) -> list[dict[str, Any]]:
    """A field as messages: a list of turns in either form, one turn, or a text of ``role``. Raises DataError."""
    found = _listed(value[name])
    if isinstance(found, str):
        return [{"role": role, "content": found}]
    listed = [found] if isinstance(found, dict) else found
    if not isinstance(listed, list) or not listed or not all(isinstance(turn, dict) for turn in listed):
        raise DataError(f'{where}: "{name}" must be a list of turns, got {_shown(value[name])}', _TURNS_HINT)
    return [_turn(where, name, turn) for turn in listed]


def _turn(where: str, name: str, turn: dict[str, Any]) -> dict[str, Any]:
    """A turn with role and content; of a tool called in ShareGPT's way, the call."""
    if "role" in turn and "from" not in turn:
        if not isinstance(turn["role"], str):
            raise _no_turn(where, name, turn)
        return {**turn, "role": _ROLE_OF.get(turn["role"], turn["role"])}
    speaker, said = turn.get("from"), turn.get("value")
    if not isinstance(speaker, str) or speaker.lower() not in _ROLE_OF or not isinstance(said, str):
        raise _no_turn(where, name, turn)
    more = {key: turn[key] for key in _LEARNT if key in turn}
    if speaker.lower() == "function_call" and (calls := _calls(said)):
        return {"role": "assistant", "content": "", "tool_calls": calls, **more}
    return {"role": _ROLE_OF[speaker.lower()], "content": said, **more}


def _no_turn(where: str, name: str, turn: dict[str, Any]) -> DataError:
    what = f'{where}: "{name}" has the turn {_shown(turn)}, expected a text from one of {", ".join(_ROLE_OF)}'
    return DataError(what, _TURNS_HINT)


def _calls(said: str) -> list[dict[str, Any]]:
    """The calls of tools that a turn writes as JSON; none where it writes something else."""
    try:
        found = parse_json(said)
    except ValueError:
        return []
    listed = found if isinstance(found, list) else [found]
    if not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in listed):
        return []
    return [{"type": "function", "function": {"arguments": {}, **call}} for call in listed]


def _listed(value: Any) -> Any:
    """A value, or the list that a text holds as JSON, as tables write it."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        try:
            found = parse_json(value)
        except ValueError:
            return value
        return found if isinstance(found, list) and all(isinstance(entry, dict | list) for entry in found) else value
    return value


def with_media_parts(content: Any, beside: Collection[str]) -> Any:
    """A turn's text as parts where it marks places of the kinds of media ``beside`` it, as LLaVA's data does."""
    kinds = {MARKS[kind]: kind for kind in beside}
    if not isinstance(content, str) or not any(mark in content for mark in kinds):
        return content
    parts: list[dict[str, Any]] = []
    for piece in re.split("({}\n?)".format("\n?|".join(kinds)), content):
        if kind := kinds.get(piece.removesuffix("\n")):
            parts.append({"type": kind})
        elif piece.strip():
            parts.append({"type": "text", "text": piece})
    return parts


def _text(where: str, value: dict[str, Any], name: str) -> str:
    """A field that must be a text. Raises DataError."""
    if not isinstance(value[name], str):
        raise DataError(f'{where}: "{name}" is a {type(value[name]).__name__}, expected a string', HINT)
    return str(value[name])


def _shown(value: Any) -> str:
    return ascii(value)[:60]
