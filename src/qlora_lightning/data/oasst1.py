"""OASST1's message trees: whole trees in one row each, or one message a row; and the conversations that are their paths.

Köpf et al. 2023, "OpenAssistant Conversations". A message has a text, a role, a language, a rank among its parent's replies (0 is best) and
a mark where it was deleted.
"""

from collections.abc import Iterable, Iterator
from typing import Any, Literal

from qlora_lightning.data.rows import Located, Row, text_of
from qlora_lightning.errors import UserError

Role = Literal["prompter", "assistant"]
Turn = tuple[Role, str]

REFUSED = "__refused__"
"""The field of a unit that stands for a row which other rows show to be wrong: the line that says so. Parsing it raises that line."""

_PLACE = "__place__"  # of a message that had a row of its own
_KEPT = ("message_id", "parent_id", "text", "role", "lang", "rank", "deleted")  # the rest of a row is not held in memory


def distinct(rows: Iterable[Located]) -> Iterator[Located]:
    """Trees of one row each, as they are; one whose id another row has already becomes a refused unit."""
    first: dict[str, str] = {}
    for where, row in rows:
        root = row.get("prompt")
        identity = row.get("message_tree_id") or (root.get("message_id") if isinstance(root, dict) else None)
        if isinstance(identity, str) and first.setdefault(identity, where) != where:
            row = {REFUSED: _twice("message_tree_id", identity, where, first[identity])}
        yield where, row


def trees(rows: Iterable[Located]) -> Iterator[Located]:
    """Trees out of rows of one message each, in the order of their roots; replies are in the order of the rows.

    All rows are read before the first tree is given, for a reply may stand anywhere. A row that is in no tree becomes a refused unit.
    """
    nodes: dict[str, Row] = {}
    found = [_enter(where, row, nodes) for where, row in rows]
    for node in nodes.values():
        parent = nodes.get(node["parent_id"])
        if parent is not None:
            parent["replies"].append(node)
    reached = _reached(node for node in nodes.values() if not node["parent_id"])
    for node in found:
        if REFUSED in node:
            yield node[_PLACE], node
        elif node["message_id"] not in reached:
            yield node[_PLACE], {REFUSED: _lost(node, nodes)}
        elif not node["parent_id"]:
            yield node[_PLACE], {"prompt": node}


def _enter(where: str, row: Row, nodes: dict[str, Row]) -> Row:
    """The row as a node of a tree, also put under its id; or refused."""
    try:
        identity = text_of(row, "message_id", where)
        if row.get("parent_id"):
            text_of(row, "parent_id", where)
    except UserError as error:
        return {_PLACE: where, REFUSED: str(error)}
    if identity in nodes:
        return {_PLACE: where, REFUSED: _twice("message_id", identity, where, nodes[identity][_PLACE])}
    nodes[identity] = {"parent_id": None, **{name: row[name] for name in _KEPT if name in row}, "replies": [], _PLACE: where}
    return nodes[identity]


def _reached(nodes: Iterable[Row]) -> set[str]:
    """The ids of all messages at and below ``nodes``."""
    reached, open_nodes = set(), list(nodes)
    while open_nodes:
        node = open_nodes.pop()
        reached.add(node["message_id"])
        open_nodes += node["replies"]
    return reached


def _twice(field: str, identity: str, where: str, first: str) -> str:
    return f"{where}: a {field} must stand in one row only, but {identity!r} is in {first} too; remove one of the rows"


def _lost(node: Row, nodes: dict[str, Row]) -> str:
    parent = node["parent_id"]
    if parent in nodes:
        return (
            f"{node[_PLACE]}: a reply's parents must lead to a root, but those over parent_id {parent!r} do not; correct or remove the row"
        )
    return f"{node[_PLACE]}: a reply's parent must have a row, but none has message_id {parent!r}; add it or remove the reply"


def paths(
    root: Row, where: str, choice: Literal["best", "all"], languages: list[str] | None = None, whole: bool = False
) -> Iterator[list[Turn]]:
    """The conversations in a tree: along the best-ranked reply at every level, or along every reply.

    Args:
        root: a message with its ``replies``, and so on.
        where: names the tree in errors; a message that had a row of its own is named by that row.
        choice: "best" gives one conversation at most.
        languages: messages in others are left out, as deleted ones are, with all their replies.
        whole: end where the tree ends; otherwise a conversation ends with the last answer in it.

    Raises:
        UserError: a message on these paths is wrong.
    """
    if _usable(root, where, languages):
        try:
            yield from _paths(root, [], where, choice, languages, whole)
        except RecursionError as error:
            raise UserError(f"{where}: a message tree must not be deeper than some hundred replies; remove or split the row") from error


def _paths(node: Row, before: list[Turn], where: str, choice: str, languages: list[str] | None, whole: bool) -> Iterator[list[Turn]]:
    path = [*before, _turn(node, where)]
    replies = [reply for reply in _replies(node, where) if _usable(reply, where, languages)]
    if choice == "best":
        # Replies without a rank were never compared: they come last, in the order of the file.
        replies = sorted(replies, key=lambda reply: (reply.get("rank") is None, reply.get("rank") or 0))[:1]
    found = False
    for reply in replies:
        for longer in _paths(reply, path, where, choice, languages, whole):
            found = True
            yield longer
    if not found and (whole or path[-1][0] == "assistant"):
        yield path


def _turn(node: Row, where: str) -> Turn:
    where = node.get(_PLACE, where)
    role = text_of(node, "role", where)
    if role == "prompter":
        return "prompter", text_of(node, "text", where)
    if role == "assistant":
        return "assistant", text_of(node, "text", where, may_be_empty=True)
    raise UserError(f"{where}: a message's role must be prompter or assistant, got {role!r}; correct or remove the row")


def _replies(node: Row, where: str) -> list[Row]:
    replies = node.get("replies") or []
    if not isinstance(replies, list) or not all(isinstance(reply, dict) for reply in replies):
        raise UserError(f"{where}: a message's replies must be a list of messages, got {type(replies).__name__}; correct or remove the row")
    for reply in replies:
        parent = reply.get("parent_id")
        if parent is not None and "message_id" in node and parent != node["message_id"]:
            raise UserError(
                f"{where}: a reply must stand below its parent, but the one with parent_id {parent!r} stands below message "
                f"{node['message_id']!r}; correct or remove the row"
            )
    return replies


def _usable(node: Row, where: str, languages: list[str] | None) -> bool:
    where = node.get(_PLACE, where)
    _check(node, "deleted", (bool,), "true, false", where)
    _check(node, "rank", (int, float), "a number", where)
    return not node.get("deleted") and (languages is None or node.get("lang") in languages)


def _check(node: Row, field: str, kinds: tuple[type[Any], ...], rule: str, where: str) -> None:
    value = node.get(field)
    if value is not None and not isinstance(value, kinds):
        raise UserError(f"{where}: field {field!r} must be {rule} or null, got {type(value).__name__}; correct or remove the row")
