"""The whole story of an invocation: what this daemon keeps of it, and what the nodes do that it was placed on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from msgspec import structs

from substrate_seam.errors import GuestUnavailable
from substrate_seam.executor import Node
from substrate_seam.story import Plain, Story, nodes_in, told

_ASK_WITHIN_S = 3.0


async def whole_story(
    invocation_id: str, *, own: Callable[[str], Story | None], nodes: Mapping[str, Node]
) -> Plain | None:
    """What there is to tell, ready for JSON (see `substrate_seam.story.told`); None if this daemon keeps nothing.

    A node that can't be asked is named with the reason: the rest is told all the same.
    """
    story = own(invocation_id)
    if story is None:
        return None
    heard: dict[str, Story] = {}
    silent: dict[str, str] = {}

    async def ask(node: Node) -> None:
        try:
            async with asyncio.timeout(_ASK_WITHIN_S):
                answer = await node.story(invocation_id)
        except TimeoutError:
            silent[node.node_id] = f"it did not answer within {_ASK_WITHIN_S:.0f} s"
        except GuestUnavailable as error:
            silent[node.node_id] = error.message
        else:
            if answer is not None:
                heard[node.node_id] = answer

    async with asyncio.TaskGroup() as asking:
        for node_id in nodes_in(story):
            if node_id in nodes:
                asking.create_task(ask(nodes[node_id]), name=f"ask {node_id} for a story")
    told_at = own(invocation_id)
    if told_at is not None:  # in the middle between question and answer, as far as this end can tell
        story = structs.replace(told_at, now_ns=(story.now_ns + told_at.now_ns) // 2)
    return told(invocation_id, story, nodes=heard, silent=silent)
