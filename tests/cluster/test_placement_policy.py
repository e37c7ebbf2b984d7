"""The choice of a node is sound, complete, and a function of what was reported and of the dice."""

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from substrate_cluster.placement.index import Members, NodeIndex
from substrate_cluster.placement.policy import Placed, Refused, place
from substrate_seam.invocation import Isolation, WorkloadRef
from substrate_seam.report import NodeReport, WorkloadReport

CALL = WorkloadRef("w", "d" * 64)
NODE_IDS = [f"node-{number}" for number in range(6)]


def report(node_id, *, busy=0, waiting=0, concurrency=4, known=True, draining=False, boot_id="b", full=True):
    """What a node says of itself and of the one workload."""
    workload = WorkloadReport(name="w", concurrency=concurrency, busy=busy, waiting=waiting)
    return NodeReport(
        node_id=node_id,
        boot_id=boot_id,
        size_mib=1000,
        free_mib=500,
        isolation=Isolation.PROCESS,
        arch="amd64",
        full=full,
        draining=draining,
        workloads={CALL.digest: workload} if known else {},
    )


def reports():
    return st.builds(
        report,
        node_id=st.sampled_from(NODE_IDS),
        busy=st.integers(0, 5),
        waiting=st.integers(0, 3),
        concurrency=st.integers(1, 4),
        known=st.booleans(),
        draining=st.booleans(),
        boot_id=st.sampled_from(["b", "c"]),
        full=st.booleans(),
    )


def indexed(told):
    index = NodeIndex()
    for each in told:
        index.apply(each)
    return index


@given(told=st.lists(reports(), max_size=20), avoid=st.frozensets(st.sampled_from(NODE_IDS)), seed=st.integers(0, 99))
def test_placement_is_sound_and_complete(told, avoid, seed):
    """A placed call goes to a node that takes calls and is not avoided; a refused one has no such node."""
    index = indexed(told)
    taking = {node_id for node_id, view in index.views.items() if not view.report.draining} - avoid
    choice = place(CALL, index, Random(seed), avoid=avoid)
    if isinstance(choice, Placed):
        assert choice.node_id in taking
        view = index.view(choice.node_id)
        with_room = {node_id for node_id in taking if index.views[node_id].has_room(CALL.digest)}
        assert (choice.because == "room") == bool(with_room)
        assert not with_room or view.has_room(CALL.digest)
    else:
        assert not taking


@given(
    nodes=st.lists(reports(), max_size=6, unique_by=lambda each: each.node_id),
    order=st.randoms(use_true_random=False),
    seed=st.integers(0, 99),
)
def test_replaying_views_and_dice_replays_the_choice(nodes, order, seed):
    """Equal reports and equal dice choose among the same nodes, whatever order the reports came in."""
    shuffled = list(nodes)
    order.shuffle(shuffled)
    first, second = (place(CALL, indexed(told), Random(seed)) for told in (nodes, nodes))
    assert first == second
    other = place(CALL, indexed(shuffled), Random(seed))
    assert type(other) is type(first)
    if isinstance(first, Placed):
        assert (other.because, other.candidates) == (first.because, first.candidates)


def test_the_less_loaded_of_two_takes_the_call():
    """Two nodes without room keep queues; the shorter one per slot gets the call."""
    index = indexed([report("long", busy=4, waiting=3), report("short", busy=4, waiting=1)])
    assert {place(CALL, index, Random(seed)).node_id for seed in range(20)} == {"short"}


def test_a_node_that_does_not_know_the_workload_is_asked_when_nobody_does():
    """It will refuse, be told, and be asked again; that is better than no answer."""
    choice = place(CALL, indexed([report("new", known=False)]), Random(1))
    assert (choice.node_id, choice.because) == ("new", "unknown-there")


def test_a_refusal_says_whether_there_was_any_node():
    """No node at all is another trouble than all nodes tried."""
    assert place(CALL, NodeIndex(), Random(1)) == Refused(because="no-node")
    index = indexed([report("only")])
    assert place(CALL, index, Random(1), avoid={"only"}) == Refused(because="all-tried")


@given(told=st.lists(reports(), max_size=30), gone=st.sets(st.sampled_from(NODE_IDS)))
def test_the_index_says_what_the_reports_add_up_to(told, gone):
    """Kept up to date step by step, it equals one made from scratch."""
    index = indexed(told)
    for node_id in gone:
        index.retract(node_id)
    for node_id, view in index.views.items():
        taking = not view.report.draining
        assert (node_id in set(index.open)) == taking
        assert (node_id in set(index.knowing(CALL.digest))) == (taking and CALL.digest in view.workloads)
        assert (node_id in set(index.with_room(CALL.digest))) == (taking and view.has_room(CALL.digest))
    assert set(index.open) <= set(index.views)
    assert set(index.views).isdisjoint(gone)


def test_a_new_boot_voids_what_was_known_of_the_old_one():
    """After a restart a node knows only what it says it knows."""
    index = indexed([report("n", boot_id="old"), report("n", boot_id="new", known=False, full=False)])
    assert index.view("n").workloads == {}
    assert len(index.knowing(CALL.digest)) == 0


@given(st.lists(st.tuples(st.booleans(), st.sampled_from("abcdef"))))
def test_members_are_a_set_that_can_be_drawn_from(steps):
    """Whatever comes and goes, each member has exactly one place."""
    members, expected = Members(), set()
    for add, name in steps:
        (members.add if add else members.discard)(name)
        (expected.add if add else expected.discard)(name)
        assert sorted(members[place] for place in range(len(members))) == sorted(expected)
        assert members.without({"a", "z"}) == len(expected - {"a"})
