"""The text of one manifest file becomes decoded documents: YAML by libyaml, JSON by msgspec.

A file of YAML is cut at its ``---`` lines (YAML allows them nowhere else), so a document that does not parse spoils
only itself, and one that has not changed is not parsed again. YAML is read as Kubernetes reads it: YAML 1.1 with
``yes`` and ``no`` as booleans, timestamps as the text that they are, and a key that stands twice is an error.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import msgspec
import yaml
from yaml.cyaml import CParser  # type: ignore[attr-defined]

from enforcer.kubernetes import policies
from enforcer.kubernetes.decoding import Decoded, decode

_MAX_DEPTH = 100
_MAX_ALIASED = 100_000

_BOUNDARY = re.compile(rb"^---(?=[ \t\r\n]|\Z)", re.MULTILINE)
_DIRECTIVE = re.compile(rb"^%", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Document:
    """One document of a file.

    ``digest`` identifies its text, ``line`` is its first (from 1). A document that does not parse has an ``error``
    (the line in the file, and the reason), and ``decoded`` holds a policy for each namespace that it must close.
    """

    digest: bytes
    line: int
    decoded: tuple[Decoded, ...]
    error: tuple[int, str] | None = None


class _SyntaxError(Exception):
    """A document that does not parse; ``line`` counts from 0 at its beginning."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(reason)
        self.line = line
        self.reason = reason


def parse(
    data: bytes, *, path: str, is_json: bool = False, known: Mapping[bytes, tuple[Decoded, ...]] | None = None
) -> list[Document]:
    """Parse and decode a file.

    Args:
        data: the file's content, UTF-8.
        path: the file's path in reasons; its name is that of a policy which has no readable one but must close.
        is_json: whether the file is one JSON text.
        known: documents by digest that were decoded before, to be taken as they are.
    """
    documents = []
    for line, text in _documents(data, is_json=is_json):
        digest = hashlib.blake2b(text, digest_size=16).digest()
        decoded = (known or {}).get(digest)
        if decoded is not None:
            documents.append(Document(digest, line, decoded))
            continue
        try:
            documents.append(Document(digest, line, tuple(_decode(text, is_json=is_json))))
        except _SyntaxError as error:
            at = line + error.line
            name = path.rpartition("/")[2] if not documents else f"{path.rpartition('/')[2]}-{len(documents)}"
            salvaged = tuple(_salvage(text, name=name, reason=f"{path}:{at}: {error.reason}"))
            documents.append(Document(digest, line, salvaged, (at, error.reason)))
    return documents


def _documents(data: bytes, *, is_json: bool) -> Iterator[tuple[int, bytes]]:
    """Each document's first line and text; a directive belongs to what follows it, so such a file is left whole."""
    data = data.removeprefix(b"\xef\xbb\xbf")
    starts = [] if is_json or _DIRECTIVE.search(data) else [match.start() for match in _BOUNDARY.finditer(data)]
    line, begin = 1, 0
    for end in (*starts, len(data)):
        text = data[begin:end]
        if text.strip():
            yield line, text
        line += text.count(b"\n")
        begin = end


def _decode(text: bytes, *, is_json: bool) -> Iterator[Decoded]:
    if is_json or text.lstrip()[:1] == b"{":
        try:
            yield from decode(text)
        except (msgspec.DecodeError, RecursionError, ValueError) as error:
            if is_json:
                raise _json_error(text, error) from None
        else:
            return
    try:
        for body in read_yaml(text.decode()):
            # A document of comments is no object, and no mistake.
            if body is not None:
                yield from decode(body)
    except UnicodeDecodeError as error:
        raise _SyntaxError(text.count(b"\n", 0, error.start), "is not UTF-8") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        # What is missing at the end is missed where the next document begins.
        last = text.rstrip(b"\n").count(b"\n")
        raise _SyntaxError(
            min(mark.line, last) if mark else 0, error.problem or error.context or "is no YAML"
        ) from None
    except yaml.reader.ReaderError as error:
        before = text.decode()[: error.position] if isinstance(error.position, int) else ""
        raise _SyntaxError(before.count("\n"), error.reason) from None


def _json_error(text: bytes, error: Exception) -> _SyntaxError:
    """The mistake in lines: msgspec counts bytes, and from the item of a list where it is in one."""
    try:
        json.loads(text)
    except json.JSONDecodeError as better:
        return _SyntaxError(better.lineno - 1, better.msg)
    except UnicodeDecodeError as other:
        return _SyntaxError(text.count(b"\n", 0, other.start), "is not UTF-8")
    except (ValueError, RecursionError) as other:
        return _SyntaxError(0, str(other))
    return _SyntaxError(0, str(error))


_WORDS: dict[str, object] = {
    word: value
    for value, words in {
        None: "~ null Null NULL",
        True: "true True TRUE yes Yes YES on On ON y Y",
        False: "false False FALSE no No NO off Off OFF n N",
    }.items()
    for word in words.split()
}
_WORD_STARTS = frozenset(word[0] for word in _WORDS)
_NUMBER_STARTS = frozenset("0123456789+-.")
_INTEGER = re.compile(r"[-+]?(0b[01_]+|0x[0-9a-fA-F_]+|0o?[0-7_]+|0|[1-9][0-9_]*)").fullmatch
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?").fullmatch
_OCTAL = re.compile(r"([-+]?)0o?([0-7_]+)").fullmatch
_MAX_DIGITS = 40

_PLAIN = object()
_NOT_PLAIN = object()


def scalar(text: str) -> object:
    """What a plain (unquoted) scalar is in YAML 1.1, as Kubernetes reads it: never a date, never base 60."""
    if not text:
        return None
    if text[0] in _WORD_STARTS:
        return _WORDS.get(text, text)
    if text[0] in _NUMBER_STARTS and len(text) <= _MAX_DIGITS:
        return _number(text)
    return text


def _number(text: str) -> object:
    octal = _OCTAL(text)
    try:
        if octal:
            return int(octal[1] + octal[2].replace("_", ""), 8)
        if _INTEGER(text):
            return int(text.replace("_", ""), 0)
    except ValueError:
        return text
    value = float(text) if _FLOAT(text) else None
    return text if value is None or value in {float("inf"), float("-inf")} else value


def read_yaml(text: str) -> list[object]:
    """The documents of a text of YAML as dictionaries, lists and scalars; the keys of mappings are text as written.

    Raises:
        yaml.YAMLError: the text is no YAML, repeats a key, is nested past 100 levels, or grows by aliases.
    """
    return list(_Reader(text).documents())


class _Reader(CParser):
    """libyaml's parser and a constructor of plain values.

    A third of the time of ``CSafeLoader``, which resolves each scalar by regular expressions and builds it by
    generators. Bounded against nesting, where libyaml's composer overflows the stack, and against aliases of aliases.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        # A document without aliases has fewer nodes than characters.
        self._left = len(text) + _MAX_ALIASED

    def documents(self) -> Iterator[object]:
        """The documents of the text, one at a time."""
        while self.check_node():
            node = self.get_node()
            if node is not None:
                yield self._value(node)

    def resolve(self, kind: type[yaml.Node], _value: object, implicit: tuple[bool, bool]) -> object:
        """The composer asks for a tag: whether a scalar is plain is all that the constructor needs."""
        return _PLAIN if kind is yaml.ScalarNode and implicit[0] else _NOT_PLAIN

    def descend_resolver(self, _parent: yaml.Node | None, _index: object) -> None:
        """The composer goes down by one."""
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem="is nested too deeply")

    def ascend_resolver(self) -> None:
        """The composer comes up by one."""
        self._depth -= 1

    def _value(self, node: yaml.Node) -> object:
        if isinstance(node, yaml.ScalarNode):
            if node.tag is _PLAIN:
                return scalar(node.value)
            return node.value if node.tag is _NOT_PLAIN else self._tagged(node)
        # An alias is composed to the very node of its anchor: this is where a few lines become a billion.
        self._left -= len(node.value)
        self._depth += 1
        if self._left < 0 or self._depth > _MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem="has too many aliases", problem_mark=node.start_mark)
        value: object
        if isinstance(node, yaml.MappingNode):
            value = self._mapping(node)
        else:
            value = [self._value(item) for item in node.value]
        self._depth -= 1
        return value

    def _mapping(self, node: yaml.MappingNode) -> dict[str, object]:
        try:
            value = {key.value: self._value(item) for key, item in node.value}
        except TypeError:
            raise yaml.MarkedYAMLError(problem="a key is no scalar", problem_mark=node.start_mark) from None
        if len(value) != len(node.value):
            seen: set[str] = set()
            for key, _ in node.value:
                if key.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"key {key.value!r} stands twice", problem_mark=key.start_mark)
                seen.add(key.value)
        if "<<" in value:
            merged = value.pop("<<")
            for other in merged if isinstance(merged, list) else [merged]:
                if not isinstance(other, dict):
                    raise yaml.MarkedYAMLError(problem="<< takes mappings", problem_mark=node.start_mark)
                value = {**other, **value}
        return value

    def _tagged(self, node: yaml.ScalarNode) -> object:
        tag = node.tag.removeprefix("tag:yaml.org,2002:")
        if tag == "str":
            return node.value
        if tag in {"int", "float", "bool", "null"}:
            return scalar(node.value)
        raise yaml.MarkedYAMLError(problem=f"has a tag {node.tag!r}", problem_mark=node.start_mark)


_COMMENT = re.compile(r"^\s*#.*$", re.MULTILINE)
_SAYS_POLICY = re.compile(r"""["']?\bkind["']?\s*:\s*(?:!\S*\s+)?["']?NetworkPolicy(?:List)?\b""", re.IGNORECASE)
_SAYS_VERSION = re.compile(r"""["']?\bapiVersion["']?\s*:\s*["']?([^\s"',}]+)""")
_SAYS_NAMESPACE = re.compile(r"""["']?\bnamespace["']?\s*:\s*["']?([-a-z0-9]+)""")
_SAYS_NAME = re.compile(r"""["']?\bname["']?\s*:\s*["']?([-.a-z0-9]+)""")
_NO_NAME = re.compile(r"[^-a-z0-9.]+|^[-.]+|[-.]+$")


def _salvage(text: bytes, *, name: str, reason: str) -> Iterator[Decoded]:
    """Close every namespace for which a text that does not parse may hold a NetworkPolicy: never open by accident."""
    # A text in UTF-16 is legible without its zero bytes.
    legible = _COMMENT.sub("", text.replace(b"\0", b"").decode(errors="replace"))
    found = len(_SAYS_POLICY.findall(legible))
    versions = _SAYS_VERSION.findall(legible)
    ours = [version for version in versions if "/" not in version or version.startswith(("networking.k8s.io/", "ext"))]
    if not found or (versions and not ours):
        return
    said = _SAYS_NAMESPACE.findall(legible)
    namespaces = sorted(set(said))
    if len(said) < found and policies.DEFAULT_NAMESPACE not in namespaces:
        namespaces.append(policies.DEFAULT_NAMESPACE)
    named = _SAYS_NAME.search(legible) if found == 1 else None
    stem = named[1] if named else _NO_NAME.sub("-", name.lower()).strip("-.")
    for namespace in namespaces:
        yield policies.closed(namespace=namespace, name=stem, reason=reason)
