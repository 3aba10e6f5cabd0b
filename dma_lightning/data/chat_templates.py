"""Chat templates: a conversation as text, and which parts of the text are answers.

A template is Jinja, as in the `tokenizer_config.json` or `chat_template.jinja` of a Hugging Face tokenizer. Marks in
its output, which are removed at once, say where answers begin and end, and which special tokens come from messages.
"""

import json
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import msgspec
from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dma_lightning.data.find_files import user_path
from dma_lightning.files.reading import as_kind, check_regular, read_json

ANSWERER = "assistant"  # the role whose messages are answers

SIMPLE = """\
{%- set first = 1 if messages[0].role == 'system' else 0 -%}
{%- for message in messages -%}
  {%- set expected = 'system' if loop.index0 < first else ['user', 'assistant'][(loop.index0 - first) % 2] -%}
  {%- if message.role != expected -%}
    {{- raise_exception('expected messages of an optional system, then of user and assistant in turn, got '
        ~ message.role ~ ' as message ' ~ loop.index) -}}
  {%- endif -%}
  {{- '<|' ~ message.role ~ '|>\\n' -}}
  {%- if message.role == 'assistant' -%}
    {%- generation -%}{{- message.content ~ '<|end|>' -}}{%- endgeneration -%}
  {%- else -%}
    {{- message.content ~ '<|end|>' -}}
  {%- endif -%}
  {{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}
"""

_SECRET = secrets.token_hex(16)  # no text has it
_ANSWER, _TEXT = ((f"<{_SECRET}:{name}>", f"</{_SECRET}:{name}>") for name in ("answer", "text"))
_MARK = re.compile(rf"<(/?){_SECRET}:(answer|text)>", re.IGNORECASE)  # templates may change the case of texts


@dataclass(frozen=True)
class ChatText:
    """A conversation, or its part up to an answer, as a template writes it.

    Attributes:
        text: all of it.
        answers: half-open ranges of characters in it.
        literal: half-open ranges of characters that spell a special token but stay text.
    """

    text: str
    answers: list[tuple[int, int]]
    literal: list[tuple[int, int]]


class ChatTemplate:
    """A template that is ready to write conversations.

    Args:
        source: Jinja. It runs in a sandbox, and gets no date, so that the same file always gives the same text.
        tokens: variables such as `eos_token`.
        literal: special tokens, which stay text where a message spells them.

    Raises:
        ValueError: if the source is not Jinja.
    """

    def __init__(self, source: str, tokens: Mapping[str, str] | None = None, literal: Sequence[str] = ()) -> None:
        self.source, self.tokens, self.literal = source, dict(tokens or {}), tuple(literal)
        longest_first = sorted(filter(None, literal), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
        try:
            self._template: Template = _environment().from_string(source)
        except TemplateSyntaxError as error:
            raise ValueError(f"chat_template, line {error.lineno}: expected Jinja: {error.message}") from error

    def __reduce__(self) -> tuple:
        """Let other processes compile it themselves."""
        return type(self), (self.source, self.tokens, self.literal)

    def texts(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None) -> Iterator[ChatText]:
        """A conversation as one or more texts, in which every answer is marked once.

        If the template has `{% generation %}` blocks, these are the answers. Otherwise, an answer is what follows the
        generation prompt of the messages before it. Some templates change an earlier answer once other messages follow
        it. The conversation then becomes several texts, and each marks only the answers that it shows unchanged.

        Args:
            messages: each has a `role` and whatever else the template reads. At least one is an answer; messages after
                the last answer are left out.
            tools: descriptions of tools, for templates that show them.

        Raises:
            ValueError: if the template refuses the messages, or does not say which part is an answer.
        """
        last = max(i for i, message in enumerate(messages) if message["role"] == ANSWERER)
        messages, tools = [self._marked(message) for message in messages[: last + 1]], self._marked(tools)
        whole = self._render(messages, tools)
        if _ANSWER[0] in whole:
            yield _unmarked(whole)
            return
        done = marked = ""
        for count, message in enumerate(messages):
            if message["role"] != ANSWERER:
                continue
            prompt = self._render(messages[:count], tools, prompts=True)
            answered = self._render(messages[: count + 1], tools)
            if not answered.startswith(prompt):
                raise ValueError(
                    "chat_template: expected a template whose generation prompt begins the answer, or one with "
                    f"{{% generation %}} blocks around answers, got one that begins message {count + 1} differently; "
                    "name another with data.chat_template"
                )
            if not prompt.startswith(done):
                yield _unmarked(marked)
                done = marked = ""
            marked += prompt[len(done) :] + answered[len(prompt) :].join(_ANSWER)
            done = answered
        yield _unmarked(marked)

    def _render(self, messages: Sequence[Any], tools: Any, prompts: bool = False) -> str:
        try:
            return self._template.render(messages=messages, tools=tools, add_generation_prompt=prompts, **self.tokens)
        except Exception as error:  # of the template's code, which may do anything with these values
            reason = " ".join(str(error).split())
            raise ValueError(f"the chat template refuses the messages: {reason}") from error

    def _marked(self, value: Any) -> Any:
        """A value in which texts that spell a special token are marked; roles stay."""
        if isinstance(value, Mapping):
            return {name: x if name == "role" else self._marked(x) for name, x in value.items()}
        if isinstance(value, list):
            return [self._marked(x) for x in value]
        if self._pattern and isinstance(value, str):
            return self._pattern.sub(lambda found: found[0].join(_TEXT), value)
        return value


def template_source(choice: str | None, tokenizer: Path | None) -> str:
    """The Jinja source of a template.

    Args:
        choice: `simple`, a file, or None for the tokenizer's.
        tokenizer: a `tokenizer.json`, beside which `chat_template.jinja` or `tokenizer_config.json` is searched.

    Raises:
        ValueError: if there is none.
    """
    if choice == "simple":
        return SIMPLE
    if choice is not None:
        return _read(user_path(choice))
    if tokenizer is not None:
        file = tokenizer.with_name("chat_template.jinja")
        if file.exists():
            return _read(file)
        found = _tokenizer_config(tokenizer).get("chat_template")
        if isinstance(found, list):  # several, by name
            named = as_kind(found, list[_NamedTemplate], f"{tokenizer.parent}: chat_template")
            found = next((x.template for x in named if x.name == "default"), None)
        if found is not None:
            return as_kind(found, str, f"{tokenizer.parent}: chat_template")
    raise ValueError(
        "chat_template: expected chat_template.jinja or a tokenizer_config.json with a chat_template beside the "
        f"tokenizer, got {'bytes as tokens' if tokenizer is None else f'neither at {tokenizer.parent}'}; name a Jinja "
        "file with data.chat_template, or use data.chat_template simple"
    )


def template_tokens(tokenizer: Path | None) -> dict[str, str]:
    """The tokens that the `tokenizer_config.json` beside a `tokenizer.json` names, such as `eos_token`."""
    config = {} if tokenizer is None else _tokenizer_config(tokenizer)
    found = {name: x["content"] if isinstance(x, dict) and "content" in x else x for name, x in config.items()}
    return {name: x for name, x in found.items() if name.endswith("_token") and isinstance(x, str)}


class _NamedTemplate(msgspec.Struct):
    name: str
    template: str


class _Generation(Extension):
    """The block `{% generation %}`, which Transformers has, too; it marks what it contains as an answer."""

    tags = {"generation"}  # noqa: RUF012  # declared so by jinja2

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = (nodes.Output([nodes.TemplateData(mark)]) for mark in _ANSWER)
        return [begin, *body, end]


def _environment() -> ImmutableSandboxedEnvironment:
    """What templates of Transformers expect, without dates."""
    extensions = ["jinja2.ext.loopcontrols", _Generation]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    return environment


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(
    x: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON without escapes for HTML, with the options that Transformers gives templates."""
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _unmarked(marked: str) -> ChatText:
    """A text without its marks."""
    parts: list[str] = []
    ranges: dict[str, list[tuple[int, int]]] = {"answer": [], "text": []}
    begins: dict[str, int] = {}
    place = length = 0
    for mark in _MARK.finditer(marked):
        parts.append(marked[place : mark.start()])
        length += len(parts[-1])
        place = mark.end()
        ends, kind = mark[1], mark[2].lower()
        if not ends:
            begins[kind] = length
        elif (begin := begins.pop(kind, length)) < length:
            ranges[kind].append((begin, length))
    text = "".join([*parts, marked[place:]])
    if _SECRET in text.lower():
        raise ValueError(
            "chat_template: expected one that writes texts as they are, got one that changes their characters; name "
            "another with data.chat_template, or set data.special_tokens to parse"
        )
    return ChatText(text, ranges["answer"], ranges["text"])


def _read(file: Path) -> str:
    check_regular(file, "a chat template")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: expected a chat template in UTF-8: {error}") from error


def _tokenizer_config(tokenizer: Path) -> dict[str, Any]:
    file = tokenizer.with_name("tokenizer_config.json")
    return read_json(file, dict[str, Any], "a tokenizer_config.json") if file.exists() else {}
