"""OpenAssistant's message trees: read them, make pairs or single answers, and record why other messages are unused."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from utils.data.preferences import Ledger, check_pair, is_text, is_unicode, prompt_text, whole_number, with_persona
from utils.data.sources import Record
from utils.script import stop

ROLES = {"prompter": "user", "assistant": "assistant"}
BAD_TREES = ("aborted_low_grade", "halted_by_moderator")  # states of trees that the annotators gave up
TRUE, FALSE = ("true", "1"), ("false", "0")  # also as text, in CSV cells


@dataclass(slots=True, eq=False)
class Node:
    """One message in its tree."""

    row: int  # number in its split, from 0; depth first in nested files
    key: str  # message_id, "" if missing
    text: str
    role: str  # user | assistant
    lang: str
    rank: int | None  # 0 = ranked best among its siblings
    reason: str  # why no conversation may contain it, "" = it can be used
    unused: str = ""  # why no row contains it although it can be used
    used: bool = False
    depth: int = -1  # 0 = top-level prompt, -1 = not connected to one
    parent: Node | None = None
    replies: list[Node] = field(default_factory=list)

    def path(self) -> list[Node]:
        """Return the conversation from the top-level prompt down to this message."""
        nodes = [self]
        while nodes[-1].parent:
            nodes.append(nodes[-1].parent)
        return nodes[::-1]


def read_nodes(records: Iterable[Record], layout: str, language: str) -> list[Node]:
    """Return all messages of one split in its order, linked to their replies; unusable ones have a reason.

    layout: a key of utils.data.sources.TREE_LAYOUTS. language: "" = all; a conversation stays in one language.
    """
    nodes: list[Node] = []
    by_key: dict[str, Node] = {}
    roots, children = [], []
    for message, parent_key, state in messages_of(records, layout):
        node = node_of(len(nodes), message, state, language)
        nodes.append(node)
        if node.key in by_key:
            node.reason = node.reason or "duplicate"
        elif node.key:
            by_key[node.key] = node
            if parent_key:
                children.append((node, str(parent_key)))
            else:
                roots.append(node)
    for node, parent_key in children:  # after all are read: a child may come before its parent
        if parent_key in by_key:
            node.parent = by_key[parent_key]
            node.parent.replies.append(node)
    descend(roots)
    for node in nodes:
        if node.depth < 0:  # an ancestor is missing, or the parents form a circle
            node.reason, node.parent = node.reason or "orphan", None
    return nodes


def messages_of(records: Iterable[Record], layout: str) -> Iterator[tuple[Record | None, object, str]]:
    """Yield (message, message_id of its parent, state of its tree); a tree without a root yields None as message."""
    for record in records:
        state = str(record.get("tree_state"))
        if layout == "messages":
            yield record, record.get("parent_id"), state
            continue
        root = record if "replies" in record else record.get("prompt")
        stack: list[tuple[Record | None, object]] = [(root if isinstance(root, dict) else None, None)]
        while stack:
            message, parent_key = stack.pop()
            yield message, parent_key, state
            if message:
                replies = [reply if isinstance(reply, dict) else {} for reply in message.get("replies") or []]
                stack += [(reply, message.get("message_id")) for reply in reversed(replies)]


def node_of(row: int, message: Record | None, state: str, language: str) -> Node:
    """Return the message as a node without parent and replies, with the reason if it is unusable by itself."""
    fields = message or {}
    key, lang = str(fields.get("message_id") or ""), str(fields.get("lang") or "unknown")
    role = ROLES.get(str(fields.get("role")), "")
    text = str(fields["text"]) if is_text(fields.get("text")) else ""
    checks = {  # the first true one is the reason
        "no_root": message is None,
        "bad_message": not key or not role,
        "other_language": language not in ("", lang),
        "deleted": str(fields.get("deleted")).lower() in TRUE,
        "synthetic": str(fields.get("synthetic")).lower() in TRUE,
        "spam": str(fields.get("review_result")).lower() in FALSE,  # null: not reviewed yet
        "bad_tree": state in BAD_TREES,
        "empty_prompt": role == "user" and not text,
        "empty_answer": role == "assistant" and not text,
        "broken_text": not is_unicode(text),
    }
    reason = next((reason for reason, failed in checks.items() if failed), "")
    return Node(row, key, text, role, lang, whole_number(fields.get("rank")), reason)


def descend(roots: list[Node]) -> None:
    """Set the depth of each message; replies to an unusable message get the reason lost_context."""
    stack = list(roots)
    while stack:
        node = stack.pop()
        node.depth = node.parent.depth + 1 if node.parent else 0
        if node.role != ("assistant" if node.depth % 2 else "user"):
            node.reason = node.reason or "bad_turn"
        if node.parent and node.parent.reason:
            node.reason = node.reason or "lost_context"
        stack += node.replies


def check_language(trees: Iterable[list[Node]], dataset: str, language: str) -> None:
    """Stop if no message is in the language, and list the languages of the dataset."""
    counts = Counter(node.lang for nodes in trees for node in nodes)
    if language and language not in counts:
        known = ", ".join(f"{name} {count}" for name, count in counts.most_common())
        stop(f"LANGUAGE = {language!r}: no message of {dataset} has it; languages (with messages): {known}")


def pair_rows(nodes: list[Node], all_turns: bool) -> list[dict[str, Any]]:
    """Return one pair for each prompt with ranked answers: the best against the worst. Ratings are -rank.

    A row has prompt, turns (before the answer), answers and ratings (chosen first), nodes (all of its messages), root
    (text of the top-level prompt) and content (all texts). all_turns: include later prompts with the turns before.
    """
    rows, seen = [], set()
    for node in prompts_of(nodes, all_turns):
        answers = [reply for reply in node.replies if not reply.reason]
        ranked = [reply for reply in answers if reply.rank is not None]
        mark(answers, "unranked")
        mark(ranked, "between_best_and_worst")
        if len(ranked) < 2:
            mark(ranked, "unpaired")
            node.unused = "unpaired" if answers else "unanswered"
            continue
        row = row_of(node, [min(ranked, key=lambda reply: reply.rank), max(ranked, key=lambda reply: reply.rank)])
        reason = check_pair(row, 0.0) or ("duplicate" if row["content"] in seen else "")
        if reason:
            mark([node, *ranked], reason)
        else:
            seen.add(row["content"])
            rows.append(row)
    return rows


def answer_rows(nodes: list[Node], all_turns: bool) -> list[dict[str, Any]]:
    """Return one row for each answer, as in `pair_rows` with one answer and one rating (None without a rank)."""
    rows, seen = [], set()
    for node in prompts_of(nodes, all_turns):
        answers = [reply for reply in node.replies if not reply.reason]
        node.unused = "duplicate" if answers else "unanswered"
        for answer in answers:
            row = row_of(node, [answer])
            if row["content"] in seen:
                answer.unused = "duplicate"
            else:
                seen.add(row["content"])
                rows.append(row)
    return rows


def prompts_of(nodes: list[Node], all_turns: bool) -> Iterator[Node]:
    """Yield the usable prompts in the order of the source; without all_turns, mark deeper messages as later turns."""
    for node in nodes:
        if not all_turns and node.depth > 1:
            node.unused = "later_turn"
        elif node.role == "user" and not node.reason:
            yield node


def mark(nodes: Iterable[Node], unused: str) -> None:
    for node in nodes:
        node.unused = unused


def row_of(prompt: Node, answers: list[Node]) -> dict[str, Any]:
    """Return the row of a prompt and its answers, see `pair_rows`."""
    path = prompt.path()
    turns = [{"role": node.role, "content": node.text} for node in path]
    return {
        "prompt": prompt_text("", turns),
        "turns": turns,
        "answers": tuple(answer.text for answer in answers),
        "ratings": tuple(None if answer.rank is None else float(-answer.rank) for answer in answers),
        "nodes": [*path, *answers],
        "root": path[0].text,
        "content": tuple(node.text for node in [*path, *answers]),
    }


def finished_answer(row: dict[str, Any], system_prompt: str) -> Record:
    """Return the stored sft row: the whole conversation, with the persona as its system turn."""
    answer = {"role": "assistant", "content": row["answers"][0]}
    messages = [*with_persona(row["turns"], system_prompt), answer]
    return {"prompt": row["prompt"], "messages": messages, "rating": row["ratings"][0]}


def fill_ledger(trees: dict[str, list[Node]], splits: Iterable[list[dict]], ledger: Ledger) -> None:
    """Count the messages read and used, and add one entry for each tree and reason with its unused messages.

    trees: the messages of each split of the source. splits: the rows that are kept; their context counts as used.
    """
    for rows in splits:
        for row in rows:
            for node in row["nodes"]:
                node.used = True
    for split, nodes in trees.items():
        unused = defaultdict(list)
        for node in nodes:
            ledger.rows_read += 1
            ledger.rows_used += node.used
            if node.depth == 0:
                ledger.prompts.add(hash(node.text))
            if not node.used:
                reason = node.reason or node.unused
                assert reason, node
                unused[node.path()[0].row, reason].append(node.row)
        for (root, reason), numbers in unused.items():
            ledger.drop(reason, split, numbers, nodes[root].text)
