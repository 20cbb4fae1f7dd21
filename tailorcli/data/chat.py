"""Messages, and prompts as turns of a chat, through a model's own chat template."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from tailorcli.data.forms import with_media_parts
from tailorcli.data.messages import as_parts, other_forms, words_of
from tailorcli.data.records import Record, content_parts
from tailorcli.data.timed import within
from tailorcli.errors import DataError, OnceNotes

SECONDS = 5.0  # that a chat template may take for one record; milliseconds are usual
TEMPLATE_HINT = 'give these records in the form that the template asks for, or rendered, as "text"'


@dataclass(frozen=True)
class ChatTemplate:
    """The chat template of a ``tokenizer``, and that of a ``processor`` for what has images or sound.

    ``frames_text`` and ``frames_media`` say whether it also makes a turn of a prompt, where one has been set.
    """

    tokenizer: Any
    processor: Any
    notes: OnceNotes
    frames_text: bool
    frames_media: bool

    def frames(self, with_media: bool) -> bool:
        """Whether a chat template frames the prompts that the model is given."""
        render, wanted = (self.processor, self.frames_media) if with_media else (self.tokenizer, self.frames_text)
        return wanted and bool(getattr(render, "chat_template", None))

    def framed(self, record: Record) -> Record:
        """A question and its answer as the turns of a chat, for a model whose template frames them; others stay."""
        asked = self.asked(record)
        if asked is None:
            self.require_whole(record)
            return record
        fields = {name: value for name, value in record.fields.items() if name not in ("prompt", "response")}
        messages = [*asked, {"role": "assistant", "content": record.fields["response"]}]
        return replace(record, fields={**fields, "messages": messages}, turns=None)

    def asked(self, record: Record) -> list[dict[str, Any]] | None:
        """The turns before the response that the chat template frames, each image in its place; None: it frames none.

        Images that no turn marks come first in the last one, and so does sound.
        """
        if record.turns is None or not self.frames(record.has_media):
            return None
        if not (record.images or record.sounds):
            return record.turns
        beside = {kind: media for kind, media in (("image", record.images), ("audio", record.sounds)) if media}
        asked = [as_parts({**turn, "content": with_media_parts(turn["content"], beside)}) for turn in record.turns]
        marked = {part["type"] for turn in asked for part in turn["content"]}
        first = [{"type": kind} for kind, media in beside.items() if kind not in marked for _ in media]
        asked[-1]["content"] = [*first, *asked[-1]["content"]]
        return asked

    def require_whole(self, record: Record) -> None:
        """Raise DataError where a prompt that no template frames lacks the turns that the record has before it."""
        before = (record.turns or [])[:-1]
        if not before or record.fields["prompt"].startswith("".join(f"{turn['content']}\n" for turn in before)):
            return
        names = " and ".join(f'"{name}"' for name in ("system", "history") if record.fields.get(name))
        raise DataError(
            f"{record.where} has {names} beside its prompt, and no chat template frames what the model is given",
            f'put the text in front of each "prompt" and leave {names} out',
        )

    def text_of(self, record: Record) -> str:
        """The text of a record without media, messages through the chat template."""
        fields = record.fields
        if "text" in fields:
            return str(fields["text"])
        if "messages" not in fields:
            return str(fields["prompt"] + fields["response"])
        text = self.form_of(record)[1]
        self._tell_of_tools(record, text)
        return text

    def form_of(self, record: Record) -> tuple[list[dict[str, Any]], str]:
        """Messages in the form that the chat template takes, and what it makes of them. Raises DataError."""
        fields = record.fields
        if not getattr(self.tokenizer, "chat_template", None):
            raise DataError(
                f"{record.where} has messages, and the model's tokenizer has no chat template",
                'give the records a "text" field instead',
            )
        problem: Exception | None = None
        rendered: list[tuple[list[dict[str, Any]], str]] = []
        for messages in (fields["messages"], *other_forms(fields["messages"])):
            try:
                call = partial(self.tokenizer.apply_chat_template, messages, **record.template_options, tokenize=False)
                text = str(within(SECONDS, call))
            except TimeoutError as error:
                raise endless(record) from error
            except Exception as error:  # whatever a model's own template raises
                problem = problem or error
            else:
                whole = all(words.strip() in text for words in words_of(messages))
                if whole and not any(str(m["content"]) in text for m in messages if content_parts(m)):
                    return messages, text
                rendered.append((messages, text))
        if not rendered:
            what = f"{record.where}: the chat template refuses these messages: {problem}"
            raise DataError(what, TEMPLATE_HINT) from problem
        return rendered[0]  # it leaves words out whatever their form: thoughts of earlier turns, for example

    def rendered(self, record: Record, messages: list[dict[str, Any]], prompted: bool) -> str | None:
        """What the chat template makes of messages, and of the head of an answer to them; None where it refuses."""
        how = {**record.template_options, "tokenize": False, "add_generation_prompt": prompted}
        render = self.processor if record.has_media else self.tokenizer
        try:
            return str(within(SECONDS, partial(render.apply_chat_template, messages, **how)))
        except Exception:  # whatever a model's own template raises
            return None

    def _tell_of_tools(self, record: Record, text: str) -> None:
        """Note where a template has left the tools, or the calls of them, out of its text."""
        made = [message.get("tool_calls") for message in record.fields["messages"]]
        calls = [call for some in made if isinstance(some, list) for call in some if isinstance(call, dict)]
        named = [tool.get("function", tool) for tool in (*(record.fields.get("tools") or ()), *calls)]
        lost = [str(f["name"]) for f in named if isinstance(f, dict) and "name" in f and str(f["name"]) not in text]
        if lost:
            what = f"the tool {lost[0]!r} of {record.where}, and maybe in others"
            self.notes.make("tools", f"the model's chat template does not write {what}: a template with tools does")


def endless(record: Record) -> DataError:
    """The error for a chat template that takes too long."""
    what = f"{record.where}: the model's chat template does not end within {SECONDS:g} seconds"
    return DataError(what, 'give the records rendered, as "text", or mend the template')
