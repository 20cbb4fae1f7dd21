"""The model card of an output: what the Hub reads in front of it, and what a person reads below.

A card says how the model was made, never where: names of models and files alone, no paths, no times. It is known
before the work starts, so that it is a side file like any other: a patch file carries it, and ``apply`` writes the
very same.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tailorcli.checkpoint.folder import BASE_CARD, CARD, CARDS, TUNED_CARD
from tailorcli.files import read_bytes
from tailorcli.hub import hub_origin
from tailorcli.options import DENSE, DistillOptions
from tailorcli.patchfile.report import REPORT_FILE
from tailorcli.runs.again import shell_text
from tailorcli.terminal import printable

BEGIN, END = "<!-- tailorcli: evaluation -->", "<!-- tailorcli: end of evaluation -->"
_MARK = "<!-- tailorcli: this card was written by tailorcli -->"
_MOST = 1 << 20  # bytes of a card that is read
_FRONT = re.compile(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", re.DOTALL)
_MARKS = re.compile(r"[\\`*\[\]|]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")  # an underscore in a word is none of Markdown's
_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_CARRIED = ("license", "license_name", "license_link", "language", "pipeline_tag", "datasets")


@dataclass(frozen=True)
class Source:
    """A model that goes into an output: its name, its id on the Hub where it has one, what its card says in front.

    ``argument`` names it to a command: with its commit, where that is known, as an id alone is another model some day.
    """

    name: str
    hub_id: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    pinned: str = ""

    @property
    def argument(self) -> str:
        """What a command that makes the output again calls it."""
        return self.pinned or self.name

    @classmethod
    def of(cls, folder: Path, named: Any = None) -> Source:
        """The model in ``folder``; ``named`` is what another file calls it, an id of the Hub or a path."""
        pinned = hub_origin(folder)
        found = pinned.partition("@")[0] or as_id(named)
        return cls(found or plain_name(folder), found, front_of(_content_of(folder / CARD)), pinned)


def plain_name(path: Path) -> str:
    """The last part of a path: what a card may say of it."""
    return printable(path.resolve().name) or "model"


def as_id(value: Any) -> str | None:
    """A text that is an id of the Hub, and no folder that is there; None for anything else."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, str) or not _ID.fullmatch(value):
        return None
    return None if Path(value).exists() else value


def front_of(content: bytes) -> dict[str, Any]:
    """What the metadata in front of a card says that another card may carry on; nothing where it cannot be read."""
    import yaml

    block = _FRONT.match(content[:_MOST].decode("utf-8", "replace"))
    if block is None:
        return {}
    try:
        found = yaml.safe_load(block[1])
        if isinstance(found, dict) and "language" in found:  # of which ``no``, Norwegian, is no truth value
            found["language"] = yaml.load(block[1], yaml.BaseLoader)["language"]  # texts alone
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    wanted = (*_CARRIED, "base_model")
    plain = {name: _plain(value) for name, value in found.items() if name in wanted} if isinstance(found, dict) else {}
    return {name: value for name, value in plain.items() if value}


def _content_of(file: Path) -> bytes:
    try:
        return read_bytes(file) if file.is_file() else b""
    except OSError:
        return b""


def _plain(value: Any) -> str | list[str] | None:
    """One short text, or a list of such; None for anything else."""
    if isinstance(value, str):
        return value if value.isprintable() and len(value) <= 200 else None
    if not isinstance(value, list) or len(value) > 200:
        return None
    texts = [each for each in value if isinstance(each, str) and _plain(each)]
    return texts if len(texts) == len(value) else None


@dataclass(frozen=True)
class CardText:
    """What a card says: title, sentences, a table of settings, the command, and what goes in front."""

    title: str
    said: str
    settings: Mapping[str, str | tuple[str, ...]]  # several patterns of names as a tuple
    command: Sequence[str]
    base: Source
    tuned: tuple[Source, ...]
    license: str | None = None
    merged: bool = False
    datasets: tuple[str, ...] = ()  # ids on the Hub of what it was fitted on
    tags: tuple[str, ...] = ("model-tailor",)  # behind tailorcli's own
    report: str = REPORT_FILE

    def front(self) -> dict[str, Any]:
        """The metadata: the licence is the one given, else the fine-tuned model's, else the base's."""
        own = [self.base, *self.tuned]
        ids = list(dict.fromkeys(source.hub_id for source in own if source.hub_id is not None))
        facts: dict[str, Any] = {}
        for source in (self.base, *reversed(self.tuned)):  # the later ones count
            licensed = {name: value for name, value in source.facts.items() if name.startswith("license")}
            if licensed:
                facts = {name: value for name, value in facts.items() if not name.startswith("license")} | licensed
            rest = ("language", "pipeline_tag")
            facts |= {name: source.facts[name] for name in rest if name in source.facts}
        data = [name for source in self.tuned for name in _listed(source.facts.get("datasets"))] + [*self.datasets]
        if self.license is not None:
            facts = {name: value for name, value in facts.items() if not name.startswith("license")}
            facts["license"] = self.license
        # Its words on the Hub: a merge is of several models, one with a single known ancestor is its fine-tune.
        relation = "merge" if self.merged or len(ids) > 1 else "finetune"
        return {
            "base_model": ids or None,
            "base_model_relation": relation if ids else None,
            "datasets": list(dict.fromkeys(data)) or None,
            "library_name": "transformers",
            "tags": ["tailorcli", *self.tags, *(["merge"] if relation == "merge" else [])],
            **facts,
        }

    def render(self, kept: Iterable[str]) -> str:
        """The card; ``kept`` names the cards of other models that lie beside it."""
        from huggingface_hub import ModelCardData

        front = ModelCardData(**{name: value for name, value in self.front().items() if value is not None})
        settings = [f"| {name} | {_value(value)} |" for name, value in self.settings.items()]
        cards = {TUNED_CARD: "the fine-tuned model's own card", BASE_CARD: "the base's own card"}
        links = [f"- [{cards[name]}]({name})" for name in cards if name in kept]
        differing = self._licences()
        links.append(f"- `{self.report}`: what was done to every tensor; `tailorcli inspect` shows it")
        return "\n".join(
            [
                *("---", front.to_yaml().strip(), "---", _MARK, ""),
                *(f"# {_cell(self.title)}", "", self.said, ""),
                *(BEGIN, END, ""),
                *("## How it was made", "", "| setting | value |", "| --- | --- |", *settings, ""),
                *("```sh", shell_text(list(self.command)), "```", ""),
                *(f"It loads with `from_pretrained`, as the {'fine-tuned model' if self.tuned else 'base'} does.", ""),
                *((differing, "") if differing else ()),
                *("## Beside it", "", *links, ""),
            ]
        )

    def _licences(self) -> str:
        """A sentence where the models' licences differ: which one holds is not for a program to say."""
        found = {source.name: _licence(source.facts) for source in (self.base, *self.tuned)}
        named = {name: licence for name, licence in found.items() if licence}
        if len(set(named.values())) < 2:
            return ""
        said = ", ".join(f"{code(name)} has {code(licence)}" for name, licence in named.items())
        return f"The licences of what it was made of differ: {said}. See their cards for what each asks."


def _licence(facts: Mapping[str, Any]) -> str:
    return str(facts.get("license_name") or facts.get("license") or "")


def _listed(value: Any) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def code(text: str) -> str:
    """A name as Markdown shows it letter for letter."""
    return f"`{printable(text).replace('`', chr(39))}`"


def _value(value: str | tuple[str, ...]) -> str:
    return _cell(value) if isinstance(value, str) else ", ".join(code(each).replace("|", "\\|") for each in value)


def _cell(text: str) -> str:
    """A text as Markdown shows it letter for letter in a table or a title."""
    plain = printable(text).replace("&", "&amp;").replace("<", "&lt;")
    return _MARKS.sub(r"\\\g<0>", plain)


def patch_text(options: Mapping[str, Any], base: str, tuned: str, *, retained: bool, distilled: bool) -> str:
    """What a patch with these options did, in two sentences; the models by their names."""
    method, kept = options["method"], f"{100 * options['density']:.3g}%"
    first = f"{code(tuned)} is {code(base)} after fine-tuning."
    trained = " What was changed was then trained towards both models." if distilled else ""
    if method == "interpolate":
        went = f"every weight went {options['weight']:.3g} of the way"
        return f"{first} This model lies between the two: {went}.{trained}"
    if method == "changed":
        was = "began as" if distilled else "is"
        return f"{first} This model {was} {code(tuned)}, as a patch of what differs.{trained}"
    if method in DENSE:
        how = f"the changes of all weights were scaled or cut ({method})"
        return f"{first} This model lies between the two: {how}.{trained}"
    if method != "tailor":
        changes = f"its changes to {kept} of the weights ({method})"
        return f"{first} This model keeps {changes}; every other weight is the base's.{trained}"
    aims = [] if options["solver"] == "none" or options["density"] == 1 else ["make up for the rest"]
    aims += ["leave alone what the base did"] if retained and options["solver"] != "none" else []
    how = f", adjusted to {' and to '.join(aims)}" if aims else ""
    how += ", and trained towards both models" if distilled else ""
    if options["density"] == 1:
        return f"{first} This model has all of its weights{how}."
    return (
        f"{first} Of each tensor that is patched this model keeps the {kept} that matter most{how}; every other weight "
        "is the base's, bit for bit, to bring back what fine-tuning made it forget."
    )


def trained_in_words(distill: DistillOptions) -> str:
    """How the kept entries were trained."""
    return f"{distill.steps} steps, rate {distill.rate:g}, weight {distill.weight:g}"


def merge_text(tasks: Sequence[str], base: str, method: str, *, distilled: bool = False) -> str:
    """What a merge of these tasks did, in two sentences."""
    named = ", ".join(map(code, tasks[:-1])) + (" and " if tasks[:-1] else "") + code(tasks[-1])
    how = {"joint": "chosen together, so that each task's outputs stay", "average": "averaged where several change one"}
    trained = ", and trained towards all of these models" if distilled else ""
    said = f"{how.get(method, 'put together from the patches alone')}{trained}"
    return (
        f"{code(base)} with the patches of {named} in it: {said}. "
        "Every weight that no patch changes is the base's, bit for bit."
    )


def with_card(
    side: Mapping[str, Path | bytes], text: CardText, others: Mapping[str, Path | bytes]
) -> dict[str, Path | bytes]:
    """Side files with our card as README.md, and the cards of ``others`` beside it under the names that they have."""
    rest = {name: source for name, source in side.items() if name not in CARDS}
    return rest | dict(others) | {CARD: text.render(others).encode()}


def is_ours(content: bytes) -> bool:
    """Whether a card was written by tailorcli."""
    return _MARK.encode() in content[:_MOST]


def read_card(folder: Path) -> str | None:
    """The card in a folder if it is one of ours; None for another, or none."""
    try:
        content = read_bytes(folder / CARD)
        return content.decode() if is_ours(content) else None
    except (OSError, UnicodeDecodeError):
        return None


def with_evaluation(card: str, lines: Sequence[str]) -> str:
    """A card of ours with ``lines`` in the place of an earlier evaluation's; without the place, at the end."""
    block = "\n".join([BEGIN, *lines, END])
    begin, end = card.find(BEGIN), card.find(END)
    if begin < 0 or end < begin:
        return f"{card.rstrip()}\n\n{block}\n"
    return card[:begin] + block + card[end + len(END) :]
