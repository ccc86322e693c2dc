"""OpenAssistant's messages, flat or nested: built into trees, made into pairs or answers, and a reason for the rest."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from utils.data.preferences import (
    Ledger,
    Message,
    check_pair,
    is_text,
    is_unicode,
    prompt_text,
    whole_number,
    with_persona,
)
from utils.data.sources import Record
from utils.script import stop

ROLES = {"prompter": "user", "assistant": "assistant"}
BAD_TREES = ("aborted_low_grade", "halted_by_moderator")  # states of trees that the makers of the data gave up


@dataclass(slots=True, eq=False)
class Node:
    """One message in its tree."""

    row: int  # number in its split, from 0; in nested files counted depth first
    key: str  # its message_id, "" where it has none
    text: str
    role: str  # user | assistant
    lang: str
    rank: int | None  # 0 = the best of its siblings, as people rank them
    reason: str  # why it stands in no conversation, "" = it can
    unused: str = ""  # why no row has it, if none has
    used: bool = False
    depth: int = -1  # 0 = top-level prompt, -1 = reached from none
    above: Node | None = None
    replies: list[Node] = field(default_factory=list)

    @property
    def turn(self) -> Message:
        return {"role": self.role, "content": self.text}

    def path(self) -> list[Node]:
        """The conversation from the top-level prompt down to this message."""
        nodes = [self]
        while nodes[-1].above:
            nodes.append(nodes[-1].above)
        return nodes[::-1]


def read_nodes(records: Iterable[Record], layout: str, language: str) -> list[Node]:
    """All messages of one split, in its order, with their replies; every one that cannot be used has its reason.

    layout: a key of utils.data.sources.TREE_LAYOUTS. language: "" = all; a conversation is in one language throughout.
    """
    nodes, ids, tops, parents = [], {}, [], []
    for message, parent_id, state in messages_of(records, layout):
        node = node_of(len(nodes), message, state, language)
        nodes.append(node)
        if node.key in ids:
            node.reason = node.reason or "duplicate"
        elif node.key:
            ids[node.key] = node
            if parent_id:
                parents.append((node, str(parent_id)))
            else:
                tops.append(node)
    for node, parent_id in parents:
        if parent_id in ids:
            node.above = ids[parent_id]
            node.above.replies.append(node)
    descend(tops)
    for node in nodes:
        if node.depth < 0:  # its parent is missing, or that one's, or they go round in a circle
            node.reason, node.above = node.reason or "orphan", None
    return nodes


def messages_of(records: Iterable[Record], layout: str) -> Iterator[tuple[Record | None, object, str]]:
    """(message, id of its parent, state of its tree) of each message; the message of a tree without a root is None."""
    for record in records:
        if layout == "messages":
            yield record, record.get("parent_id"), str(record.get("tree_state"))
            continue
        root = record if "replies" in record else record.get("prompt")
        waiting = [(root if isinstance(root, dict) else None, None)]
        while waiting:
            message, parent_id = waiting.pop()
            yield message, parent_id, str(record.get("tree_state"))
            replies = (message or {}).get("replies") or []
            under = (message or {}).get("message_id")
            waiting += [(reply if isinstance(reply, dict) else {}, under) for reply in reversed(replies)]


def node_of(row: int, message: Record | None, state: str, language: str) -> Node:
    """The message as a node without a place yet, with the reason why it cannot be used by itself."""
    given = message or {}
    text, role = given.get("text"), ROLES.get(str(given.get("role")), "")
    node = Node(
        row,
        str(given.get("message_id") or ""),
        text if is_text(text) else "",
        role,
        str(given.get("lang") or "unknown"),
        whole_number(given.get("rank")),
        "",
    )
    checks = {  # the first that is true is the reason
        "no_root": message is None,
        "bad_message": not node.key or not role,
        "other_language": language not in ("", node.lang),
        "deleted": is_true(given.get("deleted")),
        "synthetic": is_true(given.get("synthetic")),
        "spam": is_false(given.get("review_result")),  # not reviewed yet (null) is none
        "bad_tree": state in BAD_TREES,
        "empty_prompt": role == "user" and not node.text,
        "empty_answer": role == "assistant" and not node.text,
        "broken_text": not is_unicode(node.text),
    }
    node.reason = next((reason for reason, found in checks.items() if found), "")
    return node


def is_true(value: object) -> bool:
    return str(value).lower() in ("true", "1")  # CSV cells are text


def is_false(value: object) -> bool:
    return str(value).lower() in ("false", "0")


def descend(tops: list[Node]) -> None:
    """Set the depth of each message; replies to an unusable message get the reason lost_context."""
    waiting = list(tops)
    while waiting:
        node = waiting.pop()
        node.depth = node.above.depth + 1 if node.above else 0
        if node.role != ("assistant" if node.depth % 2 else "user"):
            node.reason = node.reason or "bad_turn"  # a tree begins with a prompt, then the two take turns
        if node.above and node.above.reason:
            node.reason = node.reason or "lost_context"
        waiting += node.replies


def check_language(trees: Iterable[list[Node]], dataset: str, language: str) -> None:
    """End the script where no message is in the language, with those that there are."""
    found = Counter(node.lang for nodes in trees for node in nodes)
    if language and language not in found:
        known = ", ".join(f"{name} {count}" for name, count in found.most_common())
        stop(f"LANGUAGE = {language!r}: no message of {dataset} is in it, it has (with messages): {known}")


def pair_rows(nodes: list[Node], all_turns: bool) -> list[dict]:
    """One pair for each prompt with ranked answers: the best against the worst, ratings are -rank.

    A row is a dict of prompt, turns (before the answer), answers and ratings (chosen first), nodes (all messages in
    it) and root (the text of the top-level prompt). all_turns: later prompts too, with the turns before them.
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
        sides = [min(ranked, key=lambda reply: reply.rank), max(ranked, key=lambda reply: reply.rank)]
        row = row_of(node, sides)
        content = (*(turn["content"] for turn in row["turns"]), *row["answers"])
        reason = check_pair(row, 0.0) or ("duplicate" if content in seen else "")
        if reason:
            mark([node, *ranked], reason)
        else:
            seen.add(content)
            rows.append(row)
    return rows


def answer_rows(nodes: list[Node], all_turns: bool) -> list[dict]:
    """One row for each answer, as in `pair_rows` with one answer and one rating (None where it has no rank)."""
    rows, seen = [], set()
    for node in prompts_of(nodes, all_turns):
        answers = [reply for reply in node.replies if not reply.reason]
        node.unused = "duplicate" if answers else "unanswered"
        for answer in answers:
            row = row_of(node, [answer])
            content = (*(turn["content"] for turn in row["turns"]), *row["answers"])
            if content in seen:
                answer.unused = "duplicate"
            else:
                seen.add(content)
                rows.append(row)
    return rows


def prompts_of(nodes: list[Node], all_turns: bool) -> Iterator[Node]:
    """The prompts that rows are made of, in the source's order; mark deeper messages as later turns."""
    for node in nodes:
        if not all_turns and node.depth > 1:
            node.unused = "later_turn"
        elif node.role == "user" and not node.reason:
            yield node


def mark(nodes: Iterable[Node], unused: str) -> None:
    for node in nodes:
        node.unused = unused


def row_of(prompt: Node, answers: list[Node]) -> dict:
    """The row of a prompt and its answers, see `pair_rows`."""
    path = prompt.path()
    turns = [node.turn for node in path]
    return {
        "prompt": prompt_text("", turns),
        "turns": turns,
        "answers": tuple(answer.text for answer in answers),
        "ratings": tuple(None if answer.rank is None else float(-answer.rank) for answer in answers),
        "nodes": [*path, *answers],
        "root": path[0].text,
    }


def finished_answer(row: dict, system_prompt: str) -> Record:
    """The sft row that is stored: the whole conversation, the persona in its system turn."""
    answer = {"role": "assistant", "content": row["answers"][0]}
    messages = [*with_persona(row["turns"], system_prompt), answer]
    return {"prompt": row["prompt"], "messages": messages, "rating": row["ratings"][0]}


def enter(trees: dict[str, list[Node]], rows: Iterable[list[dict]], ledger: Ledger) -> None:
    """Note what was read and used, and why not: one entry for each reason and tree, with all its message numbers.

    trees: the messages of each split of the source. rows: all rows that are kept; a message that stands in one of
    them, as context too, is used.
    """
    for node in (node for some in rows for row in some for node in row["nodes"]):
        node.used = True
    for split, nodes in trees.items():
        left_out = defaultdict(list)
        for node in nodes:
            ledger.rows_read += 1
            ledger.rows_used += node.used
            if not node.depth:
                ledger.prompts.add(hash(node.text))
            if not node.used:
                reason = node.reason or node.unused
                assert reason, node
                left_out[node.path()[0].row, reason].append(node.row)
        for (top, reason), numbers in left_out.items():
            ledger.drop(reason, split, numbers, nodes[top].text)
